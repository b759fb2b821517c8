"""UNITER: sizes, embeddings and heads against NumPy, masks, choices, an adversary's inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.models.joint import JointFeatures, param_shapes
from clipdistill_jax.models.uniter import PRESETS, VCR_TYPES, VCR_WORDS, Uniter, locations
from tests.models import joint_cases as cases
from tests.models.joint_cases import close, count, dense, jitted, norm, pooled, transform

CONFIG = cases.UNITER
HEADS = ("vcr", "mlm", "mrfr", "mrc", "itm")
MODEL = Uniter(CONFIG, HEADS)


@pytest.fixture(scope="module")
def batch():
    return cases.make_batch(CONFIG.vocab_size, CONFIG.types)


@pytest.fixture(scope="module")
def params():
    return cases.random_params(MODEL)


@pytest.fixture(scope="module")
def apply():
    return jitted(MODEL)


@pytest.fixture(scope="module")
def features(apply, params, batch):
    return apply(params, batch)


@pytest.mark.parametrize("preset, parameters", [("base", 109_898_752), ("large", 335_695_872)])
def test_parameter_counts(preset, parameters):
    """BERT with 28,996 words, and the regions' 16 - 5 tensors: 16 + 16 a layer + 2 tensors in all."""
    c = PRESETS[preset]
    shapes = param_shapes(Uniter(dataclasses.replace(c, layers=1)))
    (block,) = shapes["encoder"].values()
    more = (c.layers - 1) * count(block)  # blocks are of one size
    assert count(shapes) + more == parameters
    assert len(jax.tree.leaves(block)) == 16 and len(jax.tree.leaves(shapes)) == 16 + 16 + 2
    # The paper's 86M and 303M are encoder and pooler (Chen et al. 2020, section 3.1).
    blocks = count(shapes["encoder"]) + more + count(shapes["pooler"])
    assert blocks == {"base": 85_645_056, "large": 303_358_976}[preset]
    regions = (2048 + 1) * c.width + (7 + 1) * c.width + 6 * c.width + 2 * 2048
    assert count(shapes["region_embeddings"]) == regions


def test_parameter_counts_of_heads_and_of_vcr_tables():
    c = dataclasses.replace(PRESETS["base"], layers=1, vocab_size=VCR_WORDS, types=VCR_TYPES)
    shapes = param_shapes(Uniter(c, ("vcr", "mlm", "mrfr", "mrc", "itm")))
    assert shapes["embeddings"]["token_embedding"]["embedding"].shape == (29077, 768)
    assert shapes["embeddings"]["type_embedding"]["embedding"].shape == (4, 768)
    h = 768
    classifier = (h + 1) * 2 * h + 2 * 2 * h
    transformed = (h + 1) * h + 2 * h
    assert count(shapes["vcr"]) == classifier + (2 * h + 1) * 2
    assert count(shapes["mlm"]) == transformed + 29077  # the table is the embeddings'
    assert count(shapes["mrfr"]) == transformed + 2048  # the kernel is the embeddings'
    assert count(shapes["mrc"]) == transformed + (h + 1) * 1601
    assert count(shapes["itm"]) == (h + 1) * 2
    for head, outputs in (("vqa", 3129), ("ve", 3)):
        shapes = param_shapes(Uniter(c, (head,)))[head]
        assert count(shapes) == classifier + (2 * h + 1) * outputs


def test_locations_are_fractions_and_their_area():
    run = cases.quick_jit(locations)
    found = run(np.array([[[10, 20, 50, 60]]], np.float32), np.array([[100, 80]], np.float32))
    close(found[0, 0], [0.1, 0.25, 0.5, 0.75, 0.4, 0.5, 0.2], 1e-7)


def embeddings_of(params, batch, example, choice):
    """LN(word + position + type) and LN(LN(dense(f)) + LN(dense(7 places)) + type 1), one by one."""
    p, b = cases.float64(params), cases.part(batch, example, choice)
    e, r = p["embeddings"], p["region_embeddings"]
    rows = []
    for i, (token, kind) in enumerate(zip(b["tokens"][0, 0], b["types"][0, 0], strict=True)):
        vector = e["token_embedding"]["embedding"][token]
        if "token_delta" in b:
            vector = vector + b["token_delta"][0, 0, i]
        vector = vector + e["position_embedding"]["embedding"][i] + e["type_embedding"]["embedding"][kind]
        rows.append(norm(e["ln"], vector))
    width, height = b["image_size"][0].astype(np.float64)
    for i, (x1, y1, x2, y2) in enumerate(b["region_boxes"][0].astype(np.float64)):
        feature = b["regions"][0, i].astype(np.float64)
        if "masked_regions" in b and b["masked_regions"][0, i]:
            feature = 0 * feature + r["mask_embedding"]["embedding"][1]
        if "region_delta" in b:
            feature = feature + b["region_delta"][0, 0, i]
        w, h = (x2 - x1) / width, (y2 - y1) / height
        place = np.array([x1 / width, y1 / height, x2 / width, y2 / height, w, h, w * h])
        vector = norm(r["ln_features"], dense(r["features"], feature))
        vector = vector + norm(r["ln_locations"], dense(r["locations"], place))
        rows.append(norm(r["ln"], vector + e["type_embedding"]["embedding"][1]))
    return np.stack(rows)


