"""The training loop."""

import contextlib
import dataclasses
import faulthandler
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from clipdistill_jax.train.checkpoint import NullCheckpointer, SaveAndRestore
from clipdistill_jax.train.meter import Meter
from clipdistill_jax.train.preemption import Preempted, Preemption
from clipdistill_jax.train.prefetch import Prefetcher
from clipdistill_jax.train.sharding import first_host_says, named_leaves, shape_structs
from clipdistill_jax.train.state import TrainState, shardings_of
from clipdistill_jax.train.writers import MetricWriter, NullWriter


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to do what beside it.

    Attributes:
      steps: in all; a resumed run does what is left.
      log_every: steps between two lines of metrics. Here, and before evaluations and saves, a loss that
        is not finite is noticed.
      eval_every: steps between evaluations; None evaluates at the end only.
      save_every: steps between checkpoints; None does not count steps.
      save_minutes: the same by the first host's clock, looked at when metrics are logged.
      shapes: most shapes that batches may have; the step compiles once for each.
      unit: what a batch is made of: names `speed/<unit>_per_sec`.
      prefetch: batches that wait on the devices.
      hang_minutes: when a step takes longer, the stacks of all threads go to stderr; None does not watch.
      id_key: entry of the batch that names its examples in messages.
    """

    steps: int
    log_every: int = 50
    eval_every: int | None = None
    save_every: int | None = None
    save_minutes: float | None = None
    shapes: int = 1
    unit: str = "clips"
    prefetch: int = 2
    hang_minutes: float | None = None
    id_key: str = "example_id"


class Finished(NamedTuple):
    """The state at the end and the metrics of its evaluation."""

    state: TrainState
    metrics: dict[str, float]


def train(
    state: TrainState,
    step_fn: Callable[..., Any],
    batches: Callable[[int], Iterator[Mapping[str, Any]]],
    config: LoopConfig,
    mesh: Mesh,
    *,
    frozen: Any = None,
    writer: MetricWriter | None = None,
    checkpointer: SaveAndRestore | None = None,
    evaluate: Callable[[TrainState, int], dict[str, float]] | None = None,
) -> Finished:
    """Trains until `config.steps`, from where the run stands.

    Where it starts: (1) at the newest whole checkpoint of this run, if there is one; (2) else at `state`,
    as it was initialised or filled with read weights. A step is a function of its number, so the same
    command after a kill does what it would have done.

    Args:
      state: from `state.create`. Its buffers are consumed.
      step_fn: from `step.make_train_step`.
      batches: start -> iterator over the batches of steps start, start + 1, ... (0 is the first), each a
        dict of new NumPy arrays with this process's rows; a pure function of `start`. (On CPU a device
        array may share the memory of the host array it came from: do not fill a buffer again.)
      config: see `LoopConfig`.
      mesh: from `sharding.make_mesh`.
      frozen: passed to the step as it is (a teacher's parameters, already on the devices).
      writer: takes the metrics.
      checkpointer: saves; a new best by its metric is saved at once.
      evaluate: (state, step) -> metrics, the same on every host.

    Raises:
      NonFiniteError: with the step and examples. The newest checkpoint is from before it.
      Preempted: at SIGTERM, after a save.
      CheckpointError: the newest checkpoint is another model's, or another teacher's.
      ValueError: the batches end early or change shape, or `frozen` is not on the devices.
    """
    writer, checkpointer = writer or NullWriter(), checkpointer or NullCheckpointer()
    for name, leaf in named_leaves(frozen).items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"frozen {name} is a {type(leaf).__name__} on the host; see sharding.place_tree")
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(checkpointer.close)
        at_exit.callback(writer.close)
        start = checkpointer.latest()
        meter = Meter(config.unit)
        if start is not None:
            logging.info("resuming from step %d", start)
            manifest, state = checkpointer.manifest(start), _restore(state, start, checkpointer)
            if start >= config.steps:
                evaluated: dict[str, float] = manifest["metrics"]
                if evaluate and not evaluated:  # stopped by a signal between the last step and its evaluation
                    with jax.set_mesh(mesh):
                        evaluated = evaluate(state, start)
                return Finished(state, evaluated)
            meter.skipped = manifest["extra"]["skipped_steps"]
        start = start or 0
        writer.start(start, config.steps)
        at_exit.callback(faulthandler.cancel_dump_traceback_later)
        at_exit.enter_context(jax.set_mesh(mesh))
        preemption = at_exit.enter_context(Preemption())
        feed = Prefetcher(batches(start), mesh, config.prefetch, start + 1, config.id_key, config.shapes)
        at_exit.enter_context(feed)

        saved_at = time.monotonic()
        evaluated = {}
        for step in range(start + 1, config.steps + 1):
            if config.hang_minutes:
                faulthandler.dump_traceback_later(60 * config.hang_minutes, file=sys.__stderr__ or 2)
            with meter.waiting():
                batch = next(feed, None)
            if batch is None:
                raise ValueError(f"the batches ended before step {step} of {config.steps}")
            compiles = batch.new and step > start + 1  # the meter leaves the first step out itself
            with meter.pause() if compiles else contextlib.nullcontext():
                state, metrics = step_fn(state, frozen, batch.arrays)
            meter.add(step, batch.ids, batch.size, metrics)
            writer.advance(step)

            last, stop = step == config.steps, preemption.reached(step)
            log = last or stop or step % config.log_every == 0
            values = meter.report() if log else {}
            evaluated = {}
            if evaluate and not stop and (last or _every(config.eval_every, step)):
                with meter.pause():
                    evaluated = evaluate(state, step)
            if values or evaluated:
                writer.write(step, {**values, **evaluated})

            best = bool(evaluated) and checkpointer.improves(evaluated)
            late = False
            if log and config.save_minutes:
                late = bool(first_host_says(time.monotonic() - saved_at > 60 * config.save_minutes))
            if best or late or last or stop or _every(config.save_every, step):
                with meter.pause():
                    checkpointer.save(step, state, evaluated, {"skipped_steps": meter.skipped})
                saved_at = time.monotonic()
            if stop:
                raise Preempted(step)
        return Finished(state, evaluated)


def _restore(state: TrainState, step: int, checkpointer: SaveAndRestore) -> TrainState:
    template = shape_structs(state, shardings_of(state))
    checkpointer.check(template, step)
    for leaf in jax.tree.leaves(state):  # or memory would hold two states
        leaf.delete()
    return checkpointer.restore(template, step)


def _every(period: int | None, step: int) -> bool:
    return bool(period) and step % (period or 1) == 0
