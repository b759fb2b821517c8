"""Batches are pulled from the pipeline and copied to the devices while the last step still runs."""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from clipdistill_jax.train.sharding import place_batch


class Placed(NamedTuple):
    """A batch on the devices.

    Attributes:
      size: its examples over all hosts.
      ids: of this host's.
      new: it is the first of its shape.
    """

    arrays: dict[str, Any]
    size: int
    ids: np.ndarray | None
    new: bool = False


class Prefetcher:
    """An iterator of `Placed` batches, filled by a thread. Use it as a context manager.

    Args:
      batches: yields dicts of NumPy arrays, this process's rows.
      mesh: where they go.
      depth: how many wait on the devices at most.
      first_step: number of the first batch's step, for messages.
      id_key: entry that holds example ids; a batch may lack it.
      shapes: most shapes that batches may have; a step compiles once for each.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        mesh: Mesh,
        depth: int = 2,
        first_step: int = 1,
        id_key: str = "example_id",
        shapes: int = 1,
    ) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._args = (batches, mesh, first_step, id_key, shapes)
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Placed:
        """Raises what went wrong in the pipeline; StopIteration at its end."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _fill(self) -> None:
        batches, mesh, step, id_key, most = self._args
        seen: list[dict[str, str]] = []
        try:
            for batch in batches:
                found = _shapes(batch)
                new = found not in seen
                if new and len(seen) == most:
                    _refuse(found, seen[-1], step)
                seen += [found] if new else []
                placed = place_batch(batch, mesh)
                size = next(iter(placed.values())).shape[0]
                ids = np.asarray(batch[id_key]) if id_key in batch else None
                if not self._put(Placed(placed, size, ids, new)):
                    return
                step += 1
            self._put(StopIteration())
        except BaseException as error:  # carried to the thread that waits
            self._put(error)
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _shapes(batch: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{np.asarray(x).dtype}{list(np.shape(x))}" for name, x in batch.items()}


def _refuse(found: dict[str, str], seen: dict[str, str], step: int) -> None:
    name = next(name for name in {**seen, **found} if found.get(name) != seen.get(name))
    raise ValueError(
        f"batch[{name!r}] is {found.get(name, 'missing')} at step {step}, but was "
        f"{seen.get(name, 'missing')} before: the step would compile again. Pad batches to fewer shapes"
    )
