"""ActivityNet Captions as it lies on disk for paragraph-video retrieval.

Files, as CLIP4Clip reads them (dataloaders/dataloader_activitynet_retrieval.py:43-122):
  train_ids.json, val_ids.json   [id, ...]: 10009 and 4917 clips; an id is "v_" and the name of the video
  train.json, val_1.json         {id: {"duration", "timestamps": [[start, end], ...], "sentences": [...]}}
  validation_ids.json            optional, ours: ids of train.json to choose checkpoints by
  videos/                        {id}.mp4 with or without "v_" (or .webm, .avi, .mkv)

A clip's one caption is the paragraph of its sentences in the order of their start times (CLIP4Clip: of the
file). Its "val" is the split that results are reported on, here "test"; without validation_ids.json some
clips of the train list are held out, the same ones each time.
"""

import os
from pathlib import Path
from typing import Any

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.assembly import (
    Row,
    assemble,
    check_source,
    usable,
    video_names,
    with_validation,
)
from clipdistill_jax.data.formats.clips import ClipSplits, FormatError, Problem

TRAIN_IDS, TRAIN = "train_ids.json", "train.json"
TEST_IDS, TEST = "val_ids.json", "val_1.json"
VALIDATION_IDS = "validation_ids.json"
VIDEO_FOLDERS = ("videos", "Activity_Videos")


def read(source: str | os.PathLike[str], *, num_validation: int = 500) -> ClipSplits:
    """Lists the clips of an ActivityNet Captions tree; opens no video.

    Args:
      source: the folder that holds the files named above.
      num_validation: clips of the train list held out as "validation" when validation_ids.json is absent;
        those whose hashed id is smallest. 0 = no such split.

    Returns:
      ClipSplits with "train", "validation" (if any) and "test". A clip of validation_ids.json that the train
      list also has leaves the train split; a test clip in another split is an error.

    Raises:
      FileNotFoundError: a needed file or the videos folder is absent.
      FormatError: a file is cut short or has another structure, an id repeats or points out of the folder.
      ValueError: num_validation is out of range.
    """
    source = check_source(source, f"{TRAIN_IDS} and {TEST_IDS}")
    problems: list[Problem] = []
    notes: list[str] = []
    paragraphs = _read_paragraphs(source / TRAIN, problems)
    train_rows = _read_ids(source / TRAIN_IDS, paragraphs, TRAIN)
    listed = (source / VALIDATION_IDS).exists()
    validation_rows = _read_ids(source / VALIDATION_IDS, paragraphs, TRAIN) if listed else None
    rows = with_validation(train_rows, validation_rows, num_validation, VALIDATION_IDS, notes)
    rows["test"] = _read_ids(source / TEST_IDS, _read_paragraphs(source / TEST, problems), TEST)
    return assemble(rows, source, VIDEO_FOLDERS, [source / TRAIN, source / TEST], problems, notes)


def _read_ids(path: Path, paragraphs: dict[str, tuple[str, ...]], captions_file: str) -> list[Row]:
    ids = checked.read_json(path)
    if not isinstance(ids, list) or not ids:
        raise FormatError(f"{path}, top level: expected a list of ids, found {str(ids)[:40]!r}")
    seen: dict[str, str] = {}
    rows = []
    for k, video_id in enumerate(ids):
        where = f"{path}, [{k}]"
        if not isinstance(video_id, str):
            raise FormatError(
                f"{where}: expected an id, found {type(video_id).__name__} {str(video_id)[:40]!r}"
            )
        checked.check_file_stem(video_id, where)
        checked.check_unique(video_id, where, seen)
        names = video_names(*dict.fromkeys([video_id.removeprefix("v_"), video_id]))
        rows.append(Row(video_id, path, f"[{k}]", paragraphs.get(video_id), captions_file, names))
    return rows


def _read_paragraphs(path: Path, problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    """id -> its paragraph. Empty sentences are noted and left out."""
    data = checked.read_json(path, any_text=True)
    if not isinstance(data, dict):
        raise FormatError(f"{path}, top level: expected an object by id, found {type(data).__name__}")
    paragraphs: dict[str, tuple[str, ...]] = {}
    for video_id, annotation in data.items():
        where = f"{path}, {video_id!r}"
        sentences = checked.field(annotation, "sentences", list, where)
        starts = [
            _start(times, f"{where}, timestamps[{k}]")
            for k, times in enumerate(checked.field(annotation, "timestamps", list, where))
        ]
        if len(sentences) != len(starts):
            raise FormatError(f"{where}: {len(sentences)} sentences but {len(starts)} timestamps")
        said = []
        for k in sorted(range(len(sentences)), key=starts.__getitem__):
            if not isinstance(sentences[k], str):
                found = type(sentences[k]).__name__
                raise FormatError(f"{where}, sentences[{k}]: expected text, found {found}")
            if usable(sentences[k], problems, "", path.name, f"{video_id!r}, sentences[{k}]"):
                said.append(sentences[k])
        if said:
            paragraphs[video_id] = (" ".join(said),)
    return paragraphs


def _start(times: Any, where: str) -> float:
    numbers = isinstance(times, list) and all(isinstance(t, int | float) and t == t for t in times)
    if not numbers or len(times) != 2:
        raise FormatError(f"{where}: expected [start, end] in seconds, found {str(times)[:40]!r}")
    return float(times[0])
