"""Saving and restoring: a small interface over Orbax's asynchronous checkpointer.

A state is stored flat, as path -> array, so that a checkpoint can be read without the code that wrote it.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clipdistill_jax.train import manifest as manifests
from clipdistill_jax.train.manifest import CheckpointError
from clipdistill_jax.train.sharding import first_host_says, named_leaves
from clipdistill_jax.train.state import differences, signature

__all__ = ["CheckpointError", "Checkpointer", "NullCheckpointer", "SaveAndRestore", "load"]


@runtime_checkable
class SaveAndRestore(Protocol):
    """What the loop needs of a checkpointer."""

    def latest(self) -> int | None: ...
    def check(self, template: Any, step: int) -> None: ...
    def restore(self, template: Any, step: int) -> Any: ...
    def manifest(self, step: int) -> dict[str, Any]: ...
    def improves(self, metrics: Mapping[str, float]) -> bool: ...
    def save(self, step: int, state: Any, metrics: Mapping[str, float], extra: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NullCheckpointer:
    """Saves nothing and finds nothing."""

    def latest(self) -> int | None:
        return None

    def check(self, template: Any, step: int) -> None:
        raise CheckpointError(f"this run keeps no checkpoints: there is no step {step}")

    def restore(self, template: Any, step: int) -> Any:
        raise CheckpointError(f"this run keeps no checkpoints: there is no step {step}")

    def manifest(self, step: int) -> dict[str, Any]:
        raise CheckpointError(f"this run keeps no checkpoints: there is no step {step}")

    def improves(self, metrics: Mapping[str, float]) -> bool:
        return False

    def save(self, step: int, state: Any, metrics: Mapping[str, float], extra: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Checkpointer:
    """Checkpoints of one run in one directory (local, or gs:// and the like). Every host calls every method.

    Args:
      directory: made when missing.
      keep: how many of the latest to keep; the best by `best_metric` is kept beside them.
      best_metric: name of a validation metric, or None.
      best_mode: "max" or "min".
      identity: json-able facts that a run must share with the checkpoint it resumes from (say, the
        fingerprint of its teacher). Another value is refused.
      info: json-able facts that are only written down.
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: str = "max",
        identity: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        if keep < 1 or best_mode not in ("max", "min"):
            raise ValueError(f"keep is at least 1 and best_mode is max or min; got {keep=}, {best_mode=}")
        self.root = epath.Path(directory).expanduser().resolve()
        self.best_metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        self._keep = keep
        self._identity = _jsonable(identity)
        self._info = _jsonable(info)
        self._saving: dict[str, Any] | None = None  # the manifest of the save under way
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        if jax.process_index() == 0:
            self.root.mkdir(parents=True, exist_ok=True)

    def manifest(self, step: int) -> dict[str, Any]:
        """What checkpoint `step` says of itself. Raises CheckpointError where it is not whole."""
        return manifests.read(self.root / manifests.step_name(step))

    def latest(self) -> int | None:
        """The newest whole step, or None. Unfinished ones are passed over with a warning that names them."""
        self.wait()
        return first_host_says(max(manifests.whole_steps(self.root, warn=True), default=None))

    def best(self) -> int | None:
        """The step with the best validation metric among those kept, or None."""
        self.wait()
        values = self._values(manifests.whole_steps(self.root))
        return first_host_says(max(values, key=lambda step: (values[step], step), default=None))

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether `metrics` beat the best checkpoint, or are the first. False without `best_metric`.

        Raises:
          ValueError: the metric was not evaluated, or is not a number.
        """
        if self.best_metric is None:
            return False
        if not math.isfinite(metrics.get(self.best_metric, math.nan)):
            names = ", ".join(metrics) or "no metrics"
            raise ValueError(f"best_metric {self.best_metric!r} is missing or not finite; evaluated: {names}")
        self.wait()
        best = max(self._values(manifests.whole_steps(self.root)).values(), default=-math.inf)
        return bool(first_host_says(self._sign * metrics[self.best_metric] > best))

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save `state` as `step` and returns when it may be changed; one save at a time.

        Args:
          step: names the checkpoint.
          state: a tree of global arrays.
          metrics: of the last evaluation, if it was of this state.
          extra: json-able; comes back in the manifest.

        Raises:
          CheckpointError: there is a whole checkpoint of this step already.
        """
        self.wait()
        directory = self.root / manifests.step_name(step)
        if jax.process_index() == 0:
            self._make_room(directory)
        self._saving = manifests.compose(
            step,
            signature(state),
            identity=self._identity,
            info=self._info,
            metrics=_jsonable(metrics),
            extra=_jsonable(extra),
        )
        self._orbax.save(directory, args=ocp.args.PyTreeSave(named_leaves(state)))

    def restore(self, template: Any, step: int) -> Any:
        """The state of `step`, placed as `template` says.

        Args:
          template: tree of `ShapeDtypeStruct`s with shardings (`state.abstract`), for any number of devices.
          step: from `latest()` or `best()`.

        Raises:
          CheckpointError: the checkpoint is not whole, has another tree, shape or dtype, or another identity.
        """
        self.wait()
        self.check(template, step)
        flat = _read(self.root / manifests.step_name(step), named_leaves(template))
        return jax.tree.unflatten(jax.tree.structure(template), list(flat.values()))

    def check(self, template: Any, step: int) -> None:
        """Raises CheckpointError where `restore` would, without reading an array."""
        manifest, where = self.manifest(step), self.root / manifests.step_name(step)
        for name in sorted({*self._identity, *manifest["identity"]}):
            found, expected = manifest["identity"].get(name), self._identity.get(name)
            if found != expected:
                raise CheckpointError(
                    f"checkpoint {where} was written with {name} = {found!r}, but this run has {expected!r}. "
                    f"Set it back, or train in another directory"
                )
        found = {name: (tuple(a["shape"]), a["dtype"]) for name, a in manifest["arrays"].items()}
        lines = differences(found, signature(template))
        if lines:
            more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
            raise CheckpointError(
                f"checkpoint {where} does not fit this run: the config changed, or the directory is another "
                "run's. Set the config back, or train in another directory.\n  "
                + "\n  ".join(lines[:5] + more)
            )

    def wait(self) -> None:
        """Waits for the save under way; raises what went wrong in it."""
        self._orbax.wait_until_finished()
        self._saving = None

    def close(self) -> None:
        """Finishes the last save and removes what need not be kept."""
        self.wait()
        if jax.process_index() == 0:
            self._prune()
        self._orbax.close()

    def _values(self, steps: Sequence[int]) -> dict[int, float]:
        name, metrics = self.best_metric, {step: self.manifest(step)["metrics"] for step in steps}
        return {step: self._sign * values[name] for step, values in metrics.items() if name in values}

    def _write_manifest(self) -> None:
        # Runs in Orbax's thread on the first host, when the arrays are written and not yet renamed.
        assert self._saving is not None
        name = manifests.step_name(self._saving["step"])
        temporary = [path for path in manifests.unfinished_saves(self.root) if path.name.startswith(name)]
        manifests.write(temporary[0] if temporary else self.root / name, self._saving)

    def _make_room(self, directory: epath.Path) -> None:
        for path in manifests.unfinished_saves(self.root):
            path.rmtree()
        if directory.exists():
            try:
                manifests.read(directory)
            except CheckpointError as error:
                logging.warning("writing it again: %s", error)
                directory.rmtree()
            else:
                raise CheckpointError(f"checkpoint {directory} exists: resume from it, or train elsewhere")
        self._prune()

    def _prune(self) -> None:
        whole = manifests.whole_steps(self.root)
        values = self._values(whole)
        kept = {*whole[-self._keep :], max(values, key=lambda step: (values[step], step), default=-1)}
        for step in whole:
            if step not in kept:
                directory = self.root / manifests.step_name(step)
                (directory / manifests.NAME).unlink()  # first: half-deleted must not look whole
                directory.rmtree()


def newest(directory: Any) -> int:
    """The step of the newest whole checkpoint.

    Raises:
      FileNotFoundError: there is none.
    """
    root = epath.Path(directory).expanduser().resolve()
    step = max(manifests.whole_steps(root, warn=True), default=None)
    if step is None:
        raise FileNotFoundError(f"no whole checkpoint in {root}")
    return step


def load(
    directory: Any, step: int | None = None, parts: Sequence[str] = ("params", "model_state", "ema")
) -> dict[str, Any]:
    """Reads parts of a state from a checkpoint as NumPy arrays, for evaluation and export.

    Args:
      directory: of the run's checkpoints.
      step: None takes the newest whole one.
      parts: fields of the state; those that it does not have are left out.

    Returns:
      part -> nested dict of arrays, in float32 as trained.
    """
    root = epath.Path(directory).expanduser().resolve()
    where = root / manifests.step_name(newest(root) if step is None else step)
    arrays = {
        name: jax.ShapeDtypeStruct(tuple(a["shape"]), np.dtype(a["dtype"]))
        for name, a in manifests.read(where)["arrays"].items()
        if name.split("/")[0] in parts
    }
    tree: dict[str, Any] = {}
    for name, value in _read(where, arrays, numpy=True).items():
        *path, leaf = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def _read(directory: epath.Path, arrays: dict[str, Any], numpy: bool = False) -> dict[str, Any]:
    """path -> array, as `arrays` says; any other array in the checkpoint is left unread."""
    if numpy:
        args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in arrays}
    else:
        args = ocp.checkpoint_utils.construct_restore_args(arrays)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            found = reader.restore(
                directory, args=ocp.args.PyTreeRestore(item=arrays, restore_args=args, partial_restore=True)
            )
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"checkpoint {directory} cannot be read: {error}") from error
    return {name: found[name] for name in arrays}


def _jsonable(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """As it will be after a round through JSON, so that a tuple equals the list that it becomes."""
    return json.loads(json.dumps(dict(values or {})))
