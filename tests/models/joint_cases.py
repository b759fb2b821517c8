"""A batch of texts and regions, and slow NumPy pieces in float64, for the tests of UNITER and VL-BERT."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from clipdistill_jax.models.joint import param_shapes
from clipdistill_jax.models.uniter import UniterConfig
from clipdistill_jax.models.vl_bert import VlBertConfig

FEATURES = 6
LENGTHS = np.array([[7, 5, 3], [4, 7, 6]])  # of texts, two examples of three
REGIONS = np.array([4, 2])
BERT = {"vocab_size": 30, "context_length": 9, "width": 16, "layers": 1, "heads": 2, "mlp_width": 24}
CLASSES = {"feature_width": FEATURES, "answers": 11, "region_classes": 5}
UNITER = UniterConfig(**BERT, **CLASSES, types=4)
VL_BERT = VlBertConfig(**BERT, **CLASSES, waves=3, object_classes=4)


def make_batch(vocab: int, types: int, seed: int = 0) -> dict:
    """B=2, K=3, T=7, N=4; padding holds garbage."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (2, 4, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (2, 4, 2))], -1).astype(np.float32)
    token_mask = np.arange(7) < LENGTHS[..., None]
    inner = (np.arange(7) > 0) & (np.arange(7) < LENGTHS[..., None] - 1)
    word = np.array([-1, 0, 0, 1, 2, 2, 3])
    return {
        "tokens": rng.integers(1, vocab, (2, 3, 7)).astype(np.int32),
        "token_mask": token_mask,
        "types": rng.integers(0, types, (2, 3, 7)).astype(np.int32),
        "word_ids": np.where(inner, word, -1).astype(np.int32),
        "token_regions": np.where(inner, rng.integers(0, 2, (2, 3, 7)), 0).astype(np.int32),
        "regions": rng.normal(size=(2, 4, FEATURES)).astype(np.float32),
        "region_boxes": boxes,
        "region_mask": np.arange(4) < REGIONS[:, None],
        "image_size": np.array([[100, 120], [90, 95]], np.float32),
    }


def other_padding(batch: dict) -> dict:
    """The same batch with other garbage where nothing is real."""
    token, region = batch["token_mask"], batch["region_mask"]
    changed = dict(batch)
    changed["tokens"] = np.where(token, batch["tokens"], 3)
    changed["types"] = np.where(token, batch["types"], 1)
    changed["token_regions"] = np.where(token, batch["token_regions"], 3)
    changed["regions"] = np.where(region[..., None], batch["regions"], 70.0).astype(np.float32)
    changed["region_boxes"] = np.where(region[..., None], batch["region_boxes"], 0.0).astype(np.float32)
    return changed


def part(batch: dict, example: int, choice: int) -> dict:
    """One text and its image, without padding."""
    t, n = LENGTHS[example, choice], REGIONS[example]
    made = {}
    for name, x in batch.items():
        if x.shape[1] == 3:
            length = n if name == "region_delta" else t
            made[name] = x[example : example + 1, choice : choice + 1, :length]
        else:
            made[name] = x[example : example + 1] if name == "image_size" else x[example : example + 1, :n]
    return made


def random_params(model, seed: int = 0):
    """Parameters of which none is a plain 0 or 1."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        return (rng.normal(size=x.shape) * 0.3 + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, param_shapes(model))


def jitted(model, **static):
    """(params, batch) -> what the model says, compiled fast rather than well."""
    return quick_jit(lambda params, batch: model.apply({"params": params}, batch, **static))


def quick_jit(function, **options):
    return jax.jit(function, **options, compiler_options={"xla_backend_optimization_level": 0})


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def transform(p, x):
    x = gelu(dense(p["dense"], x))
    return norm(p["ln"], x) if "ln" in p else x


def pooled(params, text):
    return np.tanh(dense(params["pooler"]["dense"], text))


def check_influence(model, apply, params, batch, features, choice, atol):
    """Padding has none at all; other texts and images have none on that text of the second example."""
    other = apply(params, other_padding(batch))
    for name in ("image", "text", "logits"):
        np.testing.assert_array_equal(getattr(other, name), getattr(features, name))
    real, seen = batch["token_mask"], np.broadcast_to(batch["region_mask"][:, None], (2, 3, 4))
    np.testing.assert_array_equal(np.asarray(other.tokens)[real], np.asarray(features.tokens)[real])
    np.testing.assert_array_equal(np.asarray(other.regions)[seen], np.asarray(features.regions)[seen])
    alone = jitted(model, heads=("vcr",))(params, part(batch, 1, choice))  # other sums: not bit by bit
    close(alone.tokens[0, 0], np.asarray(features.tokens[1, choice, : LENGTHS[1, choice]]), 1e-5)
    close(alone.regions[0, 0], np.asarray(features.regions[1, choice, : REGIONS[1]]), 1e-5)
    close(alone.logits[0, 0], np.asarray(features.logits[1, choice]), atol)


def check_attention(seen, blocks):
    """Weights of the second example's first text: 4 of 7 tokens, 2 of 4 regions, and what comes after."""
    assert seen.attention.shape == (2, 3, 1, 2, blocks, blocks)
    np.testing.assert_allclose(np.asarray(seen.attention).sum(-1), 1, atol=1e-6)
    weights = np.asarray(seen.attention[1, 0])
    assert (weights[..., 4:7] == 0).all() and (weights[..., 9:11] == 0).all()
    assert (weights[..., :4] > 0).all() and (weights[..., 7:9] > 0).all() and (weights[..., 11:] > 0).all()


def checked_gradient(model, params, batch):
    """Finite, and of everything; also with an example that is all padding, as the last batch has."""
    batch = dict(batch, masked_regions=np.array([[False, True, False, False]] * 2))
    for name in ("regions", "region_boxes", "image_size"):
        batch[name] = batch[name] * np.array([1, 0], np.float32).reshape(2, *[1] * (batch[name].ndim - 1))
    batch["region_mask"] = batch["region_mask"] & np.array([[True], [False]])
    batch["token_mask"] = batch["token_mask"] & np.array([True, False])[:, None, None]

    def loss(params):
        features = model.apply({"params": params}, batch)
        outputs = sum(jnp.sum(jnp.sin(x[0])) for x in features.outputs.values())
        return outputs + jnp.sum(jnp.sin(features.image[0])), features

    gradient, features = quick_jit(jax.grad(loss, has_aux=True))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), name
        # A key's bias adds the same to all of a query's scores.
        assert np.abs(leaf).max() > 0 or name.endswith("attn/k/bias"), name
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(features))
    return gradient


def check_names(model):
    """Sharding and weight decay are decided by the names of the parameters."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(model)):
        parts = [str(key.key) for key in path]
        assert parts[-1] in ("kernel", "bias", "scale", "embedding")
        assert parts[-1] != "scale" or parts[-2].startswith("ln")
        assert parts[-1] not in ("kernel", "embedding") or leaf.ndim == 2


def close(found, expected, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=atol)


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
