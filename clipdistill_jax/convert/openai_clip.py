"""OpenAI's own names for CLIP's tensors. Source: openai/CLIP clip/model.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipdistill_jax.convert.rules import CONV, DENSE, Rule, dense, norm, same, to_ours, to_theirs, under
from clipdistill_jax.models.clip import ClipTextConfig, ClipVisionConfig, param_shapes

QKV_KERNELS = ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel")
QKV_BIASES = ("attn/q/bias", "attn/k/bias", "attn/v/bias")

BLOCK = [
    *norm("ln_1", "ln_1"),
    *norm("ln_2", "ln_2"),
    Rule("attn.in_proj_weight", QKV_KERNELS, DENSE),
    Rule("attn.in_proj_bias", QKV_BIASES),
    *dense("attn.out_proj", "attn/o"),
    *dense("mlp.c_fc", "mlp/fc1"),
    *dense("mlp.c_proj", "mlp/fc2"),
]

# Sizes that the published archives carry along with the tensors.
BUFFERS = ("input_resolution", "context_length", "vocab_size")


def rules(vision_layers: int, text_layers: int) -> list[Rule]:
    """The table of names for towers of so many blocks."""
    made = [
        *same("logit_scale", "logit_scale"),
        *same("visual.class_embedding", "vision/class_embedding"),
        *same("visual.positional_embedding", "vision/position_embedding"),
        Rule("visual.conv1.weight", ("vision/patch_embedding/kernel",), CONV),
        *norm("visual.ln_pre", "vision/ln_pre"),
        *norm("visual.ln_post", "vision/ln_post"),
        *same("visual.proj", "vision/projection/kernel"),
        *same("token_embedding.weight", "text/token_embedding/embedding"),
        *same("positional_embedding", "text/position_embedding"),
        *norm("ln_final", "text/ln_final"),
        *same("text_projection", "text/projection/kernel"),
    ]
    for i in range(vision_layers):
        made += under(f"visual.transformer.resblocks.{i}.", f"vision/transformer/block_{i}/", BLOCK)
    for i in range(text_layers):
        made += under(f"transformer.resblocks.{i}.", f"text/transformer/block_{i}/", BLOCK)
    return made


def configs_of(
    state: Mapping[str, Any], source: str = "state dict"
) -> tuple[ClipVisionConfig, ClipTextConfig]:
    """Sizes read off the tensors' shapes, as OpenAI does (clip/model.py:399-436); a head has 64 channels.

    Raises:
      ValueError: a ResNet tower, a tensor that tells a size is missing, or a width not a multiple of 64.
    """
    if any(name.startswith("visual.layer1.") for name in state):
        raise ValueError(f"{source}: a CLIP with a ResNet tower; only vision transformers are known here")

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"{source}: not an OpenAI CLIP: no tensor {name!r}")
        return tuple(np.shape(state[name]))

    def transformer(prefix: str, width: int) -> dict[str, Any]:
        if width % 64:
            raise ValueError(f"{source}: the width {width} of {prefix!r} is not a multiple of 64")
        start = f"{prefix}resblocks."
        layers = {name[len(start) :].split(".")[0] for name in state if name.startswith(start)}
        mlp_width = shape(f"{start}0.mlp.c_fc.weight")[0]
        return {"width": width, "layers": len(layers), "heads": width // 64, "mlp_width": mlp_width}

    vision_width, _, patch, _ = shape("visual.conv1.weight")
    grid = round((shape("visual.positional_embedding")[0] - 1) ** 0.5)
    vision = ClipVisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        projection_dim=shape("visual.proj")[1],
        **transformer("visual.transformer.", vision_width),
    )
    vocab_size, text_width = shape("token_embedding.weight")
    text = ClipTextConfig(
        vocab_size=vocab_size,
        context_length=shape("positional_embedding")[0],
        projection_dim=shape("text_projection")[1],
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        **transformer("transformer.", text_width),
    )
    return vision, text


def from_state_dict(
    state: Mapping[str, Any], source: str = "state dict"
) -> tuple[ClipVisionConfig, ClipTextConfig, dict[str, Any]]:
    """Configurations and float32 parameters {"vision", "text", "logit_scale"} of OpenAI's tensors.

    Half-precision tensors are widened. Raises ValueError on missing, unknown or ill-shaped tensors, by name.
    """
    state = {name: x for name, x in state.items() if name not in BUFFERS}
    vision, text = configs_of(state, source)
    params = to_ours(state, rules(vision.layers, text.layers), param_shapes(vision, text), source)
    return vision, text, params


def to_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """OpenAI's tensors (float32) from {"vision", "text", "logit_scale"}."""
    layers = (len(params[tower]["transformer"]) for tower in ("vision", "text"))
    return to_theirs(params, rules(*layers))
