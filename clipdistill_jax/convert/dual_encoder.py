"""A dual encoder as a folder of plain files: config.json, model.safetensors and two StableHLO functions.

The weights lie in model.safetensors alone; both functions take them as their first argument. config.json
describes the model as `models.build` wants it, what it eats, and the SHA-256 of the other files.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Bool, Float, Int, UInt8

from clipdistill_jax.convert import files
from clipdistill_jax.models.build import build_model
from clipdistill_jax.models.dual_encoder import DualEncoder, Given
from clipdistill_jax.models.temporal import unit

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FUNCTIONS = {"encode_video": "encode_video.stablehlo", "encode_text": "encode_text.stablehlo"}
MODEL_TYPE = "clipdistill_jax"
LAYOUT = 1  # raised when newer code no longer reads what older code wrote
PLATFORMS = ("cpu", "cuda", "tpu")

Weights = dict[str, Any]  # "params.vision.stem.kernel" -> array; see `flat`


def flat(variables: Mapping[str, Any]) -> Weights:
    """{"params": ..., "batch_stats": ...} with names joined by dots, as model.safetensors has them."""
    return flax.traverse_util.flatten_dict(dict(variables), sep=".")


@functools.partial(jax.jit, static_argnums=0)
def encode_video(
    module: DualEncoder,
    weights: Weights,
    frames: UInt8[Given, "b f h w 3"],
    frame_mask: Bool[Given, "b f"],
) -> Float[Array, "b d"]:
    """Vectors of unit length [B, D] of clips. frames: RGB in time order; frame_mask: False on padding."""
    variables = flax.traverse_util.unflatten_dict(weights, sep=".")
    seen: Any = module.apply(variables, frames, frame_mask, method="encode_video")
    return seen.video


@functools.partial(jax.jit, static_argnums=0)
def encode_text(
    module: DualEncoder,
    weights: Weights,
    tokens: Int[Given, "b t"],
    token_mask: Bool[Given, "b t"],
    word_ids: Int[Given, "b t"],
) -> Float[Array, "b d"]:
    """Vectors of unit length [B, D] of texts; the arguments are those of `data.text.Tokens`."""
    variables = flax.traverse_util.unflatten_dict(weights, sep=".")
    said: Any = module.apply(variables, tokens, token_mask, word_ids, method="encode_text")
    return unit(said.text)


def inputs(config: Mapping[str, Any], size: Any) -> dict[str, tuple[jax.ShapeDtypeStruct, ...]]:
    """Shapes of what the two functions take after the weights, for a batch of `size` (also symbolic)."""
    frames, side = config["video"]["num_frames"], config["video"]["image_size"]
    text = (size, config["text"]["max_tokens"])

    def shape(*args: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(*args)

    return {
        "encode_video": (
            shape((size, frames, side, side, 3), jnp.uint8),
            shape((size, frames), jnp.bool_),
        ),
        "encode_text": (shape(text, jnp.int32), shape(text, jnp.bool_), shape(text, jnp.int32)),
    }


def weight_shapes(module: DualEncoder, config: Mapping[str, Any]) -> Weights:
    """Shapes of the module's weights under the names of `flat`; nothing is computed."""
    names = ("frames", "frame_mask", "tokens", "token_mask", "word_ids")
    given = (x for shapes in inputs(config, 2).values() for x in shapes)
    batch = dict(zip(names, given, strict=True))
    return flat(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, method="complete"), batch))


