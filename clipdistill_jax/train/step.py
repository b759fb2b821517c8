"""One training step: a pure function under jit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from clipdistill_jax.train import metrics as metrics_lib
from clipdistill_jax.train.optimizers import Optimizer
from clipdistill_jax.train.sharding import replicated
from clipdistill_jax.train.state import TrainState

# (params, model_state, frozen, batch, rng, step) -> (loss, (metrics, new model_state))
LossFn = Callable[..., tuple[Any, tuple[dict[str, metrics_lib.Pair], Any]]]
NAN_POLICIES = ("raise", "skip")


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    seed: int = 0,
    shardings: TrainState | None = None,
    ema_decay: float | None = None,
    nan_policy: str = "raise",
) -> Any:
    """Builds `step(state, frozen, batch) -> (state, metrics)`, jitted; the state's buffers are donated.

    Args:
      loss_fn: (params, model_state, frozen, batch, rng, step) -> (loss, (metrics, new_model_state)): the
        loss a scalar over the global batch, metrics name -> (sum, count). `rng` is
        `fold_in(key(seed), step)`: a step needs nothing but its number to be drawn again.
      optimizer: from `make_optimizer`.
      seed: of the run.
      shardings: of the state (`state.shardings_of`); the new state keeps them, so that the step compiles
        once. None lets XLA choose (one device).
      ema_decay: decay of `state.ema` a step; needed exactly where the state has one.
      nan_policy: what follows when the loss or the gradient is not finite. "raise": the step is applied
        and flagged; the loop stops. "skip": parameters, optimizer, model state and average stay as they
        were and the step counts towards no metric but `skipped`; the step counter goes on.

    Returns:
      The jitted function. Beside the loss's metrics it reports, as (sum, count) pairs: loss, grad_norm
      (before clipping), learning_rate, nonfinite, skipped. `frozen` (a teacher) is not donated or returned.

    Raises:
      ValueError: an unknown policy; or while tracing: an average without its decay or the reverse, a metric
        that is not a pair, another tree of model_state.
    """
    if nan_policy not in NAN_POLICIES:
        raise ValueError(f"nan_policy {nan_policy!r} is not one of {', '.join(NAN_POLICIES)}")

    def compute_loss(params: Any, state: TrainState, frozen: Any, batch: Any, rng: Any) -> Any:
        # Cuts the backward pass of parts that do not train.
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.lax.stop_gradient(x) if optimizer.frozen(path) else x, params
        )
        return loss_fn(params, state.model_state, jax.lax.stop_gradient(frozen), batch, rng, state.step)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, metrics_lib.Pair]]:
        if (state.ema is None) != (ema_decay is None):
            raise ValueError("ema_decay is given exactly when the state was created with ema=True")
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, (metrics, model_state)), grads = jax.value_and_grad(compute_loss, has_aux=True)(
            state.params, state, frozen, batch, rng
        )
        _check_pairs(metrics)
        before: Any = jax.tree.structure(state.model_state)
        if jax.tree.structure(model_state) != before:
            raise ValueError("the loss returned a model_state of another tree than it was given")
        grad_norm = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = jax.tree.map(lambda old, new: ema_decay * old + (1.0 - ema_decay) * new, state.ema, params)
        new = TrainState(state.step + 1, params, model_state, opt_state, ema)
        zero = metrics_lib.scalar(0)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {
            **metrics,
            "loss": metrics_lib.scalar(loss),
            "grad_norm": metrics_lib.scalar(grad_norm),
            "learning_rate": metrics_lib.scalar(optimizer.learning_rate(state.step)),
        }
        if nan_policy == "skip":
            new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state).replace(step=state.step + 1)
            metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)
        metrics["skipped" if nan_policy == "skip" else "nonfinite"] = metrics_lib.scalar(~finite)
        return new, {"skipped": zero, "nonfinite": zero, **metrics}

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    mesh = _mesh_of(shardings)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def _mesh_of(shardings: TrainState) -> Any:
    step = shardings.step
    if not isinstance(step, NamedSharding):
        raise ValueError(f"the state is placed by {step}, not on a mesh; make it with state.create")
    return step.mesh


def _check_pairs(metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        if not (isinstance(value, tuple) and len(value) == 2 and all(jnp.ndim(x) == 0 for x in value)):
            raise ValueError(f"metric {name!r} is not a (sum, count) pair of scalars")
        if name in ("loss", "grad_norm", "learning_rate", "nonfinite", "skipped"):
            raise ValueError(f"metric name {name!r} is the step's own; choose another")
