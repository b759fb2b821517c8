"""SIGTERM: the machine will be taken away; save, and leave."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(RuntimeError):
    """Training stopped at a signal, after a save. A process that ends for it exits with `exit_code`."""

    exit_code = 128 + signal.SIGTERM

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by SIGTERM after step {step}; start the same command again to go on")
        self.step = step


class Preemption:
    """Listens for SIGTERM as a context manager.

    Alone, a process sets a flag in a handler. Among several, `jax.distributed` has its own handler, which
    makes all hosts agree on the step to stop at: that one is left in place.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._previous: Any = None
        self._alone = jax.process_count() == 1
        self._installs = self._alone and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Preemption":
        if self._installs:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
        return self

    def __exit__(self, *_: Any) -> None:
        if self._installs:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; the same answer on every host. Call once a step."""
        if self._alone:
            return self._flag.is_set()
        return bool(multihost_utils.reached_preemption_sync_point(step))