@pytest.mark.parametrize(
    "name, shape, size", [("token_delta", (2, 3, 7, 256), 0.003), ("region_delta", (2, 3, 4, 2048), 0.1)]
)
def test_in_bfloat16_small_noise_is_not_rounded_off(name, shape, size):
    """Each number moves by whole bfloat16 steps or not at all: on average they move as in float32."""
    config = dataclasses.replace(CONFIG, width=256, feature_width=2048)
    rng, batch = np.random.default_rng(0), cases.make_batch(config.vocab_size, config.types)
    batch["regions"] = rng.normal(size=(2, 4, 2048)).astype(np.float32)
    noise = rng.normal(size=shape)
    noise *= size / np.linalg.norm(noise, axis=(-2, -1), keepdims=True)
    params, moved = cases.random_params(Uniter(config)), []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Uniter(config, dtype=dtype)
        embed = jax.jit(lambda p, x, model=model: model.apply({"params": p}, x, method="embed")[0])
        pair = [embed(params, {**batch, name: jnp.asarray(x, jnp.float32)}) for x in (noise, 0 * noise)]
        moved.append(np.subtract(*(np.asarray(x, np.float64) for x in pair)))
    exact, rounded = moved
    assert (exact * rounded).sum() / (exact**2).sum() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("extras", ["none", "masked and deltas"])
def test_embeddings_equal_numpy(params, batch, extras):
    rng = np.random.default_rng(5)
    batch = dict(batch)
    if "masked" in extras:
        batch["masked_regions"] = np.array([[False, True, False, True], [True, False, False, False]])
    if "deltas" in extras:
        batch["token_delta"] = rng.normal(size=(2, 3, 7, 16)).astype(np.float32)
        batch["region_delta"] = rng.normal(size=(2, 3, 4, cases.FEATURES)).astype(np.float32)
    found, mask = jitted(MODEL, method="embed")(params, batch)
    assert found.shape == (6, 7 + 4, 16)
    wanted = np.concatenate([batch["token_mask"], np.repeat(batch["region_mask"][:, None], 3, 1)], -1)
    np.testing.assert_array_equal(mask, wanted.reshape(6, 11))
    for example in range(2):
        for choice in range(3):
            expected = embeddings_of(params, batch, example, choice)
            close(np.asarray(found[3 * example + choice])[wanted[example, choice]], expected)


def test_heads_equal_numpy(params, batch, features):
    p = cases.float64(params)
    f = cases.float64({name: getattr(features, name) for name in ("text", "tokens", "regions")})
    pool = pooled(p, f["text"])

    def classified(p, x):
        return dense(p["out"], norm(p["ln"], np.maximum(dense(p["dense"], x), 0)))

    words = p["embeddings"]["token_embedding"]["embedding"]
    kernel = p["region_embeddings"]["features"]["kernel"]
    expected = {
        "vcr": classified(p["vcr"], pool),
        "itm": dense(p["itm"]["out"], pool),
        "mlm": transform(p["mlm"]["transform"], f["tokens"]) @ words.T + p["mlm"]["bias"],
        "mrfr": transform(p["mrfr"]["transform"], f["regions"]) @ kernel.T + p["mrfr"]["bias"],
        "mrc": dense(p["mrc"]["out"], transform(p["mrc"]["transform"], f["regions"])),
    }
    assert set(features.outputs) == set(HEADS)
    for head, found in features.outputs.items():
        assert found.dtype == jnp.float32 and found.shape == expected[head].shape
        close(found, expected[head], 1e-4)  # sums of 16 products of numbers up to 10
    np.testing.assert_array_equal(features.logits, features.outputs["vcr"][..., 1])

    chosen = np.array([[[1, 2], [3, 1], [2, 2]], [[0, 1], [4, 5], [5, 1]]], np.int32)
    some = jitted(MODEL, heads=("mlm",))(params, {**batch, "masked_tokens": chosen})
    assert set(some.outputs) == {"mlm"} and some.logits is None
    close(some.outputs["mlm"], np.take_along_axis(expected["mlm"], chosen[..., None], 2), 1e-4)


