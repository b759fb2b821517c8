"""Batches of clips and captions from prepared records; each a pure function of its step."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from clipdistill_jax.data import graph, index
from clipdistill_jax.data.plan import (
    FRAME_SAMPLING,
    FrameChoice,
    Rows,
    TrainingPlan,
    check_ids,
    check_sizes,
    padded_ids,
)
from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.workers import available_cores

CAPTION_MODES = ("all", "one")


class _Split:
    """A split in memory: its captions as ids, and which clip each belongs to. Frames stay on disk."""

    def __init__(self, directory: Path, name: str, tokenizers: dict[str, Tokenizer], max_tokens: int):
        self.index = index.read_index(directory, name)
        self.captions_per_clip = np.array([len(captions) for captions in self.index.captions], np.int64)
        self.frames_per_clip = np.array(self.index.num_frames, np.int64)
        self.captions = [caption for captions in self.index.captions for caption in captions]
        clips = np.arange(len(self.index.captions), dtype=np.int32)
        self.clip_of_caption = np.repeat(clips, self.captions_per_clip)
        self.text = {
            f"{prefix}{field}": array
            for prefix, tokenizer in tokenizers.items()
            for field, array in tokenizer.encode(self.captions, max_tokens)._asdict().items()
        }
        self.records = graph.open_records(directory, name)
        if len(self.records) != len(self.index.video_ids):
            raise ValueError(
                f"{directory}: {len(self.records)} records of {name!r} where the index lists "
                f"{len(self.index.video_ids)}: remove the folder and prepare again"
            )


class RetrievalData:
    """A prepared dataset as batches for text-video retrieval.

    A batch is a dictionary of NumPy arrays; B examples, F frames, T tokens, uint8 RGB frames of H x W:
      frames uint8 [B, F, H, W, 3], frame_mask bool [B, F]: frames in time order, padded with zeros
      tokens int32 [B, T], token_mask bool [B, T], word_ids int32 [B, T]: see `data.text.Tokens`
      student_tokens, student_token_mask, student_word_ids: of the student's tokenizer, where it has its own
      example_id int32 [B]: the caption's index in the split; clip_id int32 [B]: the clip's
      mask bool [B]: False on the rows that fill an evaluation's last batch

    Iterators end their threads when they are dropped; `close()` does it at once.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 32,
        student: Tokenizer | None = None,
        num_threads: int | None = None,
    ):
        """Opens a folder that `clipdistill_jax.prepare` made. Splits are loaded at their first use.

        Args:
          directory: the prepared folder.
          tokenizer: encodes the captions, once a split.
          max_tokens: T, with BOS and EOT (CLIP4Clip uses 32 on MSR-VTT).
          student: encodes them once more, for a student that reads other tokens; word i is the same in both.
          num_threads: threads that decode frames; one a core when None.

        Raises:
          FileNotFoundError: the folder is not prepared.
        """
        self.directory = Path(directory)
        self.manifest = index.read_manifest(directory)
        self._tokenizers = {"": tokenizer, **({"student_": student} if student else {})}
        self._max_tokens = max_tokens
        self._num_threads = num_threads or available_cores()
        self._loaded: dict[str, _Split] = {}

    def _split(self, name: str) -> _Split:
        if name not in self._loaded:
            self._loaded[name] = _Split(self.directory, name, self._tokenizers, self._max_tokens)
        return self._loaded[name]

    def _decoded(
        self, steps: range, rows: Callable[[int], Rows], split: _Split, choice: FrameChoice, image_size: int
    ) -> graph.StoppingIterator:
        return graph.decoded_steps(
            steps, rows, split.records, choice, image_size=image_size, num_threads=self._num_threads
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.manifest["splits"])

    def video_ids(self, split: str) -> tuple[str, ...]:
        """The dataset's name of each clip, by clip_id."""
        return self._split(split).index.video_ids

    def captions(self, split: str) -> list[str]:
        """All captions, by example_id."""
        return self._split(split).captions

    def clip_of_caption(self, split: str) -> np.ndarray:
        """int32 [captions]: clip_id by example_id."""
        return self._split(split).clip_of_caption

    def fingerprint(self, split: str) -> str:
        """Of the split's frames and captions as they are fed: the prepared data, and the captions' ids."""
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        for name, array in sorted(self._split(split).text.items()):
            digest.update(f"{name} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()[:16]

    def num_items(self, split: str = "train", captions: str = "all") -> int:
        """Items of an epoch: captions ("all") or clips ("one")."""
        _check_choice("captions", captions, CAPTION_MODES)
        return len(self.captions(split) if captions == "all" else self.video_ids(split))

    def batches(
        self,
        start_step: int = 0,
        *,
        batch_size: int,
        num_frames: int,
        image_size: int,
        split: str = "train",
        seed: int = 0,
        captions: str = "all",
        shuffle: bool = True,
        frame_sampling: str = "uniform",
        max_clips: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches from step `start_step` on; those of a step are the same wherever one starts.

        Args:
          start_step: the first step.
          batch_size: examples of a step on all hosts together; this host gets its 1/process_count of them.
          num_frames: F. "uniform": of n > F stored frames those at linspace(0, n-1, F), truncated, as
            CLIP4Clip does; all frames, zero padded, where there are fewer.
          image_size: H = W. The centre square of the stored frames, shrunk where they are larger: prepare at
            the size you train with, for the resize costs more than the decoding.
          split: the split to draw from.
          seed: of order, captions and frames.
          captions: "all": an epoch has every caption once; "one": every clip once, with its captions in turn.
          shuffle: a new order each epoch; else the stored one.
          frame_sampling: "uniform", or "random": F frames drawn for each item anew, in time order.
          max_clips: only the first of the split's clips, and their captions; None = all.
          process_index: this host.
          process_count: hosts. They take consecutive parts of each step's batch.

        Raises:
          ValueError: an argument is out of range.
          KeyError: there is no such split.
        """
        _check_choice("captions", captions, CAPTION_MODES)
        _check_choice("frame_sampling", frame_sampling, FRAME_SAMPLING)
        check_sizes(batch_size, process_index, process_count, num_frames=num_frames, image_size=image_size)
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must not be negative")
        if max_clips is not None and max_clips < 1:
            raise ValueError(f"max_clips={max_clips} must be at least 1, or None for all clips")
        loaded = self._split(split)
        plan = TrainingPlan(
            captions_per_clip=loaded.captions_per_clip[:max_clips],
            one_caption=captions == "one",
            shuffle=shuffle,
            seed=seed,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
        )
        if batch_size > plan.num_items:
            raise ValueError(f"batch_size={batch_size} is more than the {plan.num_items} items of {split!r}")
        choice = FrameChoice(loaded.frames_per_clip, num_frames, frame_sampling, seed)
        steps = range(start_step, sys.maxsize)
        read = self._decoded(steps, plan.rows, loaded, choice, image_size)
        return graph.StoppingIterator(_with_text(row, loaded) for row in read)

    def eval_clips(
        self,
        split: str,
        *,
        batch_size: int,
        num_frames: int,
        image_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Every clip once, in order: frames, frame_mask, clip_id, mask. Arguments as in `batches`.

        The last batch is filled with rows of mask False, clip_id -1 and no frames; all hosts get equally many
        batches.
        """
        check_sizes(batch_size, process_index, process_count)
        count = len(self.video_ids(split))
        ids = padded_ids(count, batch_size, process_index, process_count)
        return self.clip_batches(split, ids, num_frames=num_frames, image_size=image_size)

    def clip_batches(
        self, split: str, ids: np.ndarray, *, num_frames: int, image_size: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of the clips ids [batches, b]: frames, frame_mask, clip_id, mask; see `batches`.

        An id of -1 gives a row of mask False without frames.

        Raises:
          ValueError: an argument is out of range, an id too.
        """
        check_sizes(1, 0, 1, num_frames=num_frames, image_size=image_size)
        loaded = self._split(split)
        check_ids("clip", ids, len(loaded.index.video_ids))
        choice = FrameChoice(loaded.frames_per_clip, num_frames)

        def rows(step: int) -> Rows:
            return Rows(np.full_like(ids[step], -1), ids[step], ids[step])

        read = self._decoded(range(len(ids)), rows, loaded, choice, image_size)
        return graph.StoppingIterator(
            {
                "frames": frames,
                "frame_mask": frame_mask,
                "clip_id": clip.astype(np.int32),
                "mask": clip >= 0,
            }
            for _, clip, frames, frame_mask in read
        )

    def eval_captions(
        self, split: str, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Every caption once, in order: tokens, token_mask, word_ids, example_id, clip_id, mask.

        The last batch is filled with rows of mask False, whose ids are -1 and whose text is the split's first
        caption; all hosts get equally many batches.
        """
        check_sizes(batch_size, process_index, process_count)
        count = len(self.captions(split))
        return self.caption_batches(split, padded_ids(count, batch_size, process_index, process_count))

    def caption_batches(self, split: str, ids: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Batches of the captions ids [batches, b]: tokens ..., example_id, clip_id, mask.

        An id of -1 gives a row of mask False with the split's first caption.

        Raises:
          ValueError: an id is out of range.
        """
        loaded = self._split(split)
        check_ids("caption", ids, len(loaded.captions))
        return (_caption_batch(row, loaded) for row in ids)


def _caption_batch(ids: np.ndarray, split: _Split) -> dict[str, np.ndarray]:
    rows = np.maximum(ids, 0)
    return {
        **{name: value[rows] for name, value in split.text.items()},
        "example_id": ids.astype(np.int32),
        "clip_id": np.where(ids >= 0, split.clip_of_caption[rows], -1).astype(np.int32),
        "mask": ids >= 0,
    }


def _with_text(row: tuple[np.ndarray, ...], split: _Split) -> dict[str, np.ndarray]:
    caption, clip, frames, frame_mask = row
    return {
        "frames": frames,
        "frame_mask": frame_mask,
        **{name: value[caption] for name, value in split.text.items()},
        "example_id": caption.astype(np.int32),
        "clip_id": clip.astype(np.int32),
        "mask": np.ones(len(caption), bool),
    }


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
