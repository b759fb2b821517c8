"""VL-BERT: sizes, embeddings and heads against NumPy, positions, visual norms that start at 0, masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.data.regions.geometry import vl_bert_geometry
from clipdistill_jax.models.joint import param_shapes
from clipdistill_jax.models.vl_bert import PRESETS, VlBert, geometry
from tests.models import joint_cases as cases
from tests.models.joint_cases import close, count, dense, jitted, norm, pooled, transform

CONFIG = cases.VL_BERT
HEADS = ("vcr", "objects", "mlm", "mrc", "itm")
MODEL = VlBert(CONFIG, HEADS)


@pytest.fixture(scope="module")
def batch():
    return cases.make_batch(CONFIG.vocab_size, 2)


@pytest.fixture(scope="module")
def params():
    return cases.random_params(MODEL)


@pytest.fixture(scope="module")
def apply():
    return jitted(MODEL)


@pytest.fixture(scope="module")
def features(apply, params, batch):
    return apply(params, batch)


@pytest.mark.parametrize("preset, parameters", [("base", 112_634_112), ("large", 339_344_384)])
def test_parameter_counts(preset, parameters):
    """BERT with three types, 4096 -> width, and the norms and vectors of VL-BERT's own."""
    c = PRESETS[preset]
    shapes = param_shapes(VlBert(dataclasses.replace(c, layers=1)))
    (block,) = shapes["encoder"].values()  # all are of one size
    bert = {"base": 109_482_240, "large": 335_141_888}[preset]
    assert count(shapes) + (c.layers - 1) * count(block) == parameters
    assert parameters == bert + c.width + (4096 + 1) * c.width + 4 * c.width + 2 * c.width
    assert len(jax.tree.leaves(block)) == 16 and len(jax.tree.leaves(shapes)) == 5 + 16 + 2 + 2 + 4 + 2


def test_parameter_counts_of_heads():
    c = dataclasses.replace(PRESETS["base"], layers=1)
    shapes = param_shapes(VlBert(c, ("vcr", "objects", "mlm", "mrc", "itm")))
    h = 768
    square = (h + 1) * h
    assert count(shapes["vcr"]) == h + 1
    assert count(shapes["objects"]) == square + (h + 1) * 81
    assert count(shapes["mlm"]) == square + 2 * h + 30522  # the table is the embeddings'
    assert count(shapes["mrc"]) == square + (h + 1) * 1601
    assert count(shapes["itm"]) == (h + 1) * 2
    assert shapes["mask_feature"]["embedding"].shape == (1, 2048)
    assert shapes["mask_object"]["embedding"].shape == (1, h)
    answers = param_shapes(VlBert(c, ("vqa",)))
    assert count(answers["vqa"]) == square + 2 * h + (h + 1) * 3129
    assert "mask_feature" not in answers
    assert count(param_shapes(VlBert(c, ("ve",)))["ve"]) == (h + 1) * 3


def test_geometry_is_that_of_the_region_files(batch):
    """Worked by hand for one box, and equal to what data preparation computes."""
    box = np.array([[[20, 0, 60, 50]]], np.float32)
    run = cases.quick_jit(geometry, static_argnums=2)
    found = run(box, np.array([[100, 100]], np.float32), 2)
    position = np.array([40, 25, 40, 50.0])[:, None] / np.array([1, 1000**0.5])
    close(found[0, 0], np.concatenate([np.sin(position), np.cos(position)], -1).ravel(), 1e-5)
    found = run(batch["region_boxes"], batch["image_size"], 256)
    assert found.shape == (2, 4, 2048)
    for example in range(2):
        expected = vl_bert_geometry(
            batch["region_boxes"][example], tuple(batch["image_size"][example].tolist())
        )
        close(found[example], expected, 2e-5)  # angles up to 100, of which float32 keeps 5 decimals


