"""VILLA: "free" adversarial training on word embeddings and region features, around any loss.

Every step looks for noise that hurts, and every pass of that search also trains: with `steps` passes, the
parameters' gradient is that of the mean of the passes' losses, each with a symmetric divergence from the
prediction on the clean batch. Sources: Gan et al. 2020, "Large-Scale Adversarial Training for
Vision-and-Language Representation Learning", section 3; zhegan27/VILLA train_vcr_adv.py:240-443.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from clipdistill_jax.models.features import Batch, Features

WORDS, REGIONS = "words", "regions"
NORMS = ("l2", "linf")
KL_MEANS = ("sum", "classes")
Noise = dict[str, Array]
# (params, noise, clean logits or None, key, *args) -> (loss, (logits, aux))
PassLoss = Callable[..., tuple[Any, tuple[Any, Any]]]
Task = Callable[[Features, Batch], tuple[Any, Any, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """How the noise is found, and what it costs.

    Attributes:
      word_step: length of a step of the noise on the word embeddings (before positions and types are added);
        0: no such noise.
      region_step: of the noise on the region features (before they are projected); 0: no such noise.
      steps: passes with noise; the noise of the first is 0, and the last moves it no more.
      norm: "l2": a step has this length over an example's tokens and channels together; "linf": its largest
        number has this size.
      max_norm: most length, by the same norm, of the noise; 0: no limit, as in all of VILLA's configs.
      kl_weight: of the divergence.
      kl_mean: "sum" over classes; "classes": divided by their number, as VILLA does for VCR's two classes.
      clean_gradient: the divergence also trains the clean pass, as in VILLA; else that is a fixed target,
        which saves a backward pass and its memory.
      separate: words and regions are perturbed in passes of their own, `steps` of each ("alter" in VILLA,
        whose code for it cannot run; section 3.2 of its paper).
    """

    word_step: float = 0.0
    region_step: float = 0.0
    steps: int = 3
    norm: str = "l2"
    max_norm: float = 0.0
    kl_weight: float = 1.5
    kl_mean: str = "sum"
    clean_gradient: bool = True
    separate: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where a field has a value that it cannot have."""
        if min(self.word_step, self.region_step, self.max_norm, self.kl_weight) < 0:
            raise ValueError("word_step, region_step, max_norm and kl_weight are 0 or more")
        if not self.word_step and not self.region_step:
            raise ValueError("word_step and region_step are both 0: there is nothing to perturb")
        if self.separate and not (self.word_step and self.region_step):
            raise ValueError("separate passes need both word_step and region_step")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it is 1 or more")
        for name, known in (("norm", NORMS), ("kl_mean", KL_MEANS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it can be {' or '.join(known)}")

    @property
    def sizes(self) -> dict[str, float]:
        """Step length of each kind of noise that is looked for."""
        sizes = {WORDS: self.word_step, REGIONS: self.region_step}
        return {name: size for name, size in sizes.items() if size}


# zhegan27/VILLA config/train-*-adv.json
PRESETS = {
    "vcr_base": Adversarial(0.01, 0.01, kl_weight=1.5, kl_mean="classes"),
    "vcr_large": Adversarial(0.1, 0.1, kl_weight=1.0, kl_mean="classes"),
    "vqa_base": Adversarial(0.001, kl_weight=1.5),
    "vqa_large": Adversarial(0.002, kl_weight=1.0),
    "ve_base": Adversarial(0.001, kl_weight=1.5),
    "ve_large": Adversarial(0.001, kl_weight=1.5),
}


def adversarial_loss(
    settings: Adversarial, loss: PassLoss, shapes: Mapping[str, tuple[int, ...]]
) -> Callable[..., tuple[Any, Any]]:
    """Wraps a loss. Value and gradient of what it returns cost steps + 1 forward and steps + 1 backward
    passes of `loss` (steps, without `clean_gradient`); the search for noise needs none of its own.

    Args:
      loss: (params, noise, clean, key, *args) -> (scalar, (logits, aux)). noise {"words": [..., T, C],
        "regions": [..., R, C']} is added to the word embeddings and to the region features. clean is None in
        the clean pass, whose loss and aux are not used; else the logits of that pass, and the scalar is that
        of a task `with_divergence` from them. Each pass has a key of its own. What does not depend on params
        (a teacher) belongs in args, or it is computed in every pass.
      shapes: of the noise, "words" and "regions" alike; an example (VILLA: a question with one answer) is one
        index of all but the last two axes. Only the kinds that `settings` perturbs are read.

    Returns:
      fn(params, key, *args) -> (scalar, aux): the mean of the passes' losses, and aux of every pass, stacked
      [steps, ...] (with `separate` [steps, 2, ...]); the first is without noise. Only params get a
      gradient, of the first order.

    Raises:
      ValueError: the shape of a kind of noise that the settings perturb is missing.
    """
    if missing := sorted(settings.sizes.keys() - shapes.keys()):
        raise ValueError(f"shapes lacks {', '.join(missing)}: the model takes no such noise")
    groups = [(name,) for name in settings.sizes] if settings.separate else [tuple(settings.sizes)]

    def search(params: Any, key: PRNGKeyArray, args: tuple[Any, ...]) -> tuple[tuple[Any, Any], Any]:
        """(value, aux) and the gradient of the value."""
        zeros = {name: jnp.zeros(shapes[name]) for name in settings.sizes}
        keys = jax.random.split(key, settings.steps * len(groups) + 1)

        def clean_logits(params: Any) -> Any:
            return loss(params, zeros, None, keys[0], *args)[1][0]

        def one(params: Any, noise: Noise, clean: Any, key: PRNGKeyArray) -> Any:
            value, (_, aux) = loss(params, {**zeros, **noise}, clean, key, *args)
            return value / (settings.steps * len(groups)), aux

        clean, pull = (
            jax.vjp(clean_logits, params) if settings.clean_gradient else (clean_logits(params), None)
        )
        # Without `clean_gradient` its gradient is never asked for, so that it is not computed.
        wanted = (0, 1, 2) if settings.clean_gradient else (0, 1)

        def body(carry: Any, keys: Any) -> Any:
            noise, total = carry
            seen = []
            for k, group in enumerate(groups):
                part = {name: noise[name] for name in group}
                found, grads = jax.value_and_grad(one, wanted, has_aux=True)(params, part, clean, keys[k])
                total = jax.tree.map(jnp.add, total, (grads[0], *grads[2:]))
                noise = {**noise, **move(settings, part, grads[1])}
                seen.append(found)
            return (noise, total), jax.tree.map(lambda *x: jnp.stack(x), *seen)

        total = jax.tree.map(jnp.zeros_like, (params, clean) if settings.clean_gradient else (params,))
        (_, total), (values, aux) = jax.lax.scan(
            body, (zeros, total), keys[1:].reshape(settings.steps, len(groups))
        )
        grads = total[0]
        if pull is not None:
            grads = jax.tree.map(jnp.add, grads, pull(total[1])[0])
        return (values.sum(), aux if settings.separate else jax.tree.map(lambda x: x[:, 0], aux)), grads

    @jax.custom_vjp
    def run(params: Any, key: PRNGKeyArray, args: tuple[Any, ...]) -> tuple[Any, Any]:
        return search(params, key, args)[0]

    def backward(grads: Any, cotangents: tuple[Any, Any]) -> tuple[Any, None, None]:
        return jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), grads), None, None

    run.defvjp(search, backward)
    return lambda params, key, *args: run(params, key, args)


