"""A few fixed shapes for items of different lengths, and which items a step holds."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

# Padding of all that is computed of questions like VCR's (four choices of 8 to 55 tokens with their question,
# 12 to 101 regions): 6 shapes 25%, 10 shapes 21%, 14 shapes 19%, 24 shapes 16%, 40 shapes 14%. Of it 7% is
# there with any number of shapes, for the choices of a question are laid out in one length, that of the
# longest. The rest, 12% with 14 shapes, is the shapes': tokens and regions vary apart, so they have to cover
# a plane. Each shape is one more compilation of the step, so there are no more of them than these.
BUCKETS = 14
_LEVELS = 36  # lengths of each kind that a shape can have
_SWEEPS = 8


class Shape(NamedTuple):
    """What a batch is padded to: tokens of a text, regions of an image."""

    tokens: int
    regions: int


def choose_shapes(lengths: Int[np.ndarray, "n 2"], most: int) -> tuple[Shape, ...]:
    """At most `most` shapes such that each item fits one and few places are padding; smallest first.

    An item counts for T + N places of the smallest shape (by T + N) that holds it. Starting with the shape
    that holds all, the shape that saves most is added again and again; then each is replaced by a better one
    while there is any. Lengths that a shape can have are at most 36 quantiles of each kind. A pure function
    of the lengths, whatever their order.

    Args:
      lengths: tokens and regions of each item.
      most: shapes.

    Raises:
      ValueError: there is no item, or `most` is not positive.
    """
    if most < 1:
        raise ValueError(f"buckets={most} must be at least 1")
    if not len(lengths):
        raise ValueError("there are no items to choose batch shapes for")
    levels = [_levels(column) for column in lengths.T]
    cells = np.stack(
        [np.searchsorted(level, column) for level, column in zip(levels, lengths.T, strict=True)]
    )
    grid = np.zeros(tuple(map(len, levels)), np.int64)
    np.add.at(grid, tuple(cells), 1)
    t, n = (index.ravel() for index in np.indices(grid.shape))
    counts = grid.ravel()
    size = levels[0][t] + levels[1][n]
    used = counts > 0
    # Cost of each cell in each shape: [cells, shapes].
    fits = (t[used, None] <= t) & (n[used, None] <= n)
    cost = np.where(fits, size, np.iinfo(np.int64).max // 2)
    weight = counts[used, None]

    def total(best: np.ndarray) -> np.ndarray:
        """Cost with each further shape, given each cell's best so far."""
        return (np.minimum(best[:, None], cost) * weight).sum(0)

    chosen = [len(size) - 1]
    while len(chosen) < most:
        best = cost[:, chosen].min(1)
        found = total(best)
        if found.min() >= (best[:, None] * weight).sum():
            break
        chosen.append(int(found.argmin()))
    for _ in range(_SWEEPS):
        before = list(chosen)
        for k in range(1, len(chosen)):
            others = chosen[:k] + chosen[k + 1 :]
            chosen[k] = int(total(cost[:, others].min(1)).argmin())
        if chosen == before:
            break
    shapes = {Shape(int(levels[0][t[k]]), int(levels[1][n[k]])) for k in chosen}
    return tuple(sorted(shapes, key=lambda shape: (sum(shape), shape)))


def _levels(column: np.ndarray) -> np.ndarray:
    values = np.unique(column)
    if len(values) <= _LEVELS:
        return values
    quantiles = np.quantile(column, np.linspace(0, 1, _LEVELS + 1)[1:], method="higher")
    return np.unique(quantiles)


def shape_of(lengths: Int[np.ndarray, "n 2"], shapes: Sequence[Shape]) -> Int64[np.ndarray, " n"]:
    """The first of the shapes, which are sorted by size, that holds each item.

    Raises:
      ValueError: an item fits none.
    """
    table = np.array(shapes)
    fits = np.all(lengths[:, None] <= table, axis=-1)
    if not fits.any(1).all():
        worst = lengths[~fits.any(1)][0].tolist()
        raise ValueError(f"an item of {worst[0]} tokens and {worst[1]} regions fits none of {list(shapes)}")
    return fits.argmax(1)


def padding(tokens: Int[np.ndarray, "n k"], regions: Int[np.ndarray, " n"], shapes: Sequence[Shape]) -> float:
    """Share of the places of all sequences that are padding where each item is in its own shape.

    A sequence is the T tokens of one of an item's K choices and its N regions.
    """
    own = shape_of(np.stack([tokens.max(1), regions], axis=1), shapes)
    padded = np.array(shapes)[own].sum() * tokens.shape[1]
    return float(1 - (tokens + regions[:, None]).sum() / padded)


