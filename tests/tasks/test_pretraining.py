"""The pretraining losses against slow NumPy, as the objective averages them; what a drawn task hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.distill.objective import mean_of_valid
from clipdistill_jax.tasks import pretraining
from clipdistill_jax.tasks.pretraining import Corrupted, Pretraining, corrupt, pretraining_loss
from clipdistill_jax.tasks.transport import transport_distance

# A program each, not one for every operation.
masked_word_loss = jax.jit(pretraining.masked_word_loss, static_argnames="average")
region_feature_loss = jax.jit(pretraining.region_feature_loss, static_argnames="average")
region_class_loss = jax.jit(pretraining.region_class_loss, static_argnames="average")
region_divergence = jax.jit(pretraining.region_divergence, static_argnames=("average", "kl_mean"))
matching_loss = jax.jit(pretraining.matching_loss, static_argnames="transport_weight")

B, T, R, C, V, K, D = 6, 7, 5, 4, 20, 8, 3
RATIOS = {"mlm": 2, "itm": 1, "mrfr": 1, "mrc": 1, "mrckl": 1}


def settings(**changes):
    return Pretraining(**{"ratios": RATIOS, "mask_id": 1, "random_ids": (2, V)} | changes)


def arrays(seed=0):
    """Originals of a batch, its states, and which example counts: the last does not."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(K, 0.3), (B, R))
    probs[0, 0] = np.eye(K)[2]  # zeros elsewhere
    probs[..., 0] += 0.5  # the background is often the likeliest
    return {
        "tokens": rng.integers(2, V, (B, T)),
        "features": rng.normal(size=(B, R, C)),
        "class_probs": probs / probs.sum(-1, keepdims=True),
        "words": rng.random((B, T)) < 0.4,
        "regions": rng.random((B, R)) < 0.4,
        "word_logits": rng.normal(size=(B, T, V)) * 2,
        "found": rng.normal(size=(B, R, C)),
        "class_logits": rng.normal(size=(B, R, K)) * 2,
    }


def as_jax(x):
    x = np.asarray(x)
    return jax.device_put(x.astype({"f": np.float32, "i": np.int32, "b": bool}[x.dtype.kind]))


def log_softmax(x):
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def per_place(name, data):
    """Loss of every place, in float64, and which are chosen."""
    if name == "mlm":
        log_p = log_softmax(data["word_logits"])
        return -np.take_along_axis(log_p, data["tokens"][..., None], -1)[..., 0], data["words"]
    log_q, probs = log_softmax(data["class_logits"]), data["class_probs"]
    if name == "mrfr":
        return ((data["found"] - data["features"]) ** 2).mean(-1), data["regions"]
    if name == "mrc":
        target = probs[..., 1:].argmax(-1) + 1
        return -np.take_along_axis(log_q, target[..., None], -1)[..., 0], data["regions"]
    divergence = np.zeros((B, R))
    for b in range(B):
        for r in range(R):
            for k in range(K):
                if probs[b, r, k] > 0:
                    divergence[b, r] += probs[b, r, k] * (np.log(probs[b, r, k]) - log_q[b, r, k])
    return divergence / (K if name == "mrckl" else 1), data["regions"]


def loss_of(name, data, average):
    x = {key: as_jax(value) for key, value in data.items()}
    if name == "mlm":
        return masked_word_loss(x["word_logits"], x["tokens"], x["words"], average)[:2]
    if name == "mrfr":
        return region_feature_loss(x["found"], x["features"], x["regions"], average)
    if name == "mrc":
        return region_class_loss(x["class_logits"], x["class_probs"], x["regions"], average)[:2]
    kl_mean = "classes" if name == "mrckl" else "places"
    return region_divergence(x["class_logits"], x["class_probs"], x["regions"], average, kl_mean)


@pytest.mark.parametrize("name", ["mlm", "mrfr", "mrc", "mrckl", "mrckl of the paper"])
def test_losses_are_means_over_what_is_hidden(name):
    data = arrays()
    data["words"][2], data["regions"][2] = False, False
    values, chosen = per_place(name, data)
    # "examples": each example's own mean.
    loss, valid = loss_of(name, data, "examples")
    np.testing.assert_array_equal(valid, chosen.any(1))
    expected = [values[b][chosen[b]].mean() if chosen[b].any() else 0.0 for b in range(B)]
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)
    # "places": the objective's mean over examples is UNITER's mean over all hidden places of the batch.
    total, count = jax.jit(mean_of_valid)(*loss_of(name, data, "places"))
    np.testing.assert_allclose(total / count, values[chosen].mean(), rtol=2e-5)


def test_the_background_is_no_target():
    probs = as_jax([[[0.9, 0.02, 0.08]]])
    logits = as_jax(np.log([[[0.5, 0.25, 0.25]]]))
    loss, _, found = region_class_loss(logits, probs, np.ones((1, 1), bool))
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-5)
    assert float(found[0]) == 0.0


