"""OpenAI's tensor names: against a forward pass written on those names, and through its kinds of files."""

import jax
import numpy as np
import pytest

from clipdistill_jax.convert import files, openai_clip
from clipdistill_jax.convert.rules import Rule, to_theirs
from clipdistill_jax.models.clip import ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from tests.convert.originals import close, same_tree

torch = pytest.importorskip("torch", reason="parity with torch's fused attention")

VISION = ClipVisionConfig(
    image_size=32, patch_size=8, width=64, layers=3, heads=1, mlp_width=128, projection_dim=48
)
TEXT = ClipTextConfig(
    vocab_size=60,
    context_length=10,
    width=128,
    layers=2,
    heads=2,
    mlp_width=256,
    projection_dim=48,
    bos_token_id=58,
    eos_token_id=59,
)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(1, 59, (3, 10)).astype(np.int32)
    token_mask = np.arange(10) < np.array([[10], [7], [2]])
    tokens[np.arange(3), token_mask.sum(-1) - 1] = 59
    return pixels, np.where(token_mask, tokens, 0), token_mask


def openai_forward(state, pixels, tokens):
    """OpenAI's model on its own names, with torch's fused attention: (image, text) vectors."""
    functional = torch.nn.functional
    state = {name: torch.tensor(x) for name, x in state.items()}

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x, prefix, layers, mask):
        x = x.transpose(0, 1)  # torch's attention wants [T, B, C]
        for i in range(layers):
            name = f"{prefix}.resblocks.{i}"
            y = norm(x, f"{name}.ln_1")
            x = (
                x
                + functional.multi_head_attention_forward(
                    *(y, y, y, y.shape[-1], y.shape[-1] // 64),
                    *(state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"]),
                    *(None, None, False, 0.0),
                    *(state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"]),
                    need_weights=False,
                    attn_mask=mask,
                )[0]
            )
            y = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            x = x + linear(y * torch.sigmoid(1.702 * y), f"{name}.mlp.c_proj")
        return x.transpose(0, 1)

    weight = state["visual.conv1.weight"]
    x = functional.conv2d(torch.tensor(pixels.transpose(0, 3, 1, 2)), weight, stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = norm(torch.cat([first, x], 1) + state["visual.positional_embedding"], "visual.ln_pre")
    x = blocks(x, "visual.transformer", VISION.layers, None)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]

    x = state["token_embedding.weight"][torch.tensor(tokens).long()] + state["positional_embedding"]
    mask = torch.full((tokens.shape[1], tokens.shape[1]), float("-inf")).triu(1)
    x = norm(blocks(x, "transformer", TEXT.layers, mask), "ln_final")
    text = x[torch.arange(len(tokens)), torch.tensor(tokens).argmax(-1)] @ state["text_projection"]
    return image, text


@pytest.fixture(scope="module")
def openai_state():
    """Random tensors under OpenAI's names; the shapes are written out here, as OpenAI's model has them."""
    rng = np.random.default_rng(3)
    shapes = {
        "logit_scale": (),
        "visual.class_embedding": (64,),
        "visual.positional_embedding": (17, 64),
        "visual.conv1.weight": (64, 3, 8, 8),
        "visual.proj": (64, 48),
        "token_embedding.weight": (60, 128),
        "positional_embedding": (10, 128),
        "text_projection": (128, 48),
    }
    norms = {"visual.ln_pre": 64, "visual.ln_post": 64, "ln_final": 128}
    for prefix, width, layers in (("visual.transformer", 64, 3), ("transformer", 128, 2)):
        for i in range(layers):
            name = f"{prefix}.resblocks.{i}"
            norms |= {f"{name}.ln_1": width, f"{name}.ln_2": width}
            shapes[f"{name}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{name}.attn.in_proj_bias"] = (3 * width,)
            for layer, outputs, inputs in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 2 * width, width),
                ("mlp.c_proj", width, 2 * width),
            ):
                shapes[f"{name}.{layer}.weight"] = (outputs, inputs)
                shapes[f"{name}.{layer}.bias"] = (outputs,)
    state = {name: np.asarray(0.1 * rng.normal(size=shape), np.float32) for name, shape in shapes.items()}
    for name, width in norms.items():
        state[f"{name}.weight"] = np.asarray(1 + 0.1 * rng.normal(size=width), np.float32)
        state[f"{name}.bias"] = np.asarray(0.1 * rng.normal(size=width), np.float32)
    return state


def test_openai_names_equal_openais_model(openai_state, inputs):
    sizes = {"input_resolution": np.array(32), "context_length": np.array(10), "vocab_size": np.array(60)}
    vision, text, params = openai_clip.from_state_dict(openai_state | sizes)
    assert vision == VISION
    assert text == TEXT
    pixels, tokens, token_mask = inputs
    seen = jax.jit(ClipVision(vision).apply)({"params": params["vision"]}, pixels)
    said = jax.jit(ClipText(text).apply)({"params": params["text"]}, tokens, token_mask)
    image, expected = openai_forward(openai_state, pixels, tokens)
    close(seen.embedding, image)
    close(said.embedding, expected)

    back = openai_clip.to_state_dict(params)
    assert set(back) == set(openai_state)
    for name, x in openai_state.items():
        np.testing.assert_array_equal(back[name], x)


def test_openai_files_plain_half_and_torchscript(openai_state, tmp_path):
    expected = openai_clip.from_state_dict(openai_state)[2]
    half = {name: torch.tensor(x).half() for name, x in openai_state.items()}
    torch.save(half, tmp_path / "half.pt")
    torch.save(
        {"state_dict": {name: torch.tensor(x) for name, x in openai_state.items()}}, tmp_path / "a.bin.3"
    )

    class Holder(torch.nn.Module):
        """What the published archives are: a TorchScript module that holds the tensors."""

        def __init__(self):
            super().__init__()
            for name, x in openai_state.items():
                *path, leaf = name.split(".")
                module = self
                for part in path:
                    if part not in module._modules:
                        module.add_module(part, torch.nn.Module())
                    module = module._modules[part]
                module.register_parameter(leaf, torch.nn.Parameter(torch.tensor(x)))

        def forward(self, x):
            return x

    torch.jit.script(Holder()).save(str(tmp_path / "scripted.pt"))
    for name in ("a.bin.3", "scripted.pt"):
        same_tree(openai_clip.from_state_dict(files.read_weights(tmp_path / name))[2], expected)
    halved = openai_clip.from_state_dict(files.read_weights(tmp_path / "half.pt"))[2]
    assert {x.dtype for x in jax.tree.leaves(halved)} == {np.dtype(np.float32)}
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), expected)
    same_tree(halved, rounded)