def check_weights(
    weights: Mapping[str, Any], module: DualEncoder, config: Mapping[str, Any], source: str
) -> None:
    """Raises ValueError where names or shapes are not the module's; names the first of them."""
    wanted = {name: tuple(x.shape) for name, x in weight_shapes(module, config).items()}
    found = {name: tuple(np.shape(x)) for name, x in weights.items()}
    wrong = [
        f"{name}: expected {wanted.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        raise ValueError(f"{source}: the weights do not fit the model: {'; '.join(wrong[:5])}")


def lower(module: DualEncoder, config: Mapping[str, Any], weights: Weights) -> dict[str, jax.export.Exported]:
    """Both functions as StableHLO, for any batch size and all of `PLATFORMS`."""
    (size,) = jax.export.symbolic_shape("b")
    given = {name: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for name, x in weights.items()}

    def video(weights: Weights, frames: Any, frame_mask: Any) -> Any:
        return encode_video(module, weights, frames, frame_mask)

    def text(weights: Weights, tokens: Any, token_mask: Any, word_ids: Any) -> Any:
        return encode_text(module, weights, tokens, token_mask, word_ids)

    made: dict[str, Callable[..., Any]] = {"encode_video": video, "encode_text": text}
    return {
        name: jax.export.export(jax.jit(made[name]), platforms=PLATFORMS)(given, *shapes)
        for name, shapes in inputs(config, size).items()
    }


def write(folder: Path, config: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Writes weights, functions and, last, config.json into an existing folder.

    Args:
      folder: where to.
      config: `model` (for `build_model`, complete), `video` (num_frames, image_size ...), `text` (max_tokens
        ...) and whatever else is to be said, json-able; `model_type`, `layout`, `stablehlo` and `files` are
        added.
      variables: {"params", "batch_stats" ...}, host arrays.

    Raises:
      ValueError: the variables are not the model's.
    """
    module, weights = build_model(config["model"]), flat(variables)
    check_weights(weights, module, config, str(folder))
    # Not ascontiguousarray, which makes a vector of a scalar.
    tensors = {name: np.asarray(x, order="C") for name, x in weights.items()}
    # Not save_file, which lets nobody else read the file.
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "flax"}))
    for name, function in lower(module, config, weights).items():
        (folder / FUNCTIONS[name]).write_bytes(function.serialize())
    said = {
        "model_type": MODEL_TYPE,
        "layout": LAYOUT,
        **config,
        "stablehlo": {"platforms": PLATFORMS, "jax": jax.__version__},
        "files": {name: _sha256(folder / name) for name in (WEIGHTS, *FUNCTIONS.values())},
    }
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def read_module(folder: Path, config: Mapping[str, Any], weights: Weights) -> DualEncoder:
    """The module that config.json describes. Raises ValueError where the weights do not fit it."""
    try:
        module = build_model(config["model"])
        check_weights(weights, module, config, str(folder / WEIGHTS))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error!r}") from error
    return module


def read_weights(folder: Path, config: Mapping[str, Any]) -> Weights:
    """The weights, host arrays.

    Raises:
      FileNotFoundError: model.safetensors is not there.
      ValueError: it was damaged or changed.
    """
    _check_file(folder, config, WEIGHTS)
    return files.read_weights(folder / WEIGHTS)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of such a folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it cannot be read, or is another program's.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not an exported model (no {CONFIG}): python -m clipdistill_jax.export writes one"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): export again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        raise ValueError(f"{path}: model_type is {kind!r}, not {MODEL_TYPE!r}: this program did not write it")
    if config.get("layout") != LAYOUT:
        raise ValueError(f"{path}: layout {config.get('layout')!r} is not {LAYOUT}: export again")
    return config


def read_functions(folder: Path, config: Mapping[str, Any]) -> dict[str, jax.export.Exported]:
    """name -> StableHLO function of (weights, *inputs).

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: it was damaged or changed, or this version of JAX cannot read it.
    """
    made = {}
    for name, file in FUNCTIONS.items():
        _check_file(folder, config, file)
        try:
            made[name] = jax.export.deserialize(bytearray((folder / file).read_bytes()))
        except Exception as error:  # of an older or a newer JAX, say; the reader raises what it meets
            raise ValueError(
                f"{folder / file} was written by JAX {config['stablehlo']['jax']}; JAX {jax.__version__} "
                f"cannot read it: {error}. Export again"
            ) from error
    return made


def _check_file(folder: Path, config: Mapping[str, Any], name: str) -> None:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name}: no such file; copy it there, or export again")
    if _sha256(folder / name) != config.get("files", {}).get(name):
        raise ValueError(
            f"{folder / name} is damaged or was changed: its SHA-256 is not the one in {CONFIG}. "
            "Copy it again, or export again"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
