"""Stills with captions, as Karpathy's Flickr30k file lists them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from clipdistill_jax.data.formats.karpathy import ANNOTATIONS, IMAGE_FOLDERS
from clipdistill_jax.data.shapes.sayings import captions
from clipdistill_jax.data.shapes.scenes import SceneConfig
from clipdistill_jax.data.shapes.stills_tree import Picture, Plan, draw_stills, write_stills

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def write_karpathy(folder: str | Path, config: SceneConfig, workers: int | None = None) -> Path:
    """Writes stills with captions, see `write_stills`.

    A training image has `config.captions` captions, each on some of the scene; the others have one that tells
    it from every other image of its split.
    """
    return write_stills(folder, config, _plan, format="karpathy", workers=workers)


def _plan(config: SceneConfig) -> Plan:
    pictures: list[Picture] = []
    images: list[dict] = []
    sentence_ids = itertools.count()
    for split, stills in draw_stills(config, "karpathy").items():
        for still in stills:
            number, train = len(images), split == "train"
            name = f"{2_000_000 + number}.jpg"
            pictures.append(Picture(still, f"{IMAGE_FOLDERS[0]}/{name}"))
            sentences = [
                {"tokens": said.split(), "raw": said, "imgid": number, "sentid": next(sentence_ids)}
                for said in captions(still, config.captions if train else 1, partial=train)
            ]
            images.append(
                {
                    "sentids": [sentence["sentid"] for sentence in sentences],
                    "imgid": number,
                    "sentences": sentences,
                    "split": _SPLITS[split],
                    "filename": name,
                }
            )
    return pictures, {ANNOTATIONS[0]: json.dumps({"images": images, "dataset": "flickr30k"})}
