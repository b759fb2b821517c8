"""DiDeMo as it lies on disk for paragraph-video retrieval.

Files, as CLIP4Clip reads them (dataloaders/dataloader_didemo_retrieval.py:42-85):
  train_list.txt, val_list.txt, test_list.txt      one id a line; an id is a file name, such as 12_34_5f.mov
  train_data.json, val_data.json, test_data.json   [{"video": id, "description", "times", ...}]: moments
  videos/   files of these names, or with another suffix (5f.mp4 or 5f.mov.mp4 for 5f.mov)

A clip's one caption is the paragraph of its moments' descriptions in the order of the file, as CLIP4Clip
joins them. They were written of the first 30 seconds (LisaAnne/LocalizingMoments, README), so later frames
are left out: CLIP4Clip reads seconds 0 to 31.
"""

import os
from pathlib import Path

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.assembly import Row, assemble, check_source, usable, video_names
from clipdistill_jax.data.formats.clips import ClipSplits, FormatError, Problem

LISTS = {"train": "train_list.txt", "validation": "val_list.txt", "test": "test_list.txt"}
MOMENTS = {"train": "train_data.json", "validation": "val_data.json", "test": "test_data.json"}
VIDEO_FOLDERS = ("videos", "DiDeMo_Videos")
SECONDS = 31


def read(source: str | os.PathLike[str]) -> ClipSplits:
    """Lists the clips of a DiDeMo tree; opens no video.

    Raises:
      FileNotFoundError: a needed file or the videos folder is absent.
      FormatError: a file is cut short or has another structure, an id repeats, is in two splits or points out
        of the folder.
    """
    source = check_source(source, ", ".join(LISTS.values()))
    problems: list[Problem] = []
    rows = {}
    for split, file in LISTS.items():
        paragraphs = _read_moments(source / MOMENTS[split], split, problems)
        rows[split] = [
            Row(
                video_id,
                source / file,
                f"line {line}",
                paragraphs.get(video_id),
                MOMENTS[split],
                (video_id, *video_names(os.path.splitext(video_id)[0], video_id)),
                SECONDS,
            )
            for line, video_id in checked.read_ids(source / file)
        ]
    annotations = [source / file for file in MOMENTS.values()]
    return assemble(rows, source, VIDEO_FOLDERS, annotations, problems, [])


def _read_moments(path: Path, split: str, problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    """id -> its paragraph. Empty descriptions are noted and left out."""
    moments = checked.read_json(path, any_text=True)
    if not isinstance(moments, list):
        raise FormatError(f"{path}, top level: expected a list of moments, found {type(moments).__name__}")
    said: dict[str, list[str]] = {}
    for k, moment in enumerate(moments):
        video_id = checked.field(moment, "video", str, f"{path}, [{k}]")
        description = checked.field(moment, "description", str, f"{path}, [{k}]")
        if usable(description, problems, split, path.name, f"[{k}], video {video_id!r}"):
            said.setdefault(video_id, []).append(description)
    return {video_id: (" ".join(descriptions),) for video_id, descriptions in said.items()}