def full_batches(
    items: Int64[np.ndarray, " n"], bucket: Int64[np.ndarray, " n"], shapes: Sequence[Shape], size: int
) -> tuple[Int64[np.ndarray, "b s"], Int64[np.ndarray, " b"]]:
    """Items, in an order, as batches of one shape each.

    What does not fill a batch of a shape goes to the smallest shape that holds it, so only the last batch of
    the largest shape can have room: -1 stands there.

    Args:
      items: in the order that each shape's batches take them.
      bucket: shape of each item.
      shapes: sorted by size; the last holds all items.
      size: items of a batch.

    Returns:
      The batches, and the shape of each.
    """
    table = np.array(shapes)
    waiting = [items[bucket == k] for k in range(len(shapes))]
    batches, kinds = [], []
    for k, found in enumerate(waiting):
        full = len(found) // size * size
        rest = found[full:]
        if len(rest) and k + 1 < len(shapes):
            larger = next(j for j in range(k + 1, len(shapes)) if (table[j] >= table[k]).all())
            waiting[larger] = np.concatenate([rest, waiting[larger]])
        elif len(rest):
            rest = np.concatenate([rest, np.full(size - len(rest), -1, np.int64)])
            found, full = np.concatenate([found[:full], rest]), full + size
        batches.append(found[:full].reshape(-1, size))
        kinds.append(np.full(full // size, k, np.int64))
    return np.concatenate(batches), np.concatenate(kinds)


def evaluation_rows(
    bucket: Int64[np.ndarray, " n"],
    shapes: Sequence[Shape],
    batch_size: int,
    process_index: int,
    process_count: int,
) -> tuple[Int64[np.ndarray, " steps"], Int64[np.ndarray, "steps b"]]:
    """Every item once, shape by shape: the shape of each step, and this host's items.

    -1 - k stands for item k on a row that only fills the last batch.
    """
    order = np.arange(len(bucket), dtype=np.int64)
    batches, kinds = full_batches(order, bucket, shapes, batch_size)
    filled = np.where(batches < 0, -1 - batches[:, :1], batches)
    return kinds, filled.reshape(len(batches), process_count, -1)[:, process_index]


class QuestionPlan:
    """The endless sequence of batches that training walks through; each is a pure function of its step.

    n items make floor((e + 1) n / B) - floor(e n / B) batches in epoch e: where B does not divide n, some
    items are put off to the next epoch, so that every batch is full and nothing is dropped: each item comes
    once an epoch, one put off at most an epoch late. Which items are put off, the order of the rest and the
    order of the batches, shapes among each other, are drawn from (seed, epoch).
    """

    def __init__(
        self,
        bucket: Int64[np.ndarray, " n"],
        shapes: Sequence[Shape],
        *,
        items: Int64[np.ndarray, " m"] | None = None,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Plans.

        Args:
          bucket: shape of each item of the split.
          shapes: sorted by size; the last holds all items.
          items: those to draw from; all of them when None.
          batch_size: B, rows of a step on all hosts together.
          seed: of the order.
          process_index: this host.
          process_count: hosts; host p takes rows [p b, (p + 1) b) of each step, b = B / process_count.

        Raises:
          ValueError: there are fewer items than rows in a batch.
        """
        self.items = np.arange(len(bucket), dtype=np.int64) if items is None else items
        if batch_size > len(self.items):
            raise ValueError(f"batch_size={batch_size} is more than the {len(self.items)} items")
        self.shapes = tuple(shapes)
        self._bucket, self._size, self._seed = bucket, batch_size, seed
        per_host = batch_size // process_count
        self._columns = slice(process_index * per_host, (process_index + 1) * per_host)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def rows(self, step: int) -> tuple[int, Int64[np.ndarray, " b"]]:
        """(index of the shape, this host's items) of a step."""
        # The last epoch that begins at or before this step: floor(e n / B) <= step.
        epoch = ((step + 1) * self._size - 1) // len(self.items)
        batches, kinds = self._epoch(epoch)
        k = step - self._start(epoch)
        return int(kinds[k]), batches[k, self._columns]

    def _start(self, epoch: int) -> int:
        return epoch * len(self.items) // self._size

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The items of an epoch in its order, and at its end those that are put off."""
        drawn = np.random.default_rng((self._seed, 0, epoch)).permutation(self.items)
        put_off = (epoch + 1) * len(self.items) % self._size
        return drawn[: len(drawn) - put_off], drawn[len(drawn) - put_off :]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        now, _ = self._order(epoch)
        if epoch:
            now = np.concatenate([self._order(epoch - 1)[1], now])
        batches, kinds = full_batches(now, self._bucket[now], self.shapes, self._size)
        order = np.random.default_rng((self._seed, 1, epoch)).permutation(len(batches))
        return batches[order], kinds[order]
