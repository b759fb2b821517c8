"""Captions of still images in Karpathy's split files, an image being a clip of one frame.

Files (karpathy/neuraltalk2, its "caption datasets" archive; also karpathy/deepimagesent):
  dataset_flickr30k.json, dataset_flickr8k.json or dataset_coco.json
    {"images": [{"filename", "split", "sentences": [{"raw"}], "imgid", "filepath"}], "dataset"}
  flickr30k_images/{filename}   or flickr30k-images/, images/, or anywhere below the folder, as COCO's
                                train2014/ and val2014/ ("filepath")
A split is "train", "val", "test", or COCO's "restval": what the validation and test splits leave of val2014.

File names are unique in these sets, so an image is looked for by its name alone.
"""

import os
from pathlib import Path
from typing import Any

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.assembly import Row, assemble, check_source, usable
from clipdistill_jax.data.formats.clips import ClipSplits, FormatError, Problem

ANNOTATIONS = ("dataset_flickr30k.json", "dataset_flickr8k.json", "dataset_coco.json")
IMAGE_FOLDERS = ("flickr30k_images", "flickr30k-images", "images", ".")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def read(source: str | os.PathLike[str], *, restval: bool = True) -> ClipSplits:
    """Lists the images of a tree; opens none.

    Args:
      source: the folder that holds one of the files named above.
      restval: images of COCO's "restval" are training images, as is customary; else they are left out.

    Returns:
      ClipSplits with the splits that the file has. An image's id is its file name without the ending.

    Raises:
      FileNotFoundError: the file or the images are absent.
      FormatError: the file is cut short or has another structure, there is more than one, there is no
        training image, or an image repeats or points out of the folder.
    """
    source = check_source(source, " or ".join(ANNOTATIONS))
    found = [source / name for name in ANNOTATIONS if (source / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{source}: no annotations; expected {' or '.join(ANNOTATIONS)}")
    if len(found) > 1:
        raise FormatError(
            f"{source}: {' and '.join(path.name for path in found)} are both there; keep each in a folder "
            "of its own"
        )
    (path,) = found
    problems: list[Problem] = []
    rows: dict[str, list[Row]] = {}
    seen: dict[str, str] = {}
    left_out = 0
    data = checked.read_json(path, any_text=True)
    images = checked.field(data, "images", list, f"{path}, top level")
    for k, image in enumerate(images):
        row, split = _row(path, k, image, seen, problems)
        if split == "restval" and not restval:
            left_out += 1
        else:
            rows.setdefault(SPLITS[split], []).append(row)
    if "train" not in rows:
        raise FormatError(f"{path}: none of its {len(images)} images is in the split 'train'")
    notes = [f"{left_out} images of the split 'restval' are left out"] if left_out else []
    return assemble(rows, source, IMAGE_FOLDERS, [path], problems, notes, suffixes=IMAGE_SUFFIXES)


def _row(path: Path, k: int, image: Any, seen: dict[str, str], problems: list[Problem]) -> tuple[Row, str]:
    """The k-th image and the name of its split."""
    where = f"{path}, images[{k}]"
    filename = checked.field(image, "filename", str, where)
    checked.check_file_stem(filename, f"{where}, field 'filename'")
    where += f", filename {filename!r}"
    stem, suffix = os.path.splitext(filename)
    if suffix.lower() not in IMAGE_SUFFIXES:
        raise FormatError(f"{where}: an image's name ends in {', '.join(IMAGE_SUFFIXES)}")
    checked.check_unique(stem, where, seen)
    split = checked.field(image, "split", str, where)
    if split not in SPLITS:
        raise FormatError(f"{where}: the field 'split' is {split!r}; expected {', '.join(SPLITS)}")
    said = []
    for i, sentence in enumerate(checked.field(image, "sentences", list, where)):
        raw = checked.field(sentence, "raw", str, f"{where}, sentences[{i}]")
        if usable(raw, problems, SPLITS[split], path.name, f"images[{k}], sentences[{i}]"):
            said.append(raw)
    return Row(stem, path, f"images[{k}]", tuple(said) or None, path.name, (filename,)), split
