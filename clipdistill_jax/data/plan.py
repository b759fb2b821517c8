"""Which items a step holds: pure functions of the step number."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

FRAME_SAMPLING = ("uniform", "random")


class Rows(NamedTuple):
    """One host's part of a step, b rows.

    Attributes:
      caption: int64 [b], index of the caption in the split; -1 where no text is wanted.
      clip: int64 [b], index of the clip in the split; -1 on rows that only fill a batch.
      position: int64 [b], place in the endless sequence of items.
    """

    caption: np.ndarray
    clip: np.ndarray
    position: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingPlan:
    """The endless sequence of items that training walks through, epoch after epoch.

    An epoch is a permutation of all items, drawn from (seed, epoch). Step s holds positions s B to
    s B + B - 1 of the sequence, so a batch may span two epochs and no item is dropped. Each epoch's
    permutation is drawn whole (4 ms for 180,000 items) rather than item by item with
    tf.random.experimental.index_shuffle, which favours some orders when its seeds are small integers.

    Attributes:
      captions_per_clip: int [clips], each at least 1.
      one_caption: an item is a clip with one of its captions, else every caption is an item. A clip shows its
        n captions in turn, starting with one drawn from (seed, clip): each once in n epochs.
      shuffle: whether to permute.
      seed: of the order and of the captions.
      batch_size: B, rows of a step on all hosts together.
      process_index: this host.
      process_count: hosts; host p takes rows [p b, (p + 1) b) of each step, b = B / process_count.
    """

    captions_per_clip: np.ndarray
    one_caption: bool
    shuffle: bool
    seed: int
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    @functools.cached_property
    def _first_caption(self) -> np.ndarray:
        return np.cumsum(self.captions_per_clip) - self.captions_per_clip

    @functools.cached_property
    def _clip_of_caption(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.captions_per_clip)), self.captions_per_clip)

    @functools.cached_property
    def _start_caption(self) -> np.ndarray:
        return np.random.default_rng((self.seed, 1)).integers(self.captions_per_clip)

    @functools.cached_property
    def _order(self) -> "functools._lru_cache_wrapper[np.ndarray]":
        def draw(epoch: int) -> np.ndarray:
            return np.random.default_rng((self.seed, 0, epoch)).permutation(self.num_items)

        return functools.lru_cache(maxsize=2)(draw)  # a step touches two epochs at most

    @property
    def num_items(self) -> int:
        """Items of an epoch."""
        return len(self.captions_per_clip) if self.one_caption else int(np.sum(self.captions_per_clip))

    def rows(self, step: int) -> Rows:
        """This host's rows of a step."""
        size = self.batch_size // self.process_count
        position = step * self.batch_size + self.process_index * size + np.arange(size, dtype=np.int64)
        epoch, item = np.divmod(position, self.num_items)
        if self.shuffle:
            for e in np.unique(epoch):
                item[epoch == e] = self._order(int(e))[item[epoch == e]]
        if not self.one_caption:
            return Rows(item, self._clip_of_caption[item], position)
        turn = (self._start_caption[item] + epoch) % self.captions_per_clip[item]
        return Rows(self._first_caption[item] + turn, item, position)


@dataclasses.dataclass(frozen=True, eq=False)
class FrameChoice:
    """Which stored frames of a clip are used.

    Attributes:
      frames_per_clip: int [clips], stored frames of each.
      num_frames: F, wanted. Where a clip has n <= F all are used; of more:
      sampling: "uniform": those at np.linspace(0, n - 1, F, dtype=int), as CLIP4Clip takes with
        slice_framepos=2; "random": F drawn from (seed, position), in time order.
      seed: of "random".
    """

    frames_per_clip: np.ndarray
    num_frames: int
    sampling: str = "uniform"
    seed: int = 0

    def choose(self, clip: np.ndarray, position: np.ndarray) -> np.ndarray:
        """int64 [b, F] frame indices for clips [b] at positions [b]; -1 where there is no further frame."""
        chosen = np.full((len(clip), self.num_frames), -1, np.int64)
        for row in np.flatnonzero(clip >= 0):
            stored = int(self.frames_per_clip[clip[row]])
            if stored <= self.num_frames:
                chosen[row, :stored] = np.arange(stored)
            elif self.sampling == "uniform":
                chosen[row] = np.linspace(0, stored - 1, self.num_frames, dtype=int)
            else:
                draw = np.random.default_rng((self.seed, 2, int(position[row])))
                chosen[row] = np.sort(draw.choice(stored, self.num_frames, replace=False))
        return chosen


def padded_ids(count: int, batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """int64 [batches, b]: 0 .. count-1 in order over all hosts, then -1; this host's columns."""
    batches = -(-count // batch_size)
    ids = np.full(batches * batch_size, -1, np.int64)
    ids[:count] = np.arange(count)
    return ids.reshape(batches, process_count, -1)[:, process_index]


def check_ids(what: str, ids: np.ndarray, count: int) -> None:
    """Raises ValueError for ids that are not [batches, b], or not in -1 .. count - 1."""
    if ids.ndim != 2 or ids.size and not (ids.min() >= -1 and ids.max() < count):
        raise ValueError(f"{what} ids {ids.shape} must be [batches, b] and lie in -1 .. {count - 1}")


def check_sizes(batch_size: int, process_index: int, process_count: int, **sizes: Any) -> None:
    """Raises ValueError for a batch size, a process or another named size out of range."""
    for name, value in {"batch_size": batch_size, "process_count": process_count, **sizes}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must lie in 0 .. {process_count - 1}")
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must divide over the {process_count} processes")
