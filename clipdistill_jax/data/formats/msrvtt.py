"""MSR-VTT as it lies on disk for text-video retrieval.

Files, as CLIP4Clip reads them (dataloaders/dataloader_msrvtt_retrieval.py):
  MSRVTT_data.json             {"sentences": [{"video_id", "caption"}], "videos": [{"video_id", "url"}]}
  MSRVTT_train.9k.csv, .7k.csv column video_id; captions come from the json
  MSRVTT_JSFUSION_test.csv     columns video_id, sentence: the 1k-A test split, one sentence a clip
  MSRVTT_val.csv               optional, ours; columns video_id, sentence
  videos/                      {video_id}.mp4, else .webm, else .avi, else .mkv

CLIP4Clip selects its best epoch on the test split. We do not: without MSRVTT_val.csv some clips of the
train list are held out, the same ones each time.
"""

import os
from pathlib import Path

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.assembly import (
    Row,
    assemble,
    check_source,
    usable,
    video_names,
    with_validation,
)
from clipdistill_jax.data.formats.clips import ClipSplits, Problem

ANNOTATIONS = "MSRVTT_data.json"
TRAIN_CSV = {"9k": "MSRVTT_train.9k.csv", "7k": "MSRVTT_train.7k.csv"}
TEST_CSV = "MSRVTT_JSFUSION_test.csv"
VALIDATION_CSV = "MSRVTT_val.csv"
VIDEO_FOLDERS = ("videos", "videos/all", "MSRVTT_Videos")


def read(source: str | os.PathLike[str], *, train: str = "9k", num_validation: int = 500) -> ClipSplits:
    """Lists the clips of an MSR-VTT tree; opens no video.

    Args:
      source: the folder that holds the files named above.
      train: "9k" or "7k", which train list to read.
      num_validation: clips of the train list held out as "validation" when MSRVTT_val.csv is absent; those
        whose hashed id is smallest, each with its first caption, as the test list has one. 0 = no such split.

    Returns:
      ClipSplits with "train", "validation" (if any) and "test". A clip of MSRVTT_val.csv that the train list
      also has leaves the train split; a test clip in another split is an error.

    Raises:
      FileNotFoundError: a needed file or the videos folder is absent.
      FormatError: a file is cut short or has another structure, an id repeats or points out of the folder.
      ValueError: an argument is out of range.
    """
    if train not in TRAIN_CSV:
        raise ValueError(f"train must be one of {sorted(TRAIN_CSV)}, not {train!r}")
    source = check_source(source, ANNOTATIONS)
    problems: list[Problem] = []
    notes: list[str] = []
    captions = _read_sentences(source / ANNOTATIONS, problems)
    train_rows = _read_list(source / TRAIN_CSV[train], captions)
    test_rows = _read_list(source / TEST_CSV)
    listed = (source / VALIDATION_CSV).exists()
    validation_rows = _read_list(source / VALIDATION_CSV) if listed else None
    rows = with_validation(train_rows, validation_rows, num_validation, VALIDATION_CSV, notes)
    rows["test"] = test_rows
    return assemble(rows, source, VIDEO_FOLDERS, [source / ANNOTATIONS], problems, notes)


def _read_sentences(path: Path, problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    """video_id -> its captions in the order of the file. Empty ones are noted and left out."""
    data = checked.read_json(path, any_text=True)
    sentences = checked.field(data, "sentences", list, f"{path}, top level")
    seen: dict[str, str] = {}
    for k, video in enumerate(data.get("videos") or ()):
        where = f"{path}, videos[{k}]"
        video_id = checked.field(video, "video_id", str, where)
        checked.check_file_stem(video_id, where)
        checked.check_unique(video_id, where, seen)
    captions: dict[str, list[str]] = {}
    for k, sentence in enumerate(sentences):
        where = f"{path}, sentences[{k}]"
        video_id = checked.field(sentence, "video_id", str, where)
        caption = checked.field(sentence, "caption", str, where)
        checked.check_file_stem(video_id, where)
        if usable(caption, problems, "", path.name, f"sentences[{k}], video_id {video_id!r}"):
            captions.setdefault(video_id, []).append(caption)
    return {video_id: tuple(c) for video_id, c in captions.items()}


def _read_list(path: Path, captions: dict[str, tuple[str, ...]] | None = None) -> list[Row]:
    """Rows of a csv list; their captions are `captions`, or the column sentence."""
    columns = ("video_id",) if captions is not None else ("video_id", "sentence")
    seen: dict[str, str] = {}
    rows = []
    for line, values in checked.read_csv(path, columns):
        video_id, where = values["video_id"].strip(), f"{path}, line {line}"
        checked.check_file_stem(video_id, where)
        checked.check_unique(video_id, where, seen)
        said = captions.get(video_id) if captions is not None else (values["sentence"],)
        rows.append(Row(video_id, path, f"line {line}", said, ANNOTATIONS, video_names(video_id)))
    return rows
