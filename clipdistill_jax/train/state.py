"""Everything that training changes, in one record."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clipdistill_jax.train import sharding
from clipdistill_jax.train.optimizers import Optimizer

Init = Callable[[Any], tuple[Any, Any]]  # key -> (params, model_state)


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds. What does not change (a teacher) is not in here.

    Attributes:
      step: int32 scalar, the number of steps done.
      params: the trained parameters, float32, any tree.
      model_state: collections that the forward pass changes (batch statistics), any tree.
      opt_state: the optimizer's.
      ema: an exponential moving average of `params`, or None.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any = None

    @property
    def eval_params(self) -> Any:
        """The averaged parameters where they are kept, else the parameters."""
        return self.params if self.ema is None else self.ema


def abstract(
    init: Init,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    rules: Sequence[sharding.Rule] = (),
    fsdp_min_size: int = sharding.FSDP_MIN_SIZE,
    ema: bool = False,
) -> TrainState:
    """The state's shapes, dtypes and shardings, without an array: see `create`."""
    tree = jax.eval_shape(lambda key: _build(init, optimizer, ema, key), jax.random.key(0))

    def place(part: Any) -> Any:
        return sharding.infer_sharding(part, mesh, rules, fsdp_min_size)

    params = place(tree.params)
    shardings = TrainState(
        step=sharding.replicated(mesh),
        params=params,
        model_state=place(tree.model_state),
        opt_state=sharding.like_params(tree.opt_state, tree.params, params, mesh),
        ema=params if ema else None,
    )
    return sharding.shape_structs(tree, shardings)


def create(init: Init, optimizer: Optimizer, mesh: Mesh, key: Any, **placement: Any) -> TrainState:
    """Initialises the state where it will live: no device ever holds more than its part.

    Args:
      init: key -> (params, model_state). Runs under jit; give it no read weights (see `with_params`).
      optimizer: from `optimizers.make_optimizer`.
      mesh: from `sharding.make_mesh`.
      key: a JAX random key.
      **placement: `rules`, `fsdp_min_size` and `ema`, as in `abstract`.
    """
    template = abstract(init, optimizer, mesh, **placement)
    ema = bool(placement.get("ema", False))
    with jax.set_mesh(mesh):
        build = jax.jit(lambda key: _build(init, optimizer, ema, key), out_shardings=shardings_of(template))
        return build(key)


def _build(init: Init, optimizer: Optimizer, ema: bool, key: Any) -> TrainState:
    params, model_state = init(key)
    # The average is a copy: the step donates its input, and no buffer can be donated twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(0), params, model_state, optimizer.init(params), average)


def shardings_of(state: TrainState) -> TrainState:
    """The state's tree with each array replaced by its sharding."""
    return jax.tree.map(lambda x: x.sharding, state)


def with_params(state: TrainState, params: Any, model_state: Any = None) -> TrainState:
    """The state with weights that were read from elsewhere (and their average, if one is kept).

    Args:
      state: a new state; its optimizer has not stepped.
      params: host arrays, the same tree and shapes as `state.params`.
      model_state: likewise; None keeps what is there.

    Raises:
      ValueError: the tree, a shape or a dtype differs; names the first paths.
    """

    def place(new: Any, old: Any) -> Any:
        check_same(new, old)
        return sharding.place_tree(new, jax.tree.map(lambda x: x.sharding, old))

    return dataclasses.replace(
        state,
        params=place(params, state.params),
        model_state=state.model_state if model_state is None else place(model_state, state.model_state),
        ema=None if state.ema is None else place(params, state.ema),
    )


def check_same(found: Any, expected: Any, limit: int = 5) -> None:
    """Raises ValueError where two trees differ in paths, shapes or dtypes, naming the first `limit`."""
    lines = differences(signature(found), signature(expected))
    if lines:
        raise ValueError("the parameters do not fit the model:\n  " + "\n  ".join(lines[:limit]))


def signature(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """path -> (shape, dtype name)."""
    leaves = sharding.named_leaves(tree)
    return {name: (tuple(x.shape), jnp.dtype(x.dtype).name) for name, x in leaves.items()}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for each path at which two signatures differ."""
    lines = []
    for name in [*expected, *(n for n in found if n not in expected)]:
        if found.get(name) != expected.get(name):
            lines.append(f"{name}: expected {_say(expected.get(name))}, found {_say(found.get(name))}")
    return lines


def _say(entry: Any) -> str:
    return "nothing" if entry is None else f"{entry[1]}{list(entry[0])}"
