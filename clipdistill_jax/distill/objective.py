"""The one sum that is trained: loss = task + sum_k weight_k(step) * gate_k[b] * term_k[b]."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipdistill_jax.models.features import Batch, Features

Metrics = dict[str, tuple[Array, Array]]
Student = Callable[[Any, Any, Batch, Any], tuple[Features, Any]]
Teach = Callable[[Any, Batch], Features]


@dataclasses.dataclass(frozen=True)
class WeightedTerm:
    """A term, its weight as a function of the step, and its gate ([B] in {0, 1}; None = always open)."""

    name: str
    term: nn.Module
    weight: Callable[[Any], Any]
    gate: Callable[[Features, Features], Float[Array, " b"]] | None = None


def mean_of_valid(values: Float[Array, " b"], valid: Bool[Array, " b"]) -> tuple[Array, Array]:
    """(sum, count) of the valid examples: the only place where examples are masked and averaged."""
    return jnp.sum(jnp.where(valid, values, 0.0)), jnp.sum(valid, dtype=jnp.float32)


def check_terms(terms: tuple[WeightedTerm, ...], student: Features, teacher: Features) -> None:
    """Raises ValueError, with both names, where a term needs a field that a model does not give."""
    for item in terms:
        needs = item.term.needs  # type: ignore[attr-defined]
        for who, features in (("student", student), ("teacher", teacher)):
            missing = [field for field in needs if field not in features.given()]
            if missing:
                raise ValueError(
                    f"term {item.name!r} needs {', '.join(missing)} of the {who}, which gives only "
                    f"{', '.join(sorted(features.given()))}"
                )


def init_terms(
    terms: tuple[WeightedTerm, ...], key: Array, student: Features, teacher: Features
) -> dict[str, Any]:
    """Projections of every term that has some: {term name: params}."""
    valid = jnp.ones(student.frame_mask.shape[0], bool)
    made = {
        item.name: item.term.init(jax.random.fold_in(key, i), student, teacher, valid).get("params")
        for i, item in enumerate(terms)
    }
    return {name: params for name, params in made.items() if params}


def distillation_loss(
    task: Callable[[Features, Batch], tuple[Float[Array, " b"], Bool[Array, " b"], Mapping[str, Array]]],
    terms: tuple[WeightedTerm, ...],
    student: Student,
    teacher: Teach | None,
):
    """The trainer's loss function.

    Args:
      task: (features, batch) -> per-example loss [B], valid [B], more per-example metrics.
      terms: what to distil; needs a teacher if not empty.
      student: (params, model_state, batch, rng) -> (Features, new model_state).
      teacher: (variables, batch) -> Features; run without gradient.

    Returns:
      loss_fn(params, model_state, frozen, batch, rng, step) -> (loss, (metrics, new model_state)) with
      params = {"student": ..., "terms": {term: projections}} and frozen the teacher's variables.
    """
    if terms and teacher is None:
        raise ValueError(f"terms {', '.join(t.name for t in terms)} need a teacher and none is given")

    def loss_fn(params, model_state, frozen, batch, rng, step):
        features, new_state = student(params["student"], model_state, batch, rng)
        values, valid, extra = task(features, batch)
        metrics: Metrics = {name: mean_of_valid(value, valid) for name, value in extra.items()}
        total, count = metrics["task_loss"] = mean_of_valid(values, valid)
        loss = total / jnp.maximum(count, 1)
        if terms and teacher is not None:
            target = jax.lax.stop_gradient(teacher(frozen, batch))
            for item in terms:
                variables = {"params": params["terms"].get(item.name, {})}
                values = item.term.apply(variables, features, target, valid)
                if item.gate is not None:
                    gate = jax.lax.stop_gradient(item.gate(features, target))
                    metrics[f"{item.name}_gate"] = mean_of_valid(gate, valid)
                    values = values * gate
                total, count = metrics[f"{item.name}_loss"] = mean_of_valid(values, valid)
                loss = loss + item.weight(step) * total / jnp.maximum(count, 1)
        return loss, (metrics, new_state)

    return loss_fn
