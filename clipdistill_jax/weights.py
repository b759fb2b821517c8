"""Where a stage's weights start: files that others published, or an earlier stage of the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill_jax.convert import clip4clip, files, hf_clip, mobilevit, openai_clip
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
      step: None takes the step that its result.json selected, or else the newest.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    result = folder / "result.json"
    if step is None and result.exists():
        step = json.loads(result.read_text())["step"]
    read = checkpoint.load(folder / "checkpoints", step)
    params = read.get("ema") or read["params"]
    return {"params": params["student"], **read.get("model_state", {})}


def read_source(source: str, workdir: Path) -> Tree:
    """Variables {"params": {part: ...}, "batch_stats": ...} from wherever `source` points.

    Args:
      source: "stage:NAME", an earlier stage of the run in `workdir`; a Hugging Face directory or hub id of
        CLIP or MobileViTv2; OpenAI's CLIP .pt; CLIP4Clip's pytorch_model.bin.N; timm's MobileViTv2.
      workdir: folder of the run.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is none of these, or tensors are missing, unknown or ill-shaped.
    """
    if source.startswith(STAGE):
        return stage_variables(workdir / source.removeprefix(STAGE))
    path = Path(source).expanduser()
    if not path.is_file():
        folder = files.resolve(source)
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} has no config.json: not a Hugging Face model") from error
        if kind == "clip":
            return {"params": hf_clip.load(source)[2]}
        if kind == "mobilevitv2":
            file = folder / "preprocessor_config.json"
            pixels = json.loads(file.read_text()) if file.is_file() else {}
            bgr = pixels.get("do_flip_channel_order", True)
            return _vision(mobilevit.from_huggingface(files.read_weights(folder), str(folder), bgr=bgr))
        raise ValueError(f"{folder}/config.json: model_type is {kind!r}; it can be 'clip' or 'mobilevitv2'")
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


def read_initial(init: Mapping[str, str], params: Tree, state: Tree, workdir: Path) -> tuple[Tree, Tree]:
    """A model's (params, model_state) with the parts that a config's `init` names read from elsewhere.

    Args:
      init: `model`, `text`, `vision`, `temporal`: sources as in `read_source`; "" leaves a part as it is.
        `model` is every part that the source has, the others that part alone. `temporal` may also be "text":
        the head's blocks and positions start as those of the text tower (CLIP4Clip modules/modeling.py:105).
      params: of the model as initialised, host arrays.
      state: its batch statistics, host arrays.
      workdir: folder of the run.

    A ViT's position table is interpolated to the model's grid. A MobileViTv2 of others has no projection to
    the joint space: the model's own stays.
    """
    unknown = sorted(set(init) - set(PARTS))
    if unknown:
        raise ValueError(f"init has no {unknown[0]!r}; it can have {', '.join(PARTS)}")
    given: dict[str, Any] = {}
    stats: Tree = {}
    for key in PARTS:
        if not init.get(key) or (key, init[key]) == ("temporal", "text"):
            continue
        read = read_source(init[key], workdir)
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
