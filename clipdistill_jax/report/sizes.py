"""Parameters and FLOPs of a model: in all, and of each of its modules beside CLIPPING's Table 2."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.table import Table

from clipdistill_jax.experiment import Config, example_batch, plain, stage_config, stage_module
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch
from clipdistill_jax.models.joint import JointModel
from clipdistill_jax.report import poster

_BLOCKS = (
    "transformer",
    "encoder",
)  # a text tower's or a temporal head's blocks, without tables and projection


@dataclasses.dataclass(frozen=True)
class ModuleSize:
    """A module of a model.

    Attributes:
      name: vision, temporal, text or logit_scale.
      parameters: all of them.
      counted: those that Table 2 seems to count: of text and time the blocks alone, of vision all.
      flops: of the forward pass of one clip (text: of one caption); a multiply-add is two.
    """

    name: str
    parameters: int
    counted: int
    flops: float


def count(tree: Any) -> int:
    """Elements of all leaves."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def flops(fn: Any, *args: Any) -> float:
    """FLOPs of a function as XLA counts them before optimisation: a multiply-add is two.

    Custom calls (a fused attention kernel, say) are not counted; the models here use none.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # not every backend can count
        analysis: Any = jax.jit(fn).lower(*args).cost_analysis()
    return float(analysis.get("flops", 0.0))  # nothing is said of a function that computes nothing


def model_sizes(module: DualEncoder | JointModel, config: Config, stage: str) -> dict[str, Any]:
    """Parameters of each part, and forward FLOPs, of a stage's model.

    `flops_clip` and `flops_caption` of a dual encoder: the clip has the stage's number of frames at its size,
    the caption all of its tokens. `flops_question` of a student of questions: with all its choices, and as
    many tokens and regions as a batch can have.
    """
    batch = example_batch(config, stage, size=1)
    if isinstance(module, JointModel):
        return _question_sizes(module, batch)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, method="complete"))

    def clip(variables: Any, frames: Any, frame_mask: Any) -> Any:
        seen: Any = module.apply(variables, frames, frame_mask, method="encode_video")
        return seen.video

    def caption(variables: Any, tokens: Any, token_mask: Any, word_ids: Any) -> Any:
        said: Any = module.apply(variables, tokens, token_mask, word_ids, method="encode_text")
        return said.text

    return {
        "parameters": {part: count(tree) for part, tree in variables["params"].items()},
        "total": count(variables["params"]),
        "flops_clip": flops(clip, variables, batch["frames"], batch["frame_mask"]),
        "flops_caption": flops(caption, variables, batch["tokens"], batch["token_mask"], batch["word_ids"]),
    }


def _question_sizes(module: JointModel, batch: Batch) -> dict[str, Any]:
    batch = {name: batch[name] for name in module.inputs}
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, method="complete"))

    def answer(variables: Any, batch: Batch) -> Any:
        said: Any = module.apply(variables, batch)
        return said.outputs

    return {
        "parameters": {part: count(tree) for part, tree in variables["params"].items()},
        "total": count(variables["params"]),
        "flops_question": flops(answer, variables, batch),
    }


def module_sizes(module: DualEncoder, config: Config, stage: str) -> list[ModuleSize]:
    """Sizes of each module of a stage's model, the vision tower first."""
    batch = example_batch(config, stage, size=1)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, method="complete"))
    params = variables["params"]

    def cost(part: Callable[..., Any], *args: Any) -> float:
        return flops(lambda v, *given: module.apply(v, *given, method=part), variables, *args)

    images = batch["frames"][0]
    embedding = jax.eval_shape(
        lambda v, x: module.apply(v, x, method=lambda m, x: m.vision(x).embedding), variables, images
    )
    frames = jax.ShapeDtypeStruct((1, *embedding.shape), embedding.dtype)
    costs = {
        "vision": cost(lambda m, x: m.vision(x).embedding, images),
        "temporal": cost(lambda m, x, mask: m.temporal(x, mask), frames, batch["frame_mask"]),
        "text": cost(lambda m, x, mask: m.text(x, mask).embedding, batch["tokens"], batch["token_mask"]),
        "logit_scale": 0.0,
    }
    made = []
    for name, cost_of_one in costs.items():
        tree = params.get(name, {})
        blocks = [tree[key] for key in _BLOCKS if key in tree] if isinstance(tree, Mapping) else []
        counted = count(blocks) if blocks and name != "vision" else count(tree)
        made.append(ModuleSize(name, count(tree), counted, cost_of_one))
    return made


