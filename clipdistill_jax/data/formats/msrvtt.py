"""MSR-VTT as it lies on disk for text-video retrieval.

Files, as CLIP4Clip reads them (dataloaders/dataloader_msrvtt_retrieval.py):
  MSRVTT_data.json             {"sentences": [{"video_id", "caption"}], "videos": [{"video_id", "url"}]}
  MSRVTT_train.9k.csv, .7k.csv column video_id; captions come from the json
  MSRVTT_JSFUSION_test.csv     columns video_id, sentence: the 1k-A test split, one sentence a clip
  MSRVTT_val.csv               optional, ours; columns video_id, sentence
  videos/                      {video_id}.mp4, else .webm, else .avi

CLIP4Clip selects its best epoch on the test split. We do not: without MSRVTT_val.csv some clips of the
train list are held out, the same ones each time.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipdistill_jax.data.formats import Clip, ClipSplits, FormatError, Problem, checked

ANNOTATIONS = "MSRVTT_data.json"
TRAIN_CSV = {"9k": "MSRVTT_train.9k.csv", "7k": "MSRVTT_train.7k.csv"}
TEST_CSV = "MSRVTT_JSFUSION_test.csv"
VALIDATION_CSV = "MSRVTT_val.csv"
VIDEO_FOLDERS = ("videos", "videos/all", "MSRVTT_Videos")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi")
LONG_CAPTION_WORDS = 75  # CLIP's context of 77 less its start and end tokens: longer is certainly cut


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of a csv list; `captions` is None where the json has none of this clip."""

    video_id: str
    file: Path
    line: int
    captions: tuple[str, ...] | None


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
    source = Path(source)
    if train not in TRAIN_CSV:
        raise ValueError(f"train must be one of {sorted(TRAIN_CSV)}, not {train!r}")
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; give the folder that holds {ANNOTATIONS}")
    problems: list[Problem] = []
    notes: list[str] = []
    captions = _read_sentences(source / ANNOTATIONS, problems)
    train_csv, validation_csv = source / TRAIN_CSV[train], source / VALIDATION_CSV

    train_rows = [dataclasses.replace(r, captions=captions.get(r.video_id)) for r in _read_list(train_csv)]
    rows = {"test": _read_list(source / TEST_CSV, "sentence")}
    if validation_csv.exists():
        rows["validation"] = _read_list(validation_csv, "sentence")
        held_out = {row.video_id for row in rows["validation"]}
        shared = sum(row.video_id in held_out for row in train_rows)
        if shared:
            notes.append(f"{shared} clips of {VALIDATION_CSV} were taken out of the train split")
    else:
        held_out = _hold_out(train_rows, num_validation, train_csv)
        if held_out:
            rows["validation"] = [
                dataclasses.replace(r, captions=r.captions and r.captions[:1])
                for r in train_rows
                if r.video_id in held_out
            ]
            notes.append(
                f"no {VALIDATION_CSV}: {len(held_out)} clips of {train_csv.name} held out as validation"
            )
    rows["train"] = [row for row in train_rows if row.video_id not in held_out]
    _refuse_shared_with_test(rows)

    folder = _videos_folder(source)
    videos = _list_videos(folder)
    order = [split for split in ("train", "validation", "test") if split in rows]
    texts = [source / ANNOTATIONS, *dict.fromkeys(row.file for split in order for row in rows[split])]
    return ClipSplits(
        splits={split: tuple(_clips(rows[split], split, folder, videos, problems)) for split in order},
        problems=tuple(problems),
        notes=tuple(notes),
        listed={split: len(rows[split]) for split in order},
        fingerprint=_fingerprint(texts, videos),
    )


def _clips(
    rows: Iterable[_Row],
    split: str,
    folder: Path,
    videos: dict[str, tuple[Path, int]],
    problems: list[Problem],
) -> Iterator[Clip]:
    for row in rows:
        record = f"line {row.line}, video_id {row.video_id!r}"
        if row.video_id not in videos:
            names = ", ".join(row.video_id + suffix for suffix in VIDEO_SUFFIXES)
            reason = f"none of {names} is in {folder}"
            problems.append(Problem("missing_video", split, row.file.name, record, reason))
            continue
        if row.captions is None:
            reason = f"{ANNOTATIONS} has no usable caption of it; left out"
            problems.append(Problem("no_caption", split, row.file.name, record, reason))
            continue
        good = []
        for caption in row.captions:
            kind, reason = _check_caption(caption)
            if kind:
                problems.append(Problem(kind, split, row.file.name, record, reason))
            if kind in ("", "long_caption"):
                good.append(" ".join(caption.split()))
        if good:
            yield Clip(
                row.video_id, videos[row.video_id][0], tuple(good), f"{row.file.name}, line {row.line}"
            )


