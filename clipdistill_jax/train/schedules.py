"""Numbers that change with the step: learning rates, and the weights of loss terms.

A schedule is a function of the step (0 for the first) that can be traced. The shapes come from optax;
this file names them for configs.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How a number changes. The warm-up rises in a line from 0 at step 0 to `value` at its end.

    Attributes:
      kind: "constant", "cosine", "linear" (both down to `end` at the last step) or "steps".
      value: the peak.
      end: what "cosine" and "linear" reach.
      warmup_steps: length of the warm-up; or
      warmup_fraction: the same as a fraction of all steps.
      rescale: for "cosine": True starts the cosine where the warm-up ends. False keeps it a function of
        all steps, 0.5 (1 + cos(pi step / steps)), so that the rate jumps a little below the peak: what
        CLIP4Clip does (modules/optimization.py, warmup_cosine).
      boundaries: for "steps": the value is multiplied by `factor` at each of these steps.
      factor: see `boundaries`.
    """

    kind: str = "constant"
    value: float = 1.0
    end: float = 0.0
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    rescale: bool = True
    boundaries: tuple[int, ...] = ()
    factor: float = 0.1


def make_schedule(config: Any, steps: int) -> Schedule:
    """A schedule over `steps` steps, from a number (constant), a `ScheduleConfig` or a mapping of its fields.

    Raises:
      ValueError: an unknown kind or field, or a warm-up given twice or longer than the run.
    """
    if isinstance(config, int | float):
        config = ScheduleConfig(value=config)
    schedule: ScheduleConfig = from_mapping(ScheduleConfig, config)
    warmup = _warmup_steps(schedule, steps)
    peak, end, rest = schedule.value, schedule.end, max(steps - warmup, 1)
    kinds: dict[str, Callable[[], Schedule]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: _cosine(peak, end, rest),
        "steps": lambda: optax.piecewise_constant_schedule(
            peak, {int(boundary) - warmup: schedule.factor for boundary in schedule.boundaries}
        ),
    }
    if schedule.kind not in kinds:
        raise ValueError(f"schedule kind {schedule.kind!r} is not one of {', '.join(kinds)}")
    if schedule.kind == "cosine" and not schedule.rescale:
        whole = _cosine(peak, end, steps)
        after: Schedule = lambda step: whole(step + warmup)  # noqa: E731
    else:
        after = kinds[schedule.kind]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _cosine(peak: float, end: float, steps: int) -> Schedule:
    def schedule(step: Any) -> Array:
        done = jnp.clip(step / steps, 0.0, 1.0)
        return end + (peak - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    return schedule


def _warmup_steps(config: ScheduleConfig, steps: int) -> int:
    if config.warmup_steps and config.warmup_fraction:
        raise ValueError("a schedule takes warmup_steps or warmup_fraction, not both")
    warmup = config.warmup_steps or round(config.warmup_fraction * steps)
    if not 0 <= warmup <= steps:
        raise ValueError(f"a warm-up of {warmup} steps does not fit into a run of {steps}")
    if any(boundary < warmup for boundary in config.boundaries):
        raise ValueError(f"boundaries {config.boundaries} start inside the warm-up of {warmup} steps")
    return warmup


def from_mapping(cls: Any, config: Any) -> Any:
    """`cls(**config)` for a dataclass `cls`, with the nearest right name where a field is unknown."""
    if isinstance(config, cls):
        return config
    known = [field.name for field in dataclasses.fields(cls)]
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{cls.__name__} has no field {name!r}{hint} (it has {', '.join(known)})")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in config.items()})