def test_divergence_by_hand():
    # KL((1/2, 1/2, 0) || (1/4, 1/4, 1/2)) = ln 2.
    probs, logits = as_jax([[[0.5, 0.5, 0.0]]]), as_jax(np.log([[[0.25, 0.25, 0.5]]]))
    chosen = np.ones((1, 1), bool)
    found, _ = region_divergence(logits, probs, chosen, kl_mean="places")
    np.testing.assert_allclose(found, np.log(2), rtol=1e-5)
    np.testing.assert_allclose(region_divergence(logits, probs, chosen)[0], np.log(2) / 3, rtol=1e-5)


def test_accuracy_is_the_share_of_hidden_words_found():
    logits = as_jax(5.0 * np.eye(4)[None, 1:])
    chosen = np.array([[True, True, False]])
    assert float(masked_word_loss(logits, as_jax([[1, 0, 3]]), chosen)[2][0]) == 0.5


def test_matching_is_uniter_s_sum():
    rng = np.random.default_rng(0)
    logits, matched, distance = rng.normal(size=(B, 2)), np.array([1, 0, 1, 1, 0, 1], bool), rng.random(B)
    loss, accuracy = matching_loss(as_jax(logits), as_jax(matched), as_jax(distance), 0.1)
    log_p = log_softmax(logits)
    entropy = -np.where(matched, log_p[:, 1], log_p[:, 0])
    transport = (distance[matched].sum() - distance[~matched].sum()) / B
    np.testing.assert_allclose(np.mean(loss), entropy.mean() + 0.1 * transport, rtol=1e-5)
    np.testing.assert_array_equal(accuracy, log_p.argmax(1) == matched)


SEGMENTS = np.array([[0, 0, 0, 2, 2, 2, 2]] * B)
WORD_IDS = np.array([[-1, 0, -1, 0, 1, 1, -1]] * B)
IMAGES = np.array([0, 0, 1, 2, 3, 4])
COUNTS = np.array([1, 1, 1, 1, 1, 0], bool)


def corrupted(config, key, region_mask=None, mask=COUNTS):
    data = arrays()
    region_mask = np.arange(R) > np.zeros((B, 1)) if region_mask is None else region_mask
    return corrupt(
        config,
        key,
        tokens=as_jax(data["tokens"]),
        word_ids=as_jax(WORD_IDS),
        segments=as_jax(SEGMENTS),
        maskable_regions=as_jax(region_mask),
        image_ids=as_jax(IMAGES),
        mask=as_jax(mask),
    )


def test_a_task_hides_only_what_is_its_own():
    tokens = arrays()["tokens"]
    draw = jax.jit(lambda key: corrupted(settings(), key))
    seen = set()
    for k in range(40):
        made = jax.device_get(draw(jax.random.key(k)))
        name = list(RATIOS)[int(made.task)]
        seen.add(name)
        words = name == "mlm"
        assert made.words[COUNTS].any(1).all() == words and not (made.words & (WORD_IDS < 0)).any()
        if words:  # one in each segment
            assert made.words[COUNTS, 1].all() and made.words[COUNTS, 3:6].any(1).all()
        else:
            assert not made.words.any()
        np.testing.assert_array_equal(made.tokens[~made.words], tokens[~made.words])
        regions = name in ("mrfr", "mrc", "mrckl")
        assert (
            made.regions[COUNTS].any(1).all() == regions == made.regions.any()
            and not made.regions[:, 0].any()
        )
        if name == "itm":
            np.testing.assert_array_equal(made.matched, IMAGES[made.source] == IMAGES)
        else:
            np.testing.assert_array_equal(made.source, np.arange(B))
            assert made.matched.all()
        assert not (made.words[5].any() or made.regions[5].any()) and made.source[5] == 5
    assert seen == set(RATIOS)


def test_tasks_are_drawn_by_their_ratios():
    config = settings(ratios={"mlm": 2, "mrfr": 1, "mrckl": 1})
    keys = jax.random.split(jax.random.key(0), 2000)
    tasks = np.asarray(jax.jit(jax.vmap(lambda key: corrupted(config, key).task))(keys))
    for index, share in enumerate((0.5, 0.25, 0.25)):  # within 4.5 standard deviations
        assert abs((tasks == index).mean() - share) < 4.5 * np.sqrt(share * (1 - share) / 2000)


