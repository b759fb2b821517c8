"""Where a stage's weights start: files that others published, or an earlier stage of the run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill_jax.convert import clip4clip, files, hf_bert, hf_clip, mobilevit, openai_clip
from clipdistill_jax.models.clip import interpolate_positions
from clipdistill_jax.models.temporal import init_from_text
from clipdistill_jax.train import checkpoint

Tree = dict[str, Any]
STAGE = "stage:"
PARTS = ("model", "text", "vision", "temporal")


def stage_variables(folder: Path, step: int | None = None) -> Tree:
    """Variables of a trained stage, {"params", "batch_stats" ...}; the parameters' average where it was kept.

    Args:
      folder: of the stage.
      step: None takes `selected_step`.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    read = checkpoint.load(folder / "checkpoints", selected_step(folder) if step is None else step)
    params = read.get("ema") or read["params"]
    return {"params": params["student"], **read.get("model_state", {})}


def selected_step(folder: Path) -> int:
    """The step that a stage's result.json selected, or else the newest. Raises FileNotFoundError."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())["step"]
    return checkpoint.newest(folder / "checkpoints")


def find_stage(name: str, runs: Sequence[Path]) -> Path:
    """The folder of a trained stage: in the first of the runs that has it.

    Raises:
      FileNotFoundError: none has.
    """
    for run in runs:
        if (run / name / "checkpoints").is_dir():
            return run / name
    raise FileNotFoundError(f"stage {name!r} has no checkpoints in {', '.join(map(str, runs))}")


def read_source(source: str, runs: Sequence[Path]) -> Tree:
    """Variables {"params": {part: ...}, "batch_stats": ...} from wherever `source` points.

    Args:
      source: "stage:NAME", a stage trained before; a Hugging Face directory or hub id of CLIP, BERT or
        MobileViTv2; OpenAI's CLIP .pt; CLIP4Clip's pytorch_model.bin.N; timm's MobileViTv2.
      runs: folders of the run and of those it builds on, see `find_stage`.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is none of these, or tensors are missing, unknown or ill-shaped.
    """
    if source.startswith(STAGE):
        return stage_variables(find_stage(source.removeprefix(STAGE), runs))
    path = Path(source).expanduser()
    if not path.is_file():
        folder = files.resolve(source)
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} has no config.json: not a Hugging Face model") from error
        if kind == "clip":
            return {"params": hf_clip.load(source)[2]}
        if kind == "bert":
            return {"params": {"text": hf_bert.load(source, pooler=False)[1]}}
        if kind == "mobilevitv2":
            file = folder / "preprocessor_config.json"
            pixels = json.loads(file.read_text()) if file.is_file() else {}
            bgr = pixels.get("do_flip_channel_order", True)
            return _vision(mobilevit.from_huggingface(files.read_weights(folder), str(folder), bgr=bgr))
        raise ValueError(
            f"{folder}/config.json: model_type is {kind!r}; it can be 'bert', 'clip' or 'mobilevitv2'"
        )
    weights = files.read_weights(path)
    if "clip.visual.conv1.weight" in weights:
        return {"params": clip4clip.from_state_dict(weights, source).params}
    if "visual.conv1.weight" in weights:
        return {"params": openai_clip.from_state_dict(weights, source)[2]}
    if "stem.conv.weight" in weights:
        return _vision(mobilevit.from_timm(weights, source))
    raise ValueError(
        f"{source}: neither CLIP (OpenAI), CLIP4Clip nor MobileViTv2 (timm); it has "
        f"{', '.join(list(weights)[:3])} ... For Hugging Face models give the directory"
    )


def _vision(variables: Tree) -> Tree:
    return {"params": {"vision": variables["params"]}, "batch_stats": {"vision": variables["batch_stats"]}}


def read_clip(source: str, like: Tree, runs: Sequence[Path]) -> Tree:
    """Variables of raw CLIP from a source of `read_source`, in the tree of `like`.

    Raises:
      ValueError: the source lacks a part of it.
    """
    read = read_source(source, runs)
    if missing := set(like["params"]) - set(read["params"]):
        raise ValueError(f"clip: {source} has no {', '.join(sorted(missing))}: it must be a whole CLIP")
    params, stats = read_initial({"model": source}, like["params"], {}, runs)
    return {"params": params, **stats}


def read_initial(
    init: Mapping[str, Any], params: Tree, state: Tree, runs: Sequence[Path]
) -> tuple[Tree, Tree]:
    """A model's (params, model_state) with the parts that a config's `init` names read from elsewhere.

    Args:
      init: `model`, `text`, `vision`, `temporal`: sources as in `read_source`; "" leaves a part as it is.
        `model` is every part that the source has, the others that part alone. `temporal` may also be "text":
        the head's blocks and positions start as those of the text tower (CLIP4Clip modules/modeling.py:105).
      params: of the model as initialised, host arrays.
      state: its batch statistics, host arrays.
      runs: see `find_stage`.

    A ViT's position table is interpolated to the model's grid. A MobileViTv2 or a BERT of others has no
    projection to the joint space: the model's own stays. Of a deeper text tower the first blocks are taken.
    """
    unknown = sorted({name for name, value in init.items() if value} - set(PARTS))
    if unknown:
        raise ValueError(f"init has no {unknown[0]!r}; it can have {', '.join(PARTS)}")
    given: dict[str, Any] = {}
    stats: Tree = {}
    for key in PARTS:
        if not init.get(key) or (key, init[key]) == ("temporal", "text"):
            continue
        read = read_source(init[key], runs)
        for part, value in read["params"].items():
            if part == key or key == "model":
                given[part] = value
                if part in read.get("batch_stats", {}):
                    stats[part] = read["batch_stats"][part]
        if key != "model" and key not in read["params"]:
            raise ValueError(f"init.{key}: {init[key]} has no {key} part, only {', '.join(read['params'])}")
    if init.get("temporal") == "text":
        if "temporal" not in params:
            raise ValueError("init.temporal is 'text', but this temporal head has no parameters")
        text = given["text"] if "text" in given else params["text"]
        given["temporal"] = init_from_text(text, params["temporal"])
    made: Tree = {part: given.get(part, value) for part, value in params.items()}
    if "embedding" in params["vision"]:
        made["vision"] = {"embedding": params["vision"]["embedding"], **made["vision"]}
    if "text" in given:
        made["text"] = _first_blocks(given["text"], params["text"])
    if "position_embedding" in made["vision"]:
        made["vision"] = _fit_positions(made["vision"], params["vision"])
    if stats:
        state = {**state, "batch_stats": {**state.get("batch_stats", {}), **stats}}
    return made, state


def _fit_positions(vision: Tree, like: Tree) -> Tree:
    rows = np.shape(like["position_embedding"])[0]
    if np.shape(vision["position_embedding"])[0] == rows:
        return vision
    table = interpolate_positions(np.asarray(vision["position_embedding"]), round((rows - 1) ** 0.5))
    return {**vision, "position_embedding": table}


def _first_blocks(text: Tree, like: Tree) -> Tree:
    """A text tower's weights for one of fewer blocks, with the model's projection where they have none."""
    stack = "encoder" if "encoder" in like else "transformer"
    blocks = {name: block for name, block in text.get(stack, {}).items() if name in like[stack]}
    return {"projection": like["projection"], **text, stack: blocks}