def test_missing_unknown_and_illshaped_tensors_are_named(openai_state):
    state = dict(openai_state)
    state["ln_final.gain"] = state.pop("ln_final.weight")
    with pytest.raises(ValueError, match=r"x\.pt.*missing: ln_final\.weight; unknown: ln_final\.gain"):
        openai_clip.from_state_dict(state, "x.pt")
    state = openai_state | {"ln_final.bias": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match=r"ln_final\.bias \(5,\) gives \(5,\), not \(128,\)"):
        openai_clip.from_state_dict(state)
    state = openai_state | {"transformer.resblocks.1.attn.in_proj_bias": np.zeros(385, np.float32)}
    with pytest.raises(ValueError, match=r"in_proj_bias \(385,\) does not divide into 3"):
        openai_clip.from_state_dict(state)
    with pytest.raises(ValueError, match="ResNet"):
        openai_clip.from_state_dict({"visual.layer1.0.conv1.weight": np.zeros(1)})
    with pytest.raises(ValueError, match="not an OpenAI CLIP: no tensor 'visual.conv1.weight'"):
        openai_clip.from_state_dict({"a": np.zeros(1)})
    with pytest.raises(ValueError, match="missing: a; unknown: b"):
        to_theirs({"b": np.zeros(1)}, [Rule("x", ("a",))])
