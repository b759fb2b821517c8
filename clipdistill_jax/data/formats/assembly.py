"""From the rows of a dataset's lists to its clips: what the readers share."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from clipdistill_jax.data.formats.clips import Clip, ClipSplits, FormatError, Problem

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv")  # the order in which they are looked for
# Suffixes of videos that a list may name in full, as DiDeMo's do.
NAMED_SUFFIXES = (".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp", ".3g2", ".mts", ".m2ts", ".flv", ".ogv")
LONG_CAPTION_WORDS = 75  # CLIP's context of 77 less its start and end tokens: longer is certainly cut


@dataclasses.dataclass(frozen=True)
class Row:
    """One clip as a dataset lists it.

    Attributes:
      video_id: the dataset's name of it.
      file: the list.
      place: where in the list, e.g. "line 17".
      captions: as they are written; None where `captions_file` has none of this clip.
      captions_file: name of the file that has the captions.
      names: file names of its video; the first that exists is taken.
      seconds: see `Clip`.
    """

    video_id: str
    file: Path
    place: str
    captions: tuple[str, ...] | None
    captions_file: str
    names: tuple[str, ...]
    seconds: float | int | None = None


def video_names(*stems: str) -> tuple[str, ...]:
    """File names of a video without its folder, for `Row.names`."""
    return tuple(stem + suffix for stem in stems for suffix in VIDEO_SUFFIXES)


def check_source(source: str | os.PathLike[str], expected: str) -> Path:
    """The folder of a raw tree.

    Raises:
      FileNotFoundError: there is none; the message says that it should hold `expected`.
    """
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; give the folder that holds {expected}")
    return source


def usable(caption: str, problems: list[Problem], split: str, file: str, record: str) -> bool:
    """Whether a caption says anything; if not, it is noted in `problems`."""
    kind, reason = _check_caption(caption)
    if kind in ("empty_caption", "bad_caption"):
        problems.append(Problem(kind, split, file, record, reason))
        return False
    return True


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


def with_validation(
    train: list[Row], validation: list[Row] | None, count: int, validation_file: str, notes: list[str]
) -> dict[str, list[Row]]:
    """Parts the train list where the dataset has no split to choose checkpoints by.

    Args:
      train: the train list.
      validation: the rows of `validation_file`; those that the train list also has leave it. None where there
        is no such file: `count` clips of the train list are held out, those whose hashed id is smallest (the
        same ones each time), each with its first caption, as a test list has one.
      count: clips held out; 0: there is no validation split.
      validation_file: our own name for the list, which the dataset does not have.
      notes: gets a line on what was done.

    Raises:
      ValueError: `count` is more than half of the train list.
    """
    if validation is not None:
        held_out = {row.video_id for row in validation}
        shared = sum(row.video_id in held_out for row in train)
        if shared:
            notes.append(f"{shared} clips of {validation_file} were taken out of the train split")
    else:
        file = train[0].file
        if count < 0 or 2 * count > len(train):
            raise ValueError(
                f"num_validation={count} of the {len(train)} clips in {file}: hold out at most half of them, "
                f"or write {validation_file} beside it"
            )
        ids = (row.video_id for row in train)
        hashed = sorted(ids, key=lambda i: hashlib.sha256(f"validation {i}".encode()).digest())
        held_out = set(hashed[:count])
        if held_out:
            notes.append(f"no {validation_file}: {count} clips of {file.name} held out as validation")
            validation = [
                dataclasses.replace(r, captions=r.captions and r.captions[:1])
                for r in train
                if r.video_id in held_out
            ]
    rows = {"train": [row for row in train if row.video_id not in held_out]}
    return rows if validation is None else {**rows, "validation": validation}


def assemble(
    rows: Mapping[str, list[Row]],
    source: Path,
    folders: Sequence[str],
    annotations: Sequence[Path],
    problems: list[Problem],
    notes: list[str],
    *,
    suffixes: Sequence[str] = VIDEO_SUFFIXES + NAMED_SUFFIXES,
) -> ClipSplits:
    """Joins rows and videos; opens no video.

    Args:
      rows: by split: "train", "validation" (if any) and "test".
      source: the raw tree.
      folders: folders under it that may hold the videos, at any depth; the first that does is taken.
      annotations: the files that were read beside those that the rows name.
      problems: what the reader found; gets what is found here.
      notes: decisions of the reader.
      suffixes: endings, in small letters, of the files that count as videos.

    Raises:
      FileNotFoundError: there are no videos.
      FormatError: a clip is in two splits.
    """
    order = [split for split in ("train", "validation", "test") if split in rows]
    _refuse_shared([(split, row) for split in reversed(order) for row in rows[split]])
    folder, videos = _find_videos(source, folders, suffixes, notes)
    texts = dict.fromkeys([*annotations, *(row.file for split in order for row in rows[split])])
    return ClipSplits(
        splits={split: tuple(_clips(rows[split], split, folder, videos, problems)) for split in order},
        problems=tuple(problems),
        notes=tuple(notes),
        listed={split: len(rows[split]) for split in order},
        fingerprint=_fingerprint(texts, videos),
    )


def _refuse_shared(rows: Iterable[tuple[str, Row]]) -> None:
    seen: dict[str, tuple[str, Row]] = {}
    for split, row in rows:
        other_split, other = seen.setdefault(row.video_id, (split, row))
        if other_split != split:
            raise FormatError(
                f"{row.file}, {row.place}: the id {row.video_id!r} is also a {other_split} clip "
                f"({other.file.name}, {other.place}); take it out of one of them"
            )


def _clips(
    rows: Iterable[Row],
    split: str,
    folder: Path,
    videos: Mapping[str, tuple[Path, int]],
    problems: list[Problem],
) -> Iterator[Clip]:
    for row in rows:
        record = f"{row.place}, video_id {row.video_id!r}"
        path = next((videos[name][0] for name in map(_key, row.names) if name in videos), None)
        if path is None:
            reason = f"none of {', '.join(row.names)} is in {folder}"
            problems.append(Problem("missing_video", split, row.file.name, record, reason))
            continue
        if row.captions is None:
            reason = f"{row.captions_file} has no usable caption of it; left out"
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
            where = f"{row.file.name}, {row.place}"
            yield Clip(row.video_id, path, tuple(good), where, row.seconds)


def _key(name: str) -> str:
    """A file name with its suffix in small letters: video1.MP4 serves where video1.mp4 is wanted."""
    stem, suffix = os.path.splitext(name)
    return stem + suffix.lower()


def _find_videos(
    source: Path, folders: Sequence[str], suffixes: Sequence[str], notes: list[str]
) -> tuple[Path, dict[str, tuple[Path, int]]]:
    """The folder of the videos, and `_key` -> (file, bytes) of each in it."""
    for folder in (source / name for name in folders):
        found: dict[str, tuple[Path, int]] = {}
        again: list[Path] = []
        for parent, inner, names in os.walk(folder):
            inner.sort()  # so that the same file is taken on every machine
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in suffixes:
                    path, key = Path(parent, name), _key(name)
                    if key in found:
                        again.append(path)
                    else:
                        found[key] = (path, path.stat().st_size if path.is_file() else -1)
        if again:
            first = found[_key(again[0].name)][0]
            notes.append(f"{len(again)} videos are there more than once; {first} is read, not {again[0]}")
        if found:
            return folder, found
    raise FileNotFoundError(
        f"{source}: no {'videos' if '.mp4' in suffixes else 'images'}; expected files such as "
        f"{{id}}{', '.join(suffixes[:3])} in one of {', '.join(folders)}, or in folders below"
    )


def _fingerprint(texts: Iterable[Path], videos: Mapping[str, tuple[Path, int]]) -> str:
    digest = hashlib.sha256()
    for path in texts:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for _, (path, size) in sorted(videos.items(), key=lambda item: os.path.splitext(item[0])):
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