def test_a_head_of_one_text(batch):
    model = Uniter(CONFIG, ("vqa",))
    one = cases.part(batch, 0, 0)
    params = cases.random_params(model)
    found = jitted(model)(params, one)
    p = cases.float64(params)
    pool = pooled(p, np.asarray(found.text, np.float64))
    expected = dense(p["vqa"]["out"], norm(p["vqa"]["ln"], cases.gelu(dense(p["vqa"]["dense"], pool))))
    close(found.outputs["vqa"], expected)
    assert found.logits.shape == (1, 11)
    for head in ("vqa", "ve"):
        model = Uniter(CONFIG, (head,))
        with pytest.raises(ValueError, match=f"{head} has one text an example, not 3"):
            jax.eval_shape(model.apply, {"params": param_shapes(model)}, batch)


def test_the_record(features, batch):
    assert isinstance(features, JointFeatures)
    assert features.image.shape == features.text.shape == (2, 3, 16)
    assert features.tokens.shape == features.words.shape == (2, 3, 7, 16)
    np.testing.assert_array_equal(features.image, features.regions[:, :, 0])
    np.testing.assert_array_equal(features.text, features.tokens[:, :, 0])
    np.testing.assert_array_equal(features.token_mask, batch["token_mask"])
    close(features.words[0, 0, 2], (features.tokens[0, 0, 4] + features.tokens[0, 0, 5]) / 2, 1e-6)
    assert features.word_mask[0].sum(-1).tolist() == [3, 2, 1]
    assert features.attention is None and features.frames is None


def test_attention_is_over_the_real_part_of_the_sequence(params, batch, features):
    seen = jitted(MODEL, attention=True, heads=())(params, batch)
    cases.check_attention(seen, 7 + 4)
    close(seen.tokens, np.asarray(features.tokens), 1e-6)


def test_padding_and_other_texts_have_no_influence(apply, params, batch, features):
    cases.check_influence(MODEL, apply, params, batch, features, choice=2, atol=1e-4)
    # But what is real counts, both ways.
    changed = dict(batch, regions=batch["regions"] + np.eye(4)[1][:, None].astype(np.float32))
    assert np.abs(apply(params, changed).text - features.text).max() > 1e-3
    changed = dict(batch, tokens=batch["tokens"] % 29 + 1)
    assert np.abs(apply(params, changed).image - features.image).max() > 1e-3


def test_hidden_features_are_hidden(params, batch):
    embed = jitted(MODEL, method="embed")
    hidden = dict(batch, masked_regions=np.array([[False, True, False, False]] * 2))
    first, _ = embed(params, hidden)
    changed = batch["regions"].copy()
    changed[:, 1] = 9.0
    second, _ = embed(params, dict(hidden, regions=changed))
    np.testing.assert_array_equal(first, second)
    assert np.abs(embed(params, dict(batch, regions=changed))[0] - first).max() > 0.1


def test_gradients_are_finite_and_reach_everything(params, batch):
    gradient = cases.checked_gradient(MODEL, params, batch)
    assert (gradient["region_embeddings"]["mask_embedding"]["embedding"][0] == 0).all()


def test_dropout_is_the_texts_own(params, batch):
    model = MODEL.clone(config=dataclasses.replace(CONFIG, dropout=0.5), heads=())
    rows = {name: np.repeat(x[:, :1], 3, 1) if x.shape[1:2] == (3,) else x for name, x in batch.items()}
    key = jax.random.key(0, impl="unsafe_rbg")
    found, _ = jitted(model, train=True, method="embed", rngs={"dropout": key})(params, rows)
    found = np.asarray(found).reshape(2, 3, 11, 16)
    for block in (slice(0, 7), slice(7, 11)):
        assert (found[0, 0, block] != found[0, 1, block]).any()
        assert abs((found[:, :, block] == 0).mean() - 0.5) < 0.1  # at least 384 draws: a deviation of 0.026


def test_wrong_inputs_are_refused(params, batch):
    def refused(match, batch=batch, heads=(), ask=None):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda: Uniter(CONFIG, heads).apply({"params": params}, batch, heads=ask))

    refused("the batch has no types", {name: x for name, x in batch.items() if name != "types"})
    refused("there is no head 'nlvr'; there is vcr, ve", heads=("nlvr",))
    refused("one answer, but has the heads vcr and vqa", heads=("vcr", "vqa"))
    longer = {k: np.concatenate([x, x[:, :, :3]], 2) if x.shape[2:3] == (7,) else x for k, x in batch.items()}
    refused("10 tokens a text, but UNITER has 9 positions", longer)
    refused("no head 'itm'; there is vcr", heads=("vcr",), ask=("itm",))


def test_bfloat16_computes_near_float32_with_float32_parameters(params, batch, features):
    half = MODEL.clone(dtype=jnp.bfloat16)
    found = jitted(half, heads=("vcr",))(params, batch)
    assert found.image.dtype == jnp.bfloat16 and found.logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(param_shapes(half))} == {jnp.dtype(jnp.float32)}
    a, b = np.asarray(features.tokens).ravel(), np.asarray(found.tokens, np.float32).ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999  # 8 bits of mantissa through a block


def test_parameter_names_suit_rules_by_name():
    cases.check_names(MODEL)