def embeddings_of(params, batch, example, choice):
    """The sequence of one text, position by position, in the original's order."""
    p, b = cases.float64(params), cases.part(batch, example, choice)
    e = {name: x["embedding"] for name, x in p["embeddings"].items() if name != "ln"}
    places = vl_bert_geometry(b["region_boxes"][0], tuple(b["image_size"][0].tolist()), waves=CONFIG.waves)
    objects = []
    for i, feature in enumerate(b["regions"][0].astype(np.float64)):
        word = p["object_embedding"]["embedding"][0]
        if "masked_regions" in b and b["masked_regions"][0, i]:
            feature, word = p["mask_feature"]["embedding"][0], p["mask_object"]["embedding"][0]
        vector = dense(p["object_vectors"]["dense"], np.concatenate([places[i], feature]))
        objects.append((np.maximum(vector, 0), word))
    tokens = b["tokens"][0, 0]
    rows = []
    for i, token in enumerate(tokens):
        vector, _ = objects[b["token_regions"][0, 0, i]]
        row = e["token_embedding"][token] + norm(p["ln_text"], vector)
        rows.append(row + e["position_embedding"][i] + e["type_embedding"][b["types"][0, 0, i]])
    for vector, word in objects:
        row = word + norm(p["ln_object"], vector)
        rows.append(row + e["position_embedding"][len(tokens)] + e["type_embedding"][2])
    end = p["end_embedding"]["embedding"][0] + e["position_embedding"][len(tokens) + 1]
    rows.append(end + e["type_embedding"][2])
    return norm(p["embeddings"]["ln"], np.stack(rows))


@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_equal_numpy(params, batch, masked):
    if masked:
        rows = np.array([[False, True, False, True], [False, True, False, False]])
        batch = dict(batch, masked_regions=rows)
    found, mask = jitted(MODEL, method="embed")(params, batch)
    assert found.shape == (6, 7 + 4 + 1, 16)
    seen = [batch["token_mask"], np.repeat(batch["region_mask"][:, None], 3, 1), np.ones((2, 3, 1), bool)]
    wanted = np.concatenate(seen, -1)
    np.testing.assert_array_equal(mask, wanted.reshape(6, 12))
    for example in range(2):
        for choice in range(3):
            expected = embeddings_of(params, batch, example, choice)
            close(np.asarray(found[3 * example + choice])[wanted[example, choice]], expected, 1e-4)


