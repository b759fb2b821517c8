"""What every reader gives: clips by split, and what was wrong."""

import dataclasses
from pathlib import Path


class FormatError(ValueError):
    """A file does not have the structure of its format. The message names the file and the record."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video file and what people say of it.

    Attributes:
      video_id: the dataset's name of the clip, unique within the dataset.
      path: the video file.
      captions: one or more captions, none of them empty.
      record: where the clip is listed, e.g. "MSRVTT_train.9k.csv, line 17".
      seconds: the captions speak of the first so many seconds, later frames are not the clip's; None: of all.
    """

    video_id: str
    path: Path
    captions: tuple[str, ...]
    record: str
    seconds: float | int | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A record that was left out (or noted) while the rest of the dataset is good.

    Attributes:
      kind: one of "missing_video", "unreadable_video", "empty_caption", "bad_caption", "long_caption",
        "no_caption", "missing_image", "unreadable_image", "missing_regions".
      split: the split it belongs to, "" where the file does not say.
      file: the file at fault.
      record: the record in words: line, position, video_id.
      reason: what is wrong.
    """

    kind: str
    split: str
    file: str
    record: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ClipSplits:
    """What a reader gives.

    Attributes:
      splits: clips by split name, in the order of the files.
      problems: what was left out or noted, in the order found.
      notes: decisions of the reader that change the splits, in words.
      listed: clips that each split lists, readable or not.
      fingerprint: hash of the annotation files' contents and of the names and sizes of the videos.
    """

    splits: dict[str, tuple[Clip, ...]]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    listed: dict[str, int]
    fingerprint: str
