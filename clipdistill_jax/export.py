"""Writes a trained stage as a folder that stands by itself, and reads such folders.

    python -m clipdistill_jax.export --stage=runs/quickstart/distilled --out=student

The folder holds the model without its projections and its optimizer: config.json, model.safetensors, the
tokenizer, both encoders as StableHLO (CPU, GPU and TPU, any batch size) and a model card. It is read back and
compared with the model before it gets its name. With --format=clip the folder is a Hugging Face directory of
CLIP: what the `clip` of another run can be.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from clipdistill_jax.convert import dual_encoder, hf_clip
from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.tokenizer import load_tokenizer
from clipdistill_jax.distill.teacher import fingerprint
from clipdistill_jax.experiment import MODELS, Config, plain, stage_config, stage_module
from clipdistill_jax.model_card import model_card
from clipdistill_jax.models.build import build_model
from clipdistill_jax.models.clip import ClipText, ClipVision
from clipdistill_jax.models.dual_encoder import MAX_LOG_SCALE, DualEncoder
from clipdistill_jax.models.temporal import TightTransf
from clipdistill_jax.weights import stage_variables

SIZES = (1, 3)  # batch sizes of the comparison
# Largest distance between two vectors of unit length that are taken for the same: float32 on a CPU; and
# bfloat16, to which accelerators also round the factors of a float32 product.
SAME, SAME_ROUNDED = 1e-5, 5e-2
DTYPES = ("float32", "bfloat16")
_PROBES = ["a man plays a guitar", "Two 2nd-hand CAFÉS, don't... stop!", ""]


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """An exported model, ready to use; B clips or texts at a time.

    Attributes:
      config: contents of config.json.
      tokenizer: of its text tower.
      encode_video: (frames uint8 [B, F, H, W, 3], frame_mask bool [B, F]) -> [B, D] of unit length.
      encode_text: (tokens int32 [B, T], token_mask bool [B, T], word_ids int32 [B, T]) -> [B, D].
    """

    config: dict[str, Any]
    tokenizer: Tokenizer
    encode_video: Callable[..., Any]
    encode_text: Callable[..., Any]

    def encode_sentences(self, texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """Vectors [B, D] of unit length of texts in words; of a long one the first tokens count."""
        tokens = self.tokenizer.encode(list(texts), self.config["text"]["max_tokens"])
        return np.asarray(self.encode_text(*tokens))


def load_exported(folder: str | os.PathLike[str], *, stablehlo: bool = False) -> ExportedModel:
    """Reads a folder that `export_stage` wrote; nothing else of the training run is needed.

    Args:
      folder: the folder.
      stablehlo: use the StableHLO functions, in place of this package's modules.

    Raises:
      FileNotFoundError: the folder or one of its files is not there.
      ValueError: it is no exported model, or a file was damaged or changed.
    """
    folder = Path(folder).expanduser()
    config = dual_encoder.read_config(folder)
    tokenizer, weights = load_tokenizer(folder), dual_encoder.read_weights(folder, config)
    video: Callable[..., Any]
    text: Callable[..., Any]
    if stablehlo:
        functions = dual_encoder.read_functions(folder, config)
        video, text = (jax.jit(functions[name].call) for name in dual_encoder.FUNCTIONS)
    else:
        module = dual_encoder.read_module(folder, config, weights)
        video = partial(dual_encoder.encode_video, module)
        text = partial(dual_encoder.encode_text, module)
    weights = jax.device_put(weights)
    return ExportedModel(config, tokenizer, partial(video, weights), partial(text, weights))


def export_stage(stage: Path, out: Path, dtype: str = "float32") -> dict[str, float]:
    """Writes the model of a finished stage to a new folder.

    Args:
      stage: folder of the stage; its parent is the run's workdir.
      out: the folder to make; it appears whole and checked, or not at all.
      dtype: what the model computes in, whatever it was trained in. Weights are float32 in any case.

    Returns:
      form -> largest distance between its vectors and the model's; see `compare`.

    Raises:
      FileNotFoundError: no such stage, or it is not finished.
      ValueError: `out` is not empty; the model has no vector for a clip; what was written differs.
    """
    out = _free(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    config, result, tokenizer, variables = _finished(stage)
    described = describe(config, result, variables, tokenizer, dtype)
    kind = config["stages"][result["stage"]]["model"]
    computing = {**config, kind: {**config[kind], "dtype": dtype, "remat": False}}
    module = stage_module(computing, result["stage"], {kind: tokenizer.vocab_size})
    with _whole(out) as folder:
        _write_tokenizer(folder, tokenizer, described["text"]["max_tokens"])
        dual_encoder.write(folder, described, variables)
        found = compare(folder, module, variables, tokenizer)
        (folder / "README.md").write_text(model_card(config, described, result), encoding="utf-8")
    return found


def export_clip(stage: Path, out: Path) -> None:
    """Writes the CLIP of a finished stage as a Hugging Face directory: weights in float32, tokenizer.

    `CLIPModel.from_pretrained` reads it, and a config takes it wherever it takes CLIP's hub id.

    Args:
      stage, out: as in `export_stage`.

    Raises:
      FileNotFoundError: no such stage, or it is not finished.
      ValueError: `out` is not empty; a tower is not CLIP's, or the temporal head has weights of its own.
    """
    out = _free(out)
    config, result, tokenizer, variables = _finished(stage)
    name, params = result["stage"], variables["params"]
    module = stage_module(config, name, dict.fromkeys(MODELS, tokenizer.vocab_size))
    vision, text = module.vision, module.text
    if not (isinstance(vision, ClipVision) and isinstance(text, ClipText)) or "temporal" in params:
        raise ValueError(f"stage {name!r} is no CLIP: its towers are others, or it has a temporal head")
    said = dataclasses.replace(text.config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eot_id)
    with _whole(out) as folder:
        _write_tokenizer(folder, tokenizer, text.config.context_length)
        hf_clip.save(folder, (vision.config, said), params)
        if fingerprint(hf_clip.load(folder)[2]) != fingerprint(params):
            raise ValueError("what was written is not the model: its weights read back differ")


def _free(out: Path) -> Path:
    out = out.expanduser().absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already and is no empty folder: give another --out, or remove it")
    return out


def _finished(stage: Path) -> tuple[Config, dict[str, Any], Tokenizer, dict[str, Any]]:
    """Config, result, tokenizer and variables of a finished stage."""
    from clipdistill_jax.run import run_folders  # here, so that a reader of folders does without the trainer

    stage = stage.expanduser().resolve()
    config, result = _read(stage / "config.json"), _read(stage / "result.json")
    home = run_folders(config, stage.parent)[-1]  # where the data and the trained tokenizers lie
    tokenizer, variables = _tokenizer(config, result["stage"], home), stage_variables(stage)
    if fingerprint(variables) != result["fingerprint"]:
        raise ValueError(
            f"{stage / 'result.json'} is of other weights than the checkpoint of step {result['step']}: "
            "run the stage to its end"
        )
    return config, result, tokenizer, variables


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name `out` at the end, or vanishes at an error."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
    folder.mkdir(parents=True)
    try:
        yield folder
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, length: int) -> None:
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    tokenizer.backend.model.save(str(folder))  # vocab.json and merges.txt, or vocab.txt
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")


def describe(
    config: Config, result: Mapping[str, Any], variables: Any, tokenizer: Tokenizer, dtype: str
) -> dict[str, Any]:
    """What config.json says of a stage's model.

    Raises:
      ValueError: the model scores pairs and has no vector for a clip.
    """
    stage, data = stage_config(config, result["stage"]), config["data"]
    spec = {**plain(config[stage["model"]]), "dtype": dtype, "remat": False}
    if stage["temporal"]:
        spec["temporal"] = {"kind": stage["temporal"]}
    spec["text"] = {**spec.get("text", {"kind": "clip"}), "vocab_size": tokenizer.vocab_size}
    module = build_model(spec)
    if isinstance(module.temporal, TightTransf):
        raise ValueError(
            f"stage {result['stage']!r}: its temporal head (tightTransf) scores every pair of text and clip "
            "together; there is no vector of a clip to export or to search"
        )
    vision: Any = module.vision
    pixels = getattr(vision, "config", vision)  # CLIP's tower has a record of its fields
    made = {
        "stage": result["stage"],
        "step": result["step"],
        "fingerprint": result["fingerprint"],
        "model": spec,
        "logit_scale": float(np.exp(min(variables["params"]["logit_scale"], MAX_LOG_SCALE))),
        "video": {
            "fps": data["fps"],
            "max_frames": data["max_frames"],
            "num_frames": stage["num_frames"] or data["num_frames"],
            "image_size": data["image_size"],
            "mean": list(pixels.mean),
            "std": list(pixels.std),
        },
        "text": {"max_tokens": data["max_tokens"], "vocab_size": tokenizer.vocab_size},
    }
    text = dual_encoder.inputs(made, 1)["encode_text"]
    vector = jax.eval_shape(partial(dual_encoder.encode_text, module), dual_encoder.flat(variables), *text)
    return {**made, "embed_dim": vector.shape[-1]}


def compare(
    folder: Path, module: DualEncoder, variables: Mapping[str, Any], tokenizer: Tokenizer
) -> dict[str, float]:
    """Reads a folder back, both ways, and compares it with the model it was written from.

    Args:
      folder: what was written.
      module, variables: the model as the run has it.
      tokenizer: the run's.

    Returns:
      "safetensors" and "StableHLO" -> largest distance between unit vectors, of random batches of `SIZES`.

    Raises:
      ValueError: it is more than `SAME` (or `SAME_ROUNDED`), or the tokenizer gives other tokens.
    """
    weights, found = dual_encoder.flat(variables), {}
    for form in ("safetensors", "StableHLO"):
        loaded = load_exported(folder, stablehlo=form == "StableHLO")
        length = loaded.config["text"]["max_tokens"]
        both = zip(loaded.tokenizer.encode(_PROBES, length), tokenizer.encode(_PROBES, length), strict=True)
        if not all(np.array_equal(a, b) for a, b in both):
            raise ValueError(f"{folder}: the tokenizer that was written gives other tokens than the run's")
        distances = []
        for size in SIZES:
            clips, texts = random_inputs(loaded.config, size).values()
            ours = dual_encoder.encode_video(module, weights, *clips)
            distances.append(_distance(ours, loaded.encode_video(*clips)))
            ours = dual_encoder.encode_text(module, weights, *texts)
            distances.append(_distance(ours, loaded.encode_text(*texts)))
        found[form] = float(np.max(distances))  # NaN stays NaN
        rounded = loaded.config["model"]["dtype"] != "float32" or jax.default_backend() != "cpu"
        allowed = SAME_ROUNDED if rounded else SAME
        if not found[form] <= allowed:
            raise ValueError(
                f"what was written is not the model: vectors read back from {form} differ by "
                f"{found[form]:.2g}, more than {allowed:g}"
            )
    return found


def _distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b), axis=-1).max())


def random_inputs(config: Mapping[str, Any], size: int) -> dict[str, tuple[np.ndarray, ...]]:
    """Arguments of both functions: random pixels and tokens, the last rows with padding."""
    rng = np.random.default_rng(size)
    (frames, mask), (tokens, *_) = dual_encoder.inputs(config, size).values()
    real = np.arange(mask.shape[1]) < rng.integers(1, mask.shape[1], size, endpoint=True)[:, None]
    ends = rng.integers(2, tokens.shape[1], size, endpoint=True)
    said = np.arange(tokens.shape[1]) < ends[:, None]
    ids = rng.integers(0, config["text"]["vocab_size"], tokens.shape, dtype=np.int32)
    words = np.where(said, np.arange(tokens.shape[1]) - 1, -1).astype(np.int32)
    words[np.arange(size), ends - 1] = -1
    pixels = rng.integers(0, 256, frames.shape, dtype=np.uint8)
    return {"encode_video": (pixels, real), "encode_text": (ids, said, words)}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        why = "it has no config.json" if path.name == "config.json" else "the stage has not run to its end"
        raise FileNotFoundError(f"{path.parent} is not the folder of a finished stage: {why}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): run the stage again") from error


def _tokenizer(config: Config, stage: str, home: Path) -> Tokenizer:
    field = "tokenizer"
    if stage_config(config, stage)["model"] == "student" and config["data"].get("student_tokenizer"):
        field = "student_tokenizer"
    name = config["data"][field]
    return load_tokenizer(home / field if name.startswith("train:") else name)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clipdistill_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--stage", required=True, type=Path, help="folder of a stage, WORKDIR/STAGE")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="what it computes in")
    parser.add_argument("--format", default="encoders", choices=("encoders", "clip"), help="what is written")
    args = parser.parse_args(argv)
    try:
        if args.format == "clip":
            export_clip(args.stage, args.out)
            print(f"{args.out}: a Hugging Face directory of CLIP; read back and the same")
            return 0
        found = export_stage(args.stage, args.out, args.dtype)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    said = ", ".join(f"{form} {distance:.1e}" for form, distance in found.items())
    print(f"{args.out}: read back and the same as the model; largest distance of unit vectors: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
