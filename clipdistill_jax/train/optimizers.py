"""AdamW and SGD with warm-up, clipping, weight decay where it belongs, and a learning rate for each part."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipdistill_jax.train.schedules import Schedule, from_mapping, make_schedule
from clipdistill_jax.train.sharding import named_leaves, path_name

# Biases, norm scales, the logit scale, position and class tables: decay would only pull them off their job.
# The last name counts (or the one before an nn.Embed's `embedding`), since norms of scanned layers are 2-D.
NO_DECAY = (
    r"(^|/)(bias|scale|logit_scale|gamma|beta)$",
    r"(^|/)[^/]*(pos|position|class|cls)[^/]*emb[^/]*(/embedding)?$",
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer, from a config file.

    Attributes:
      name: "adamw" (Loshchilov and Hutter 2019) or "sgd".
      learning_rate: a number or a `ScheduleConfig` (mapping).
      weight_decay: decoupled: each step takes lr * weight_decay * parameter off.
      no_decay: regexes of paths that do not decay, beside everything of fewer than two dimensions.
      multipliers: (regex, factor) pairs: the learning rate of the parameters whose path matches; the first
        match wins, others have 1. A factor of 0 freezes: no gradient, no optimizer state.
      clip_norm: the gradient of all trained parameters together is scaled down to this norm; None does not.
      b1, b2, eps: of AdamW.
      momentum, nesterov: of SGD.
    """

    name: str = "adamw"
    learning_rate: Any = 1e-3
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = NO_DECAY
    multipliers: Any = ()
    clip_norm: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation that is told the step, and what to report about it.

    Attributes:
      init: params -> state.
      update: (gradients, state, params, step=) -> (updates, state). The learning rate follows `step`, so
        that a step which is skipped does not shift the schedule.
      learning_rate: step -> rate, before multipliers.
      parts: one row a parameter: what `describe` prints.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    learning_rate: Schedule
    parts: Mapping[str, "Part"] = dataclasses.field(default_factory=dict)

    def frozen(self, path: Any) -> bool:
        """Whether the parameter at a key path does not train."""
        part = self.parts.get(path_name(path))
        return part is not None and part.multiplier == 0

    def describe(self) -> str:
        """A line a parameter: learning-rate multiplier, decay, shape, path."""
        rows = ["lr x      decay  shape               parameter"]
        for name, part in self.parts.items():
            rate = f"{part.multiplier:g}" if part.multiplier else "frozen"
            decay = "-" if not part.multiplier else "yes" if part.decays else "no"
            rows.append(f"{rate:8}  {decay:5}  {str(list(part.shape)):18}  {name}")
        return "\n".join(rows)


@dataclasses.dataclass(frozen=True)
class Part:
    """How one parameter trains."""

    shape: tuple[int, ...]
    multiplier: float
    decays: bool


def make_optimizer(config: Any, params: Any, steps: int) -> Optimizer:
    """The optimizer for a tree of parameters over `steps` steps.

    Args:
      config: an `OptimizerConfig`, or a mapping with some of its fields.
      params: arrays or shapes.
      steps: length of the run, for the schedule.

    Raises:
      ValueError: an unknown field or name, a multiplier whose regex decides nothing, a parameter that is
        not float32 (bfloat16 belongs to the model's compute, not to parameters or moments).
    """
    settings: OptimizerConfig = from_mapping(OptimizerConfig, config)
    parts = _parts(settings, params)
    schedule = make_schedule(settings.learning_rate, steps)

    def by_part(of: Callable[[Part], Any]) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: of(parts[path_name(path)]), params)

    directions = {
        "adamw": lambda: optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
        "sgd": lambda: optax.trace(settings.momentum, settings.nesterov),
    }
    if settings.name not in directions:
        raise ValueError(f"optimizer {settings.name!r} is not one of {', '.join(directions)}")
    # Masks are functions of the tree: frozen parameters are out of it when they are called.
    train = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        directions[settings.name](),
        optax.add_decayed_weights(settings.weight_decay, by_part(lambda part: part.decays)),
        _scale_by_rate(schedule, by_part(lambda part: part.multiplier)),
    )
    labels = by_part(lambda part: "train" if part.multiplier else "frozen")
    tx = optax.partition({"train": train, "frozen": optax.set_to_zero()}, labels)
    return Optimizer(tx.init, tx.update, schedule, parts)


def _parts(config: OptimizerConfig, params: Any) -> dict[str, Part]:
    given = config.multipliers
    multipliers = tuple(given.items() if hasattr(given, "items") else given)
    decided = dict.fromkeys((regex for regex, _ in multipliers), 0)
    parts = {}
    for name, leaf in named_leaves(params).items():
        if leaf.dtype != jnp.float32:
            raise ValueError(
                f"parameter {name} is {leaf.dtype}; parameters are float32, bfloat16 is for compute"
            )
        match = next(((regex, factor) for regex, factor in multipliers if re.search(regex, name)), None)
        if match:
            decided[match[0]] += 1
        decays = leaf.ndim >= 2 and not any(re.search(regex, name) for regex in config.no_decay)
        parts[name] = Part(tuple(leaf.shape), float(match[1]) if match else 1.0, decays)
    for regex, count in decided.items():
        if not count:
            raise ValueError(
                f"learning-rate multiplier {regex!r} decides for no parameter: nothing matches, or earlier "
                f"ones take it all. Parameters are named like {next(iter(parts), '(there are none)')!r}"
            )
    return parts


def _scale_by_rate(schedule: Schedule, multipliers: Any) -> optax.GradientTransformationExtraArgs:
    """Turns a direction into a step downhill: - rate(step) * multiplier * direction."""

    def update(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> tuple[Any, Any]:
        rate = schedule(step)

        def scale(factor: float, direction: Any) -> Any:
            return direction if isinstance(direction, optax.MaskedNode) else -rate * factor * direction

        return jax.tree.map(scale, multipliers, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
