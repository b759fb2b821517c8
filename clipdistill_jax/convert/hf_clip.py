"""Hugging Face CLIP directories, read and written.

Source of the names: huggingface/transformers models/clip/modeling_clip.py and modeling_flax_clip.py.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from clipdistill_jax.convert import files
from clipdistill_jax.convert.rules import CONV, DENSE, Rule, dense, norm, same, to_ours, to_theirs, under
from clipdistill_jax.models.clip import ClipTextConfig, ClipVisionConfig, interpolate_positions, param_shapes

Configs = tuple[ClipVisionConfig, ClipTextConfig]

BLOCK = [
    *norm("layer_norm1", "ln_1"),
    *norm("layer_norm2", "ln_2"),
    *dense("self_attn.q_proj", "attn/q"),
    *dense("self_attn.k_proj", "attn/k"),
    *dense("self_attn.v_proj", "attn/v"),
    *dense("self_attn.out_proj", "attn/o"),
    *dense("mlp.fc1", "mlp/fc1"),
    *dense("mlp.fc2", "mlp/fc2"),
]

# Ours -> theirs, for the fields of either tower that Hugging Face's configuration has too.
FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "act": "hidden_act",
    "ln_eps": "layer_norm_eps",
}
VISION_FIELDS = {**FIELDS, "image_size": "image_size", "patch_size": "patch_size"}
TEXT_FIELDS = {
    **FIELDS,
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}

# Buffers that old versions saved: 0, 1, 2, ...
BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def rules(vision: ClipVisionConfig, text: ClipTextConfig) -> list[Rule]:
    """The table of names for towers of these sizes."""
    made = [
        *same("logit_scale", "logit_scale"),
        Rule("visual_projection.weight", ("vision/projection/kernel",), DENSE),
        Rule("text_projection.weight", ("text/projection/kernel",), DENSE),
        *same("vision_model.embeddings.class_embedding", "vision/class_embedding"),
        Rule("vision_model.embeddings.patch_embedding.weight", ("vision/patch_embedding/kernel",), CONV),
        *same("vision_model.embeddings.position_embedding.weight", "vision/position_embedding"),
        *norm("vision_model.pre_layrnorm", "vision/ln_pre"),  # their spelling
        *norm("vision_model.post_layernorm", "vision/ln_post"),
        *same("text_model.embeddings.token_embedding.weight", "text/token_embedding/embedding"),
        *same("text_model.embeddings.position_embedding.weight", "text/position_embedding"),
        *norm("text_model.final_layer_norm", "text/ln_final"),
    ]
    for tower, layers in (("vision", vision.layers), ("text", text.layers)):
        for i in range(layers):
            made += under(f"{tower}_model.encoder.layers.{i}.", f"{tower}/transformer/block_{i}/", BLOCK)
    return made


def load(
    path_or_id: str | Path, image_size: int | None = None, revision: str | None = None
) -> tuple[ClipVisionConfig, ClipTextConfig, dict[str, Any]]:
    """Configurations and parameters {"vision", "text", "logit_scale"} of a CLIP directory or hub id.

    Reads config.json and model.safetensors, flax_model.msgpack or pytorch_model.bin (or their shards);
    pixel statistics come from preprocessor_config.json where there is one. Parameters are float32 NumPy.

    Args:
      path_or_id: a local directory, or else the name of a hub repository.
      image_size: pixels a side to use the vision tower at; its position table is interpolated.
      revision: of the hub repository.

    Raises:
      FileNotFoundError: a file is not there; ValueError: it is not CLIP's, or names and shapes do not fit.
    """
    folder = files.resolve(path_or_id, revision)
    config = _read_json(folder / "config.json")
    statistics = folder / "preprocessor_config.json"
    pixels = _read_json(statistics) if statistics.is_file() else {}
    return from_state_dict(files.read_weights(folder), config, image_size, pixels, source=str(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; a CLIP directory has one") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def from_state_dict(
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    image_size: int | None = None,
    pixels: Mapping[str, Any] | None = None,
    source: str = "state dict",
) -> tuple[ClipVisionConfig, ClipTextConfig, dict[str, Any]]:
    """As `load`, from tensors in memory (torch's or Flax's names) and the contents of config.json.

    pixels: contents of preprocessor_config.json, of which image_mean and image_std are taken.
    """
    vision, text = _configs(config, pixels or {}, source)
    state = {name: x for name, x in state.items() if name not in BUFFERS}
    if any(name.endswith(".kernel") for name in state):
        state = _torch_names(state)
    params = to_ours(state, rules(vision, text), param_shapes(vision, text), source)
    if image_size is not None and image_size != vision.image_size:
        vision, params = at_image_size(vision, params, image_size)
    return vision, text, params


def at_image_size(
    vision: ClipVisionConfig, params: Mapping[str, Any], image_size: int
) -> tuple[ClipVisionConfig, dict[str, Any]]:
    """The same weights for pictures of another size: the vision position table is interpolated.

    params holds "vision" (and anything else, kept). Raises ValueError where patches do not fill the size.
    """
    if image_size % vision.patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size {vision.patch_size}")
    vision = dataclasses.replace(vision, image_size=image_size)
    table = interpolate_positions(np.asarray(params["vision"]["position_embedding"]), vision.grid)
    return vision, {**params, "vision": {**params["vision"], "position_embedding": table}}


def _configs(config: Mapping[str, Any], pixels: Mapping[str, Any], source: str) -> Configs:
    from transformers import CLIPConfig  # slow to import, and only needed here

    if config.get("model_type") != "clip":
        raise ValueError(f"{source}: config.json is of a {config.get('model_type')!r} model, not 'clip'")
    whole = CLIPConfig.from_dict(dict(config))  # fills in what the file leaves out
    vision: dict[str, Any] = {ours: getattr(whole.vision_config, hf) for ours, hf in VISION_FIELDS.items()}
    text: dict[str, Any] = {ours: getattr(whole.text_config, hf) for ours, hf in TEXT_FIELDS.items()}
    for ours, hf in (("mean", "image_mean"), ("std", "image_std")):
        if hf in pixels:
            vision[ours] = tuple(pixels[hf])
    width = whole.projection_dim
    return ClipVisionConfig(**vision, projection_dim=width), ClipTextConfig(**text, projection_dim=width)


def _torch_names(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flax's tensors under torch's names and in torch's layout."""
    made = {}
    for name, x in state.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "kernel":
            axes = {2: DENSE, 4: (3, 2, 0, 1)}.get(np.ndim(x))
            made[f"{stem}.weight"] = np.transpose(x, axes)
        elif leaf in ("scale", "embedding") and stem:
            made[f"{stem}.weight"] = np.asarray(x)
        else:
            made[name] = np.asarray(x)
    return made


def to_state_dict(configs: Configs, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors under the names of torch's CLIPModel, from {"vision", "text", "logit_scale"}."""
    return to_theirs(params, rules(*configs))


def save(directory: str | Path, configs: Configs, params: Mapping[str, Any]) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors, for `CLIPModel.from_pretrained`.

    FlaxCLIPModel reads the directory too, with `from_pt=True`.

    Args:
      directory: made if need be; files of those names are replaced.
      configs: (vision, text).
      params: {"vision", "text", "logit_scale"}.
    """
    from transformers import CLIPConfig

    vision, text = configs
    if vision.projection_dim != text.projection_dim:
        raise ValueError(
            f"the towers' projections differ: vision {vision.projection_dim}, text {text.projection_dim}"
        )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = to_state_dict(configs, params)
    shared = {"projection_dim": vision.projection_dim}
    config = CLIPConfig(
        vision_config={hf: getattr(vision, ours) for ours, hf in VISION_FIELDS.items()} | shared,
        text_config={hf: getattr(text, ours) for ours, hf in TEXT_FIELDS.items()} | shared,
        architectures=["CLIPModel"],
        **shared,
    )
    config.save_pretrained(folder)
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")
    safetensors.numpy.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
