"""Writes clips once as ArrayRecord (through TFDS): JPEG frames and captions, decoded by many processes."""

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds  # imports TensorFlow only when it writes

from clipdistill_jax.data.formats import Clip
from clipdistill_jax.data.graph import import_tensorflow
from clipdistill_jax.data.video import VideoFrames, VideoOptions
from clipdistill_jax.data.workers import Decoded, decode_clips

_ALL_FRAMES = 10_000  # the most that VideoOptions allows


class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Records of one dataset, written once in the order of their sources.

    They read back with `tfds.builder_from_directory(...)` alone, in the order written.

    Attributes:
      stored: the features of a record.
    """

    code_path = None  # no checksum or citation files lie beside this class
    VERSION = tfds.core.Version("1.0.0")
    stored: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, *, sources: Mapping[str, Callable[[], Iterator[dict[str, Any]]]], data_dir: Path):
        self._sources = sources
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    def _info(self) -> Any:
        features = tfds.features.FeaturesDict(dict(self.stored))
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self._sources}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(self._sources[split]())


class ClipRecords(Records, skip_registration=True):  # type: ignore[call-arg]
    """Clips of one dataset, each stored once with all its captions."""

    name = "clips"
    stored = {
        "video_id": tfds.features.Text(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "frames": tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg")),
        "timestamps": tfds.features.Sequence(tfds.features.Scalar(np.float32)),
    }


def write(kind: type[Records], data_dir: Path, sources: Mapping[str, Callable[[], Iterator[Any]]]) -> None:
    """Writes the records of all splits under `data_dir`; they appear there as a whole or not at all.

    Args:
      kind: whose `name` is the folder that is made, with 1.0.0 in it.
      data_dir: folder of the TFDS dataset.
      sources: split -> what gives its records.
    """
    import_tensorflow()  # before TFDS does, so that it leaves the accelerators alone
    tfds.disable_progress_bar()  # the caller shows its own
    builder = kind(sources=sources, data_dir=data_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints of downloads, and there are none
        builder.download_and_prepare()


def write_records(
    clips: Mapping[str, Iterable[Clip]],
    data_dir: Path,
    options: VideoOptions,
    *,
    workers: int,
    on_clip: Callable[[str, Clip, Decoded], None],
) -> None:
    """Decodes and writes all splits under `data_dir`; appears there as a whole or not at all.

    Args:
      clips: clips by split.
      data_dir: folder of the TFDS dataset; `clips/1.0.0` is made in it.
      options: how frames are taken.
      workers: decoding processes.
      on_clip: called in order with (split, clip, its frames or the error) for each clip; a clip with an error
        is not written. What it raises stops the job.

    Raises:
      ValueError: a split has no readable clip.
    """

    def source(split: str) -> Iterator[dict[str, Any]]:
        empty = True
        listed = tuple(clips[split])
        # Of a clip whose captions speak of its first seconds, frames are chosen among those.
        part = any(clip.seconds is not None for clip in listed)
        decoding = dataclasses.replace(options, max_frames=_ALL_FRAMES) if part else options
        for clip, found in decode_clips(listed, decoding, workers=workers):
            decoded = _first_seconds(found, clip.seconds, options.max_frames) if part else found
            on_clip(split, clip, decoded)
            if isinstance(decoded, VideoFrames):
                empty = False
                yield {
                    "video_id": clip.video_id,
                    "captions": list(clip.captions),
                    "frames": list(decoded.frames),
                    "timestamps": list(decoded.timestamps),
                }
        if empty:
            raise ValueError(f"the split {split!r} has no readable clip")

    sources = {split: (lambda split=split: source(split)) for split in clips}
    write(ClipRecords, data_dir, sources)


def _first_seconds(decoded: Decoded, seconds: float | int | None, max_frames: int) -> Decoded:
    """At most `max_frames` of the frames up to `seconds`, uniformly chosen as `read_frames` does."""
    if not isinstance(decoded, VideoFrames):
        return decoded
    end = math.inf if seconds is None else seconds + 5e-4  # containers round times to their clock
    count = sum(time <= end for time in decoded.timestamps)
    # As many as there are, or max_frames of them from the first to the last.
    keep = np.linspace(0, count - 1, min(count, max_frames)).astype(int)
    return VideoFrames(tuple(decoded.frames[k] for k in keep), tuple(decoded.timestamps[k] for k in keep))
