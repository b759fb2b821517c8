"""Names and shapes in torch's spelling, and a post-norm encoder of torch's own, for tests of checkpoints."""

import numpy as np


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


def same(found, expected):
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
