"""VILLA's noise around all that a student of questions learns from: its task and its distillation."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from clipdistill_jax.distill.objective import Adversary
from clipdistill_jax.models.features import Features
from clipdistill_jax.systems.system import Config
from clipdistill_jax.tasks import adversarial

DELTAS = {adversarial.WORDS: "token_delta", adversarial.REGIONS: "region_delta"}  # the student's inputs


def villa(
    stage: Config, task: adversarial.Task, answered: Callable[[Features], Features], width: int
) -> Adversary:
    """The adversary that a stage's `adversarial` describes.

    Args:
      stage: its config.
      task: what the student learns beside distillation.
      answered: features -> those with `logits` as the task reads them.
      width: of the word embeddings.

    Raises:
      ValueError: a preset or a field is not there.
    """
    given = dict(stage["adversarial"])
    preset = given.pop("preset", None)
    if preset not in (None, *adversarial.PRESETS):
        known = ", ".join(adversarial.PRESETS)
        raise ValueError(f"adversarial: there is no preset {preset!r}, only {known}")
    try:
        base = adversarial.PRESETS[preset] if preset else adversarial.Adversarial(**given)
        settings = dataclasses.replace(base, **given)
    except TypeError as error:
        raise ValueError(f"adversarial: {error}") from error

    def run(one_pass, params, model_state, batch, rng, step, targets):
        def loss(params, noise, clean, key, batch, targets, step):
            noisy = {**batch, **{DELTAS[name]: x for name, x in noise.items()}}
            disturbed = adversarial.with_divergence(task, settings, clean)
            value, (metrics, _, features) = one_pass(
                lambda features, batch: disturbed(answered(features), batch),
                *(params, model_state, noisy, key, step, targets),
            )
            return value, (answered(features).logits, metrics)

        places = batch["tokens"].shape
        shapes = {
            adversarial.WORDS: (*places, width),
            adversarial.REGIONS: (*places[:2], *batch["regions"].shape[1:]),
        }
        search = adversarial.adversarial_loss(settings, loss, shapes)
        value, metrics = search(params, rng, batch, targets, step)
        return value, (jax.tree.map(jnp.sum, metrics), model_state)

    return run