def heads(x, scale=1.0, calls=None):
    def at(name):
        def head(places):
            if calls is not None:
                calls.append((name, places.shape))
            return scale * jnp.take_along_axis(x[name], places[..., None], 1)

        return head

    def itm():
        masks = jnp.ones((B, T), bool).at[5].set(False), jnp.ones((B, R), bool).at[5].set(False)
        states = x["word_logits"][..., :D], x["class_logits"][..., :D]
        return scale * x["class_logits"][:, 0, :2], scale * states[0], states[1], *masks

    return {
        "mlm": at("word_logits"),
        "mrfr": at("found"),
        "mrc": at("class_logits"),
        "mrckl": at("class_logits"),
        "itm": itm,
    }


def run(config, made, x, scale=1.0, calls=None, mask=COUNTS, fits=None):
    return pretraining_loss(
        config,
        made,
        heads(x, scale, calls),
        tokens=x["tokens"],
        features=x["features"],
        class_probs=x["class_probs"],
        mask=as_jax(mask),
        fits=as_jax(np.ones(B, bool) if fits is None else fits),
    )


def test_the_drawn_task_s_loss_and_metrics():
    config = settings(most_words=3, most_regions=3, kl_mean="places", average="examples")
    data = arrays()
    x = {key: as_jax(value) for key, value in data.items()}
    calls = []
    fits = np.array([1, 0, 1, 0, 1, 1], bool)
    step = jax.jit(lambda made: run(config, made, x, calls=calls, fits=fits))
    draw = jax.jit(lambda key: corrupted(config, key))
    seen = set()
    for k in range(40):
        made = draw(jax.random.key(k))
        name = list(RATIOS)[int(made.task)]
        if name in seen:
            continue
        seen.add(name)
        loss, valid, metrics = jax.device_get(step(made))
        # A text that does not fit its own image is no match; beside another image it is a mismatch.
        counted = COUNTS & (fits | ~np.asarray(made.matched)) if name == "itm" else COUNTS
        np.testing.assert_array_equal(valid, counted)
        if name == "itm":
            logits, *states = heads(x)["itm"]()
            expected, right = matching_loss(logits, made.matched, jax.jit(transport_distance)(*states))
            np.testing.assert_allclose(loss[valid], expected[valid], rtol=1e-5)
            np.testing.assert_array_equal(metrics["itm_accuracy"][0][valid], right[valid])
        else:
            data["words"], data["regions"] = np.asarray(made.words), np.asarray(made.regions)
            values, chosen = per_place("mrckl of the paper" if name == "mrckl" else name, data)
            for b in np.flatnonzero(COUNTS):
                first = np.flatnonzero(chosen[b])[:3]
                np.testing.assert_allclose(loss[b], values[b][first].mean(), rtol=2e-5)
        for other in RATIOS:
            value, counted = metrics[f"{other}_loss"]
            np.testing.assert_array_equal(counted, valid & (other == name))
            np.testing.assert_array_equal(value, np.where(counted, loss, 0.0))
        assert {n for n in metrics if "accuracy" in n} == {"mlm_accuracy", "mrc_accuracy", "itm_accuracy"}
    assert seen == set(RATIOS)
    # Each head was traced once, on three places a row.
    names = ["word_logits", "found", "class_logits", "class_logits"]
    assert sorted(calls) == sorted((name, (B, 3)) for name in names)


def test_full_padding_gives_zero_and_finite_gradients():
    x = {key: as_jax(value) for key, value in arrays().items()}
    nobody = np.zeros(B, bool)

    @jax.jit
    def value(scale, key):
        made = corrupted(settings(), key, mask=nobody)
        loss, valid, _ = run(settings(), made, x, scale, mask=nobody)
        total, count = mean_of_valid(loss, valid)
        return total / jnp.maximum(count, 1)

    step = jax.jit(jax.value_and_grad(value))
    for k in range(15):
        found, gradient = step(1.0, jax.random.key(k))
        assert float(found) == 0.0 and float(gradient) == 0.0


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"ratios": {"mlm": 1, "wra": 1}}, "ratios names wra; it can have mlm"),
        ({"ratios": {}}, "each task a number above 0"),
        ({"ratios": {"mlm": 0}}, "each task a number above 0"),
        ({"word_rate": 1.5}, "word_rate is 1.5"),
        ({"average": "tokens"}, "average is 'tokens'; it can be places or examples"),
        ({"kl_mean": "sum"}, "kl_mean is 'sum'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_missing_head_or_detector_is_named():
    x = {key: as_jax(value) for key, value in arrays().items()}
    made = Corrupted(0, x["tokens"], x["words"], x["regions"], jnp.arange(B), jnp.ones(B, bool))
    some = {name: head for name, head in heads(x).items() if name != "itm"}
    fields = {"tokens": x["tokens"], "features": x["features"], "mask": as_jax(COUNTS)}
    fields["fits"] = jnp.ones(B, bool)
    with pytest.raises(ValueError, match="no head for itm"):
        pretraining_loss(settings(), made, some, **fields)
    with pytest.raises(ValueError, match="class probabilities"):
        pretraining_loss(settings(), made, heads(x), **fields)