def _check_caption(caption: str) -> tuple[str, str]:
    """(kind of problem or "", reason)."""
    words = len(caption.split())
    if not words:
        return "empty_caption", "the caption is empty; left out"
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        return "bad_caption", f"the caption is not valid Unicode ({error.reason}); left out"
    if words > LONG_CAPTION_WORDS:
        return "long_caption", f"a caption of {words} words; kept, the tokenizer will cut it"
    return "", ""


def _read_sentences(path: Path, problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    """video_id -> its captions in the order of the file. Empty ones are noted and left out."""
    data = checked.read_json(path)
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
        kind, reason = _check_caption(caption)
        if kind in ("empty_caption", "bad_caption"):
            problems.append(Problem(kind, "", path.name, f"sentences[{k}], video_id {video_id!r}", reason))
        else:
            captions.setdefault(video_id, []).append(caption)
    return {video_id: tuple(c) for video_id, c in captions.items()}


def _read_list(path: Path, caption_column: str | None = None) -> list[_Row]:
    columns = ("video_id", caption_column) if caption_column else ("video_id",)
    seen: dict[str, str] = {}
    rows = []
    for line, values in checked.read_csv(path, columns):
        video_id, where = values["video_id"].strip(), f"{path}, line {line}"
        checked.check_file_stem(video_id, where)
        checked.check_unique(video_id, where, seen)
        rows.append(_Row(video_id, path, line, (values[caption_column],) if caption_column else None))
    return rows


def _hold_out(rows: list[_Row], count: int, file: Path) -> set[str]:
    if count < 0 or 2 * count > len(rows):
        raise ValueError(
            f"num_validation={count} of the {len(rows)} clips in {file}: hold out at most half of them, or "
            f"write {VALIDATION_CSV} beside it"
        )
    ids = (row.video_id for row in rows)
    return set(sorted(ids, key=lambda i: hashlib.sha256(f"validation {i}".encode()).digest())[:count])


def _refuse_shared_with_test(rows: dict[str, list[_Row]]) -> None:
    test = {row.video_id: row for row in rows["test"]}
    for row in (row for split in rows.keys() - {"test"} for row in rows[split]):
        if row.video_id in test:
            other = test[row.video_id]
            raise FormatError(
                f"{row.file}, line {row.line}: the id {row.video_id!r} is also a test clip "
                f"({other.file.name}, line {other.line}); take it out of one of them"
            )


def _videos_folder(source: Path) -> Path:
    for folder in (source / name for name in VIDEO_FOLDERS):
        if folder.is_dir() and any(
            entry.name.lower().endswith(VIDEO_SUFFIXES) for entry in os.scandir(folder)
        ):
            return folder
    raise FileNotFoundError(
        f"{source}: no videos; expected files named {{video_id}}.mp4, .webm or .avi in one of "
        f"{', '.join(VIDEO_FOLDERS)}"
    )


def _list_videos(folder: Path) -> dict[str, tuple[Path, int]]:
    """video_id -> (file, bytes). Where an id has several files the order of VIDEO_SUFFIXES decides."""
    found: dict[str, tuple[int, Path, int]] = {}
    for entry in os.scandir(folder):
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() in VIDEO_SUFFIXES:
            rank = VIDEO_SUFFIXES.index(suffix.lower())
            if stem not in found or rank < found[stem][0]:
                size = entry.stat().st_size if entry.is_file() else -1
                found[stem] = (rank, Path(entry.path), size)
    return {stem: (path, size) for stem, (_, path, size) in found.items()}


def _fingerprint(texts: Iterable[Path], videos: dict[str, tuple[Path, int]]) -> str:
    digest = hashlib.sha256()
    for path in texts:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for _, (path, size) in sorted(videos.items()):
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