def with_divergence(task: Task, settings: Adversarial, clean: Array | None) -> Task:
    """A task whose loss has the weighted divergence of features.logits from the clean pass's logits in it.

    Args:
      task: (features, batch) -> loss [B], which examples count [B], further metrics.
      clean: None in the clean pass, which has no divergence: the task itself.

    Returns:
      A task with one more metric, "divergence" [B], without its weight.
    """
    if clean is None:
        return task

    def run(features: Features, batch: Batch) -> tuple[Any, Any, dict[str, Any]]:
        loss, valid, metrics = task(features, batch)
        divergence = symmetric_divergence(clean, features.logits, settings.kl_mean)
        return loss + settings.kl_weight * divergence, valid, {**metrics, "divergence": divergence}

    return run


def move(settings: Adversarial, noise: Noise, gradient: Noise) -> Noise:
    """The noise after a step up its gradient: noise + step * gradient / |gradient|, within `max_norm`.

    The norms are over the last two axes, tokens and channels, in float32. VILLA's floor of 1e-8 under them is
    of gradients that apex has scaled up; of a mean over a large batch it would shorten the steps.
    """
    moved = {}
    for name, old in noise.items():
        new = old + settings.sizes[name] * gradient[name] / jnp.maximum(
            _length(gradient[name], settings.norm), 1e-18
        )
        if settings.max_norm and settings.norm == "l2":
            length = _length(new, "l2")
            new = new * jnp.where(
                length > settings.max_norm, settings.max_norm / jnp.maximum(length, 1e-8), 1.0
            )
        elif settings.max_norm:
            new = jnp.clip(new, -settings.max_norm, settings.max_norm)
        moved[name] = new
    return moved


def symmetric_divergence(
    clean: Float[Array, "b *choices n"],
    noisy: Float[Array, "b *choices n"],
    kl_mean: str = "sum",
) -> Float[Array, " b"]:
    """KL(clean || noisy) + KL(noisy || clean) of the softmaxes over the last axis, in float32.

    Args:
      clean, noisy: logits [B, N], or [B, K, N] for K choices with N classes each, over which it is a mean.
      kl_mean: "sum" over the N classes; "classes": divided by N.
    """
    log_p = jax.nn.log_softmax(clean.astype(jnp.float32), -1)
    log_q = jax.nn.log_softmax(noisy.astype(jnp.float32), -1)
    both = jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), -1)
    if kl_mean == "classes":
        both = both / clean.shape[-1]
    return both.reshape(len(both), -1).mean(-1)


def _length(x: Float[Array, "*b n c"], norm: str) -> Float[Array, "*b 1 1"]:
    if norm == "linf":
        return jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), (-2, -1), keepdims=True))