def test_training_starts_at_bert(batch):
    """The visual norms' gains start at 0: what is seen has no influence yet, but they have a gradient."""
    model = VlBert(dataclasses.replace(CONFIG, feature_dropout=0.0), ("vcr",))
    norms = ("ln_text", "ln_object")

    def start(key):  # of these alone, which the compiler sees to: random numbers compile slowly
        made = model.init(key, batch, method="complete")["params"]
        return {name: made[name] for name in norms}

    params = cases.random_params(model) | cases.quick_jit(start)(jax.random.key(0))
    assert all((x == 0).all() for name in norms for x in params[name].values())

    def loss(params, batch):
        logits = model.apply({"params": params}, batch).logits
        return jnp.sum(logits), logits

    gradient = cases.quick_jit(jax.grad(loss, has_aux=True))
    found, first = gradient(params, batch)
    _, second = gradient(params, dict(batch, regions=batch["regions"][::-1] + 2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(found["ln_text"]["scale"]).max() > 0 and np.abs(found["ln_object"]["scale"]).max() > 0


def test_heads_equal_numpy(params, batch, features):
    p = cases.float64(params)
    f = cases.float64({name: getattr(features, name) for name in ("text", "tokens", "regions")})
    pool = pooled(p, f["text"])
    words = p["embeddings"]["token_embedding"]["embedding"]
    expected = {
        "vcr": dense(p["vcr"]["out"], pool),
        "itm": dense(p["itm"]["out"], pool),
        "mlm": transform(p["mlm"]["transform"], f["tokens"]) @ words.T + p["mlm"]["bias"],
        "mrc": dense(p["mrc"]["out"], transform(p["mrc"]["transform"], f["regions"])),
        "objects": dense(p["objects"]["out"], transform(p["objects"]["transform"], f["regions"])),
    }
    assert set(features.outputs) == set(HEADS)
    for head, found in features.outputs.items():
        assert found.dtype == jnp.float32 and found.shape == expected[head].shape
        close(found, expected[head], 1e-4)
    assert "ln" not in p["mrc"]["transform"] and "ln" not in p["objects"]["transform"]
    np.testing.assert_array_equal(features.logits, features.outputs["vcr"][..., 0])


@pytest.mark.parametrize("head", ["vqa", "ve"])
def test_one_text_heads(batch, head):
    model = VlBert(CONFIG, (head,))
    params = cases.random_params(model)
    first = {name: x[:, :1] if x.shape[1:2] == (3,) else x for name, x in batch.items()}  # lengths 7 and 4
    found = jitted(model)(params, first)
    p, tokens = cases.float64(params), np.asarray(found.tokens[:, 0], np.float64)
    if head == "vqa":  # from the state of [MASK], before the last [SEP]
        mask = np.stack([tokens[0, 5], tokens[1, 2]])
        expected = dense(p["vqa"]["out"], transform(p["vqa"]["transform"], mask))
    else:
        expected = dense(p["ve"]["out"], pooled(p, tokens[:, 0]))
    close(found.logits, expected)
    np.testing.assert_array_equal(found.outputs[head][:, 0], found.logits)


def test_the_record(params, batch, features):
    assert features.image.shape == features.text.shape == (2, 3, 16)
    assert features.regions.shape == (2, 3, 4, 16)
    np.testing.assert_array_equal(features.image, features.regions[:, :, 0])
    close(features.words[0, 0, 2], (features.tokens[0, 0, 4] + features.tokens[0, 0, 5]) / 2, 1e-6)
    seen = jitted(MODEL, attention=True, heads=())(params, batch)
    cases.check_attention(seen, 7 + 4 + 1)


def test_padding_and_other_texts_have_no_influence(apply, params, batch, features):
    cases.check_influence(MODEL, apply, params, batch, features, choice=0, atol=1e-5)
    # A token's object counts, and so does its picture.
    tags = batch["token_regions"].copy()
    tags[:, :, 1] = 1 - tags[:, :, 1]
    assert np.abs(apply(params, dict(batch, token_regions=tags)).text - features.text).max() > 1e-3


def test_gradients_are_finite_and_reach_everything(params, batch):
    cases.checked_gradient(MODEL, params, batch)


def test_dropout_of_inputs_and_of_the_answer(batch):
    """An image is dropped once for all its texts, as in the original; the answer's state for each."""
    model = VlBert(
        dataclasses.replace(
            CONFIG, dropout=0.0, attention_dropout=0.0, feature_dropout=0.5, head_dropout=0.5
        ),
        ("vcr",),
    )
    params = cases.random_params(model)
    rows = {name: np.repeat(x[:, :1], 3, 1) if x.shape[1:2] == (3,) else x for name, x in batch.items()}
    key = jax.random.key(0, impl="unsafe_rbg")
    calm = jitted(model)(params, rows)
    found = jitted(model, train=True, rngs={"dropout": key})(params, rows)
    assert (found.text != calm.text).any()
    np.testing.assert_array_equal(found.text[:, 0], found.text[:, 1])
    assert (found.logits[:, 0] != found.logits[:, 1]).any()
    np.testing.assert_array_equal(calm.logits[:, 0], calm.logits[:, 1])


def test_wrong_inputs_are_refused(params, batch):
    def refused(match, batch=batch, heads=()):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda: VlBert(CONFIG, heads).apply({"params": params}, batch))

    bare = {name: x for name, x in batch.items() if name != "token_regions"}
    refused("VlBert reads .*; the batch has no token_regions", bare)
    refused("there is no head 'mrfr'; there is vcr, ve", heads=("mrfr",))
    refused("'mrc' can hide regions", dict(batch, masked_regions=batch["region_mask"]))
    refused("no token_delta or region_delta", dict(batch, region_delta=batch["regions"]))
    longer = {k: np.concatenate([x, x[:, :, :1]], 2) if x.shape[2:3] == (7,) else x for k, x in batch.items()}
    refused(r"8 tokens a text, but VL-BERT has 9 positions, objects and \[END\] included", longer)


def test_parameter_names_suit_rules_by_name():
    cases.check_names(MODEL)
