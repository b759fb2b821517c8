"""Where numbers go: the terminal, metrics.jsonl, TensorBoard. The loop gives them to writers on every host;
`on_first_host` makes the others silent.
"""

import datetime
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@runtime_checkable
class MetricWriter(Protocol):
    """Takes the metrics of a run in the order of its steps."""

    def start(self, step: int, total: int) -> None:
        """A run of `total` steps begins, or goes on, after `step`."""

    def advance(self, step: int) -> None:
        """`step` is done (dispatched)."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Everything known at `step`; called at most once for each step."""

    def close(self) -> None:
        """The run ended, well or not."""


class NullWriter:
    """Writes nothing; the others fill in what they need."""

    def start(self, step: int, total: int) -> None: ...
    def advance(self, step: int) -> None: ...
    def write(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def on_first_host(make: Callable[[], MetricWriter]) -> MetricWriter:
    """`make()` on process 0, a `NullWriter` elsewhere."""
    return make() if jax.process_index() == 0 else NullWriter()


class MultiWriter(NullWriter):
    """Passes everything on to several writers."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self._writers = tuple(writers)

    def start(self, step: int, total: int) -> None:
        for writer in self._writers:
            writer.start(step, total)

    def advance(self, step: int) -> None:
        for writer in self._writers:
            writer.advance(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class JsonlWriter(NullWriter):
    """One JSON object a line. A run that resumes drops the lines after its step, and a torn last line."""

    def __init__(self, path: Any) -> None:
        self._path = pathlib.Path(path)

    def start(self, step: int, total: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if 0 <= _step_of(line) <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, self._path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN or infinity.
        clean = {name: float(v) if math.isfinite(v) else None for name, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class TensorBoardWriter(NullWriter):
    """Event files through tensorboardX, which needs no TensorFlow."""

    def __init__(self, directory: Any) -> None:
        self._directory = str(directory)
        self._writer: Any = None

    def start(self, step: int, total: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            raise ModuleNotFoundError("TensorBoard files need: pip install tensorboardX") from None
        self._writer = SummaryWriter(self._directory, purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            known = name.replace("@", "").replace(">", "")  # to TensorBoard
            if not math.isnan(value):  # of what nothing was counted
                self._writer.add_scalar(known, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class ConsoleWriter(NullWriter):
    """A progress bar on a terminal; elsewhere a plain line whenever there are numbers.

    Args:
      unit: what a batch is made of, as in `speed/clips_per_sec`.
      keys: training metrics to show beside the loss, without their "train/"; evaluations are always shown.
      console: a rich console; None writes to stderr.
    """

    def __init__(self, unit: str = "clips", keys: Sequence[str] = (), console: Console | None = None) -> None:
        self._unit, self._keys = unit, ("loss", *keys)
        self._console = console or Console(stderr=True)
        self._total = 0
        self._bar: Progress | None = None
        self._task: Any = None

    def start(self, step: int, total: int) -> None:
        self._total = total
        if self._console.is_terminal:
            said = TextColumn("{task.fields[said]}")
            self._bar = Progress(BarColumn(), MofNCompleteColumn(), said, console=self._console)
            self._task = self._bar.add_task("train", total=total, completed=step, said="compiling")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        said = self._summary(step, values)
        evaluated = {k: v for k, v in values.items() if not k.startswith(("train/", "speed/"))}
        if self._bar is not None and said:
            self._bar.update(self._task, said=said)
        elif said:
            self._print(f"step {step}/{self._total} ({step / max(self._total, 1):.0%})  {said}")
        if evaluated:
            self._print(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in evaluated.items()))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _summary(self, step: int, values: Mapping[str, float]) -> str:
        parts = [f"{key} {values['train/' + key]:.4g}" for key in self._keys if f"train/{key}" in values]
        if "train/learning_rate" in values:
            parts.append(f"lr {values['train/learning_rate']:.2e}")
        if f"speed/{self._unit}_per_sec" in values:
            parts.append(f"{values[f'speed/{self._unit}_per_sec']:.1f} {self._unit}/s")
        if "speed/data_wait" in values:
            parts.append(f"data wait {values['speed/data_wait']:.1%}")
        if values.get("speed/steps_per_sec"):
            left = round((self._total - step) / values["speed/steps_per_sec"])
            parts.append(f"eta {datetime.timedelta(seconds=left)}")
        return "  ".join(parts)
