"""Names and shapes in torch's spelling, an encoder of torch's own, comparisons of trees and of states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.models.bert import BertConfig, param_shapes
from tests.models import joint_cases as cases


def dense(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blocks(prefix, c):
    """Of BERT's encoder, written down from its modules."""
    made = {}
    for i in range(c.layers):
        layer = f"{prefix}encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            made |= dense(f"{layer}.attention.{part}", c.width, c.width)
        made |= norm(f"{layer}.attention.output.LayerNorm", c.width)
        made |= dense(f"{layer}.intermediate.dense", c.mlp_width, c.width)
        made |= dense(f"{layer}.output.dense", c.width, c.mlp_width)
        made |= norm(f"{layer}.output.LayerNorm", c.width)
    return made


def random_state(shapes, seed=0):
    """Tensors of which none is a plain 0 or 1."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        gain = name.endswith(".weight") and len(shape) == 1
        return (0.3 * rng.normal(size=shape) + gain).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def torch_encoder(state, prefix, c):
    """[S, C] -> [S, C]: torch's nn.TransformerEncoderLayer with the weights of BERT's blocks, no mask."""
    import torch

    layers = []
    for i in range(c.layers):
        own = {k: torch.tensor(x) for k, x in state.items() if k.startswith(f"{prefix}encoder.layer.{i}.")}
        own = {k.removeprefix(f"{prefix}encoder.layer.{i}."): x for k, x in own.items()}
        layer = torch.nn.TransformerEncoderLayer(
            c.width, c.heads, c.mlp_width, 0.0, "gelu", layer_norm_eps=c.ln_eps, batch_first=True
        ).eval()
        made = {}
        for kind in ("weight", "bias"):
            parts = [own[f"attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            made[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
            made[f"self_attn.out_proj.{kind}"] = own[f"attention.output.dense.{kind}"]
            made[f"linear1.{kind}"] = own[f"intermediate.dense.{kind}"]
            made[f"linear2.{kind}"] = own[f"output.dense.{kind}"]
            made[f"norm1.{kind}"] = own[f"attention.output.LayerNorm.{kind}"]
            made[f"norm2.{kind}"] = own[f"output.LayerNorm.{kind}"]
        layer.load_state_dict(made)
        layers.append(layer)

    def run(x):
        with torch.no_grad():
            return torch.nn.Sequential(*layers)(torch.tensor(np.asarray(x))[None])[0].numpy()

    return run


def compared_with_torch(state, prefix, model, params, batch, end=0):
    """Compares states with `torch_encoder`'s, in the original's layout: the real part of one text at a time.

    Args:
      end: positions after the regions.

    Yields:
      A text's "vcr" output, and what torch's states pool to.
    """
    encode = torch_encoder(state, prefix, model.config)
    features = cases.jitted(model)(params, batch)
    embedded, mask = cases.jitted(model, method="embed")(params, batch)
    for row, (example, choice) in enumerate(np.ndindex(2, 3)):
        states = encode(np.asarray(embedded[row])[np.asarray(mask[row])])
        length, count = cases.LENGTHS[example, choice], cases.REGIONS[example]
        assert len(states) == length + count + end
        close(features.tokens[example, choice, :length], states[:length])
        close(features.regions[example, choice, :count], states[length : length + count])
        yield features.outputs["vcr"][example, choice], cases.pooled(cases.float64(params), states[0])


def random_bert(**sizes):
    """Parameters of a BERT of the sizes of `cases.BERT`, with two layers, but for those given."""
    shapes, rng = param_shapes(BertConfig(**{**cases.BERT, "layers": 2, **sizes})), np.random.default_rng(3)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def flax_model(kind, folder):
    """transformers' Flax model of that name with the weights of a folder of torch's."""
    transformers = pytest.importorskip("transformers", reason="parity with transformers' models")
    if not hasattr(transformers, kind):
        pytest.skip("transformers 5 has no Flax models")
    kind = getattr(transformers, kind)
    initialise = kind.init_weights

    def zeros(self, key, input_shape, params=None):
        """Stands in for the slow random initialisation; every parameter is overwritten from the file."""
        shapes = jax.eval_shape(lambda key: initialise(self, key, input_shape), key)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "init_weights", zeros)
        return kind.from_pretrained(folder, from_pt=True)


def close(ours, theirs, atol=1e-5):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol)


def same(found, expected):
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
