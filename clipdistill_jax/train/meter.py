"""What a stretch of steps measured: means, speed, share of time spent waiting for data, and bad numbers."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from clipdistill_jax.train import metrics as metrics_lib

# A step is dispatched when the one before the last is done: the device always has work queued, and
# never more than this many steps' batches.
IN_FLIGHT = 2


class NonFiniteError(FloatingPointError):
    """The loss or its gradient was not finite; `step` and `example_ids` say where."""

    def __init__(self, step: int, example_ids: list[int] | None, values: Mapping[str, float]) -> None:
        said = ", ".join(f"{name} {value:g}" for name, value in values.items())
        ids = _say_ids(example_ids)
        super().__init__(f"the loss or its gradient is not finite at step {step} ({said}); {ids}")
        self.step, self.example_ids = step, example_ids


class Meter:
    """Collects the metrics of steps without waiting for them, and the time between reports.

    Speed leaves out the first step (it compiles) and everything under `pause`.

    Args:
      unit: what a batch is made of.
      skipped: non-finite steps that were skipped so far.
    """

    def __init__(self, unit: str, skipped: int = 0) -> None:
        self.skipped = skipped
        self._unit = unit
        self._pending: list[tuple[int, Any, Any]] = []  # (step, ids, metrics still on the device)
        self._sums: dict[str, metrics_lib.Pair] = {}
        self._since: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._paused = self._waited = 0.0
        self._steps = self._units = 0
        if self._since is not None:
            self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here is not training. Checks the steps so far first: nothing bad is evaluated or saved."""
        self.check()
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, step: int, ids: np.ndarray | None, size: int, metrics: Any) -> None:
        """Takes a dispatched step of `size` examples."""
        self._pending.append((step, ids, metrics))
        if self._since is None:
            jax.block_until_ready(metrics)
            self._since = time.perf_counter()
            self._restart()
            return
        self._steps += 1
        self._units += size
        if len(self._pending) >= IN_FLIGHT:
            jax.block_until_ready(self._pending[-IN_FLIGHT][2])

    def check(self) -> None:
        """Waits for the steps so far. Raises NonFiniteError for the first that is not finite."""
        pending, self._pending = self._pending, []
        for (step, ids, _), metrics in zip(pending, jax.device_get([m for *_, m in pending]), strict=True):
            listed = None if ids is None else np.asarray(ids).tolist()
            if metrics["nonfinite"][0] > 0:
                values = {name: float(metrics[name][0]) for name in ("loss", "grad_norm")}
                raise NonFiniteError(step, listed, values)
            if metrics["skipped"][0] > 0:
                self.skipped += 1
                logging.warning("step %d was not finite and is skipped; %s", step, _say_ids(listed))
            self._sums = metrics_lib.merge([self._sums, metrics])

    def report(self) -> dict[str, float]:
        """The means and the speed since the last report."""
        self.check()
        values = {f"train/{name}": value for name, value in metrics_lib.finalize(self._sums).items()}
        values.pop("train/nonfinite", None)
        values["train/skipped"] = float(self.skipped)
        elapsed = time.perf_counter() - (self._since or 0.0) - self._paused
        if self._steps and elapsed > 0:
            values["speed/steps_per_sec"] = self._steps / elapsed
            values[f"speed/{self._unit}_per_sec"] = self._units / elapsed
            values["speed/data_wait"] = self._waited / elapsed
        self._sums = {}
        self._restart()
        return values


def _say_ids(ids: list[int] | None) -> str:
    return "the batch names no examples" if ids is None else f"example ids {ids}"