def sizes_table(sizes: list[ModuleSize], *, title: str, text: str) -> Table:
    """The sizes beside Table 2 in both readings.

    Args:
      sizes: as `module_sizes` gives them.
      title: of the table.
      text: kind of the text tower, "clip" or "bert": which of the poster's rows it is compared with.
    """
    made = Table(title=title, caption_justify="left", caption=_notes(sizes, text))
    made.add_column("module")
    for name in ("parameters", "of them counted", "GFLOPs", "half of them"):
        made.add_column(name, justify="right")
    for reading in poster.READINGS:
        made.add_column(f"poster, {reading}", justify="right")
    for size in sizes:
        row = {reading: rows.get(_part(size, text)) for reading, rows in poster.READINGS.items()}
        made.add_row(
            size.name,
            f"{size.parameters:,}",
            f"{size.counted:,}",
            _giga(size.flops),
            _giga(size.flops / 2),
            *(f"{_mega(found.parameters)} / {_giga(found.flops)}" if found else "" for found in row.values()),
        )
    total = sum(size.flops for size in sizes)
    made.add_section()
    made.add_row(
        "in all",
        f"{sum(size.parameters for size in sizes):,}",
        f"{sum(size.counted for size in sizes):,}",
        _giga(total),
        _giga(total / 2),
        *(_mega(sum(found.parameters for found in _rows(sizes, text, name))) for name in poster.READINGS),
    )
    return made


def _part(size: ModuleSize, text: str) -> str:
    """Its key in `poster.READINGS`; a temporal head without parameters has none."""
    return (text if size.name == "text" else size.name) if size.parameters else ""


def _rows(sizes: list[ModuleSize], text: str, reading: str) -> list[poster.Module]:
    rows = poster.READINGS[reading]
    return [rows[part] for size in sizes if (part := _part(size, text)) in rows]


def _notes(sizes: list[ModuleSize], text: str) -> str:
    temporal = any(size.name == "temporal" and size.parameters for size in sizes)
    printed = poster.TOTALS[text, temporal]
    return (
        f'The poster: CLIPPING, Table 2, parameters / "Flops" of {poster.FRAMES} frames. These are '
        "multiply-adds: compare half of our FLOPs, which is a little more, for all operations are counted. "
        "37.8M / 1.2G are those of 12 blocks on 32 tokens, 12.6M / 0.15G of 4 blocks on 12 frames: two "
        "labels look swapped. It counts blocks without embedding tables and projections, as the third column "
        f"does. In its Table 1 a model of such modules has {_mega(printed)} in all."
    )


def _mega(value: float | int) -> str:
    return f"{value / 1e6:.1f}M"


def _giga(value: float | int) -> str:
    return f"{value / 1e9:.3g}G" if value else "0"


def stage_sizes(config: Config, stage: str) -> tuple[Table, dict[str, Any]]:
    """The table of a stage's model, and its numbers, json-able.

    No tokenizer is read: a text tower has as many entries as "train:N" says, or those of its own kind
    (49,408 of CLIP, 30,522 of BERT), which are those of the published weights.
    """
    settings = plain(config)
    data, spec = settings["data"], stage_config(settings, stage)
    model = settings[spec["model"]]
    tokenizer = (spec["model"] == "student" and data["student_tokenizer"]) or data["tokenizer"]
    trained = tokenizer.startswith("train:")
    vocab = {spec["model"]: int(tokenizer.removeprefix("train:"))} if trained else None
    sizes = module_sizes(stage_module(settings, stage, vocab), settings, stage)
    frames, side = spec["num_frames"], data["image_size"]
    tokens = data["max_tokens"]
    title = f"stage {stage}: a clip of {frames} frames of {side} x {side}, a caption of {tokens} tokens"
    numbers = {"stage": stage, "frames": frames, "modules": [dataclasses.asdict(size) for size in sizes]}
    return sizes_table(sizes, title=title, text=model["text"]["kind"]), numbers
