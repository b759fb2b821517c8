"""The small files beside prepared records: a manifest of the preparation and an index of the captions."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
INDEX = "index"


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    """What a split holds, without its frames. Position k is record k of the split.

    Attributes:
      video_ids: one a clip.
      captions: the captions of each clip, at least one.
      num_frames: stored frames of each clip, at least one.
    """

    video_ids: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    num_frames: tuple[int, ...]


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_index(directory: Path, split: str, index: SplitIndex) -> None:
    """Writes index/{split}.json under a prepared folder."""
    (directory / INDEX).mkdir(exist_ok=True)
    write_json(directory / INDEX / f"{split}.json", dataclasses.asdict(index))


def read_index(directory: str | os.PathLike[str], split: str) -> SplitIndex:
    """Reads the index of a split of a prepared folder.

    Raises:
      FileNotFoundError: the folder is not prepared.
      KeyError: it has no such split.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest["splits"]:
        raise KeyError(f"{directory} has the splits {', '.join(manifest['splits'])}, not {split!r}")
    value = json.loads((directory / INDEX / f"{split}.json").read_text(encoding="utf-8"))
    return SplitIndex(
        video_ids=tuple(value["video_ids"]),
        captions=tuple(tuple(captions) for captions in value["captions"]),
        num_frames=tuple(value["num_frames"]),
    )


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a prepared folder; it is written last, so the rest is there too.

    Raises:
      FileNotFoundError: there is none: not prepared, or stopped before the end.
      ValueError: it cannot be read.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no prepared dataset (no {MANIFEST}): prepare it first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): remove {directory} and prepare again") from error
