"""The small files beside the images' records: the items of a split, and its images."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from clipdistill_jax.data.formats.listing import read_jsonl
from clipdistill_jax.data.formats.vcr import Words, render
from clipdistill_jax.data.index import INDEX, read_manifest, write_json
from clipdistill_jax.data.questions.items import Question, from_json

IMAGES = "images"  # folder of the records
ANSWERS = "answers.json"
AND = "and"  # how tags of several objects are read aloud; never important itself


def write_items(directory: Path, split: str, items: Iterator[Question]) -> int:
    """Writes index/{split}.jsonl; gives the number of items."""
    path = directory / INDEX / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for item in items:
            file.write(item.to_json() + "\n")
            count += 1
    return count


def read_items(directory: Path, split: str, kinds: Sequence[str]) -> Iterator[Question]:
    """The items of a split that are of these kinds, in order.

    Raises:
      FileNotFoundError: the folder is not prepared.
      KeyError: it has no such split.
    """
    manifest = read_manifest(directory)
    if split not in manifest["splits"]:
        raise KeyError(f"{directory} has the splits {', '.join(manifest['splits'])}, not {split!r}")
    for _, data in read_jsonl(directory / INDEX / f"{split}.jsonl"):
        if data["kind"] in kinds:
            yield from_json(data)


def write_images(directory: Path, split: str, names: Sequence[str], regions: Sequence[int]) -> None:
    """Writes index/{split}.images.json: name and number of regions of each image."""
    (directory / INDEX).mkdir(exist_ok=True)
    write_json(directory / INDEX / f"{split}.images.json", {"names": list(names), "regions": list(regions)})


def read_images(directory: Path, split: str) -> tuple[list[str], np.ndarray]:
    """The images' names, and how many regions each has, the whole image included."""
    data = json.loads((directory / INDEX / f"{split}.images.json").read_text(encoding="utf-8"))
    return data["names"], np.array(data["regions"], np.int64)


def read_texts(directory: Path, split: str, kinds: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Contexts and choices of each item as texts for people; objects are called by their class."""
    contexts, choices = [], []
    for item in read_items(directory, split, kinds):

        def written(texts: tuple[Words, ...], objects: tuple[str, ...] = item.objects) -> list[str]:
            return [" ".join(render(text, objects, joiner=AND).words) for text in texts]

        contexts.append(written(item.context))
        choices.append(written(item.choices))
    return contexts, choices
