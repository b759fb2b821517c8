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
# (one_pass, params, model_state, batch, rng, step, targets) -> what the loss function returns, with
# one_pass(task, params, model_state, batch, rng, step, targets) -> (loss, (metrics, model_state, Features))
Adversary = Callable[..., tuple[Any, Any]]
_MASK = 1 << 16  # where the terms' random numbers start; the student's chunks count from 0


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


def teacher_of(term: nn.Module) -> str:
    """Which frozen model a term compares the student with: "teacher", or "clip" for raw CLIP."""
    return term.of  # type: ignore[attr-defined]


def check_terms(terms: tuple[WeightedTerm, ...], student: Features, teachers: Mapping[str, Features]) -> None:
    """Raises ValueError, with both names, where a term needs a model or a field that is not given."""
    for item in terms:
        needs, of = item.term.needs, teacher_of(item.term)  # type: ignore[attr-defined]
        needs = (*needs, *getattr(item.gate, "needs", ()))
        if of not in teachers:
            raise ValueError(
                f"term {item.name!r} compares with `{of}`, and the stage names none: set its {of!r}"
            )
        for who, features in (("student", student), (of, teachers[of])):
            missing = [field for field in needs if field not in features.given()]
            if missing:
                raise ValueError(
                    f"term {item.name!r} needs {', '.join(missing)} of the {who}, which gives only "
                    f"{', '.join(sorted(features.given()))}"
                )


def init_terms(
    terms: tuple[WeightedTerm, ...], key: Array, student: Features, teachers: Mapping[str, Features]
) -> dict[str, Any]:
    """Projections of every term that has some: {term name: params}."""
    valid = jnp.ones(len(next(x for x in jax.tree.leaves(student) if x.ndim)), bool)
    made = {}
    for i, item in enumerate(terms):
        rngs = {"params": jax.random.fold_in(key, i), "mask": key}
        made[item.name] = item.term.init(rngs, student, teachers[teacher_of(item.term)], valid).get("params")
    return {name: params for name, params in made.items() if params}


def distillation_loss(
    task: Callable[[Features, Batch], tuple[Float[Array, " b"], Bool[Array, " b"], Mapping[str, Any]]],
    terms: tuple[WeightedTerm, ...],
    student: Student,
    teachers: Mapping[str, Teach],
    distil_on: Callable[[Features, Batch], Bool[Array, " b"]] | None = None,
    adversary: Adversary | None = None,
):
    """The trainer's loss function.

    Args:
      task: (features, batch) -> per-example loss [B], valid [B], more per-example metrics; a metric that
        counts for other examples than the loss is a pair (values, which).
      terms: what to distil.
      student: (params, model_state, batch, rng) -> (Features, new model_state).
      teachers: by name, (variables, batch) -> Features; run without gradient.
      distil_on: (features, batch) -> the examples that the terms count; None: the task's valid ones. With
        more than those, questions without labels are distilled too.
      adversary: how the whole sum is perturbed; None: not at all.

    Returns:
      loss_fn(params, model_state, frozen, batch, rng, step) -> (loss, (metrics, new model_state)) with
      params = {"student": ..., "terms": {term: projections}} and frozen the teachers' variables by name.

    Raises:
      ValueError: a term compares with a model that is not among `teachers`.
    """
    if missing := {teacher_of(t.term) for t in terms} - set(teachers):
        raise ValueError(f"terms {', '.join(t.name for t in terms)} need {', '.join(missing)}: none is given")

    def one_pass(task, params, model_state, batch, rng, step, targets):
        features, new_state = student(params["student"], model_state, batch, rng)
        values, valid, extra = task(features, batch)
        metrics: Metrics = {
            name: mean_of_valid(*value) if isinstance(value, tuple) else mean_of_valid(value, valid)
            for name, value in extra.items()
        }
        total, count = metrics["task_loss"] = mean_of_valid(values, valid)
        loss = total / jnp.maximum(count, 1)
        distilled = valid if distil_on is None else distil_on(features, batch)
        for i, item in enumerate(terms):
            target = targets[teacher_of(item.term)]
            variables = {"params": params["terms"].get(item.name, {})}
            rngs = {} if rng is None else {"mask": jax.random.fold_in(rng, _MASK + i)}
            values = item.term.apply(variables, features, target, distilled, rngs=rngs)
            if item.gate is not None:
                gate = jax.lax.stop_gradient(item.gate(features, target))
                metrics[f"{item.name}_gate"] = mean_of_valid(gate, distilled)
                values = values * gate
            total, count = metrics[f"{item.name}_loss"] = mean_of_valid(values, distilled)
            loss = loss + item.weight(step) * total / jnp.maximum(count, 1)
        return loss, (metrics, new_state, features)

    def loss_fn(params, model_state, frozen, batch, rng, step):
        # Once a step, however many passes an adversary makes.
        targets = {
            name: jax.lax.stop_gradient(teach(frozen[name], batch)) for name, teach in teachers.items()
        }
        if adversary is None:
            loss, (metrics, new_state, _) = one_pass(task, params, model_state, batch, rng, step, targets)
            return loss, (metrics, new_state)
        return adversary(one_pass, params, model_state, batch, rng, step, targets)

    return loss_fn
