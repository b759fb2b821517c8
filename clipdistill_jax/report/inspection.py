"""What students have taken over from CLIP and their teacher, and at what cost: figures of a finished run.

    python -m clipdistill_jax.report figures --workdir=runs/sweep \
        --stages=T_S_TAB/seed0/student,T_S_SAB/seed0/student

Writes PNG files and their numbers to WORKDIR/figures, and WORKDIR/report.html with them. Uses one device.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipdistill_jax.distill.layers import to_grid
from clipdistill_jax.evaluate.evaluator import Split
from clipdistill_jax.evaluate.retrieval import embed
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.report import reconstruction
from clipdistill_jax.report.alignment import Maps, agreement, alignment_picture, frame_word_maps, spread
from clipdistill_jax.report.opened import BATCH, Model, Opened
from clipdistill_jax.report.page import write_report
from clipdistill_jax.report.sections import FOLDER, Panel, Section, write_sections
from clipdistill_jax.report.tradeoff import COSTS, cost_points, tradeoff
from clipdistill_jax.sweep import ROW, SHARED
from clipdistill_jax.weights import STAGE

Numbers = dict[str, Any]
Made = tuple[Section, Numbers]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `figures` reads."""
    add = parser.add_argument
    add("--workdir", required=True, type=Path, help="folder of a run or of a sweep")
    add("--stages", required=True, help="students: their folders under it (ROW/seed0/student), with commas")
    add("--clip", default="", help='raw CLIP: "stage:NAME" or weights; if empty, the `clip` of the stages')
    add("--teacher", default="", help="stage whose layers are rebuilt; if empty, the `teacher` of the stages")
    add("--pairs", type=int, default=3, help="frame-word maps to draw")
    add("--clips", type=int, default=256, help="test clips whose layers are used, at most")


def figures(args: argparse.Namespace) -> str:
    """Makes the figures, writes WORKDIR/report.html with them, and says what they come to.

    Raises:
      FileNotFoundError: a stage is not there or has not finished.
      ValueError: the stages have several teachers or CLIPs and none is named.
    """
    names = args.stages.split(",")
    run = Opened(args.workdir.expanduser().resolve(), names)
    clip = args.clip or _only(run.stages, names, "clip")
    teacher = args.teacher or _only(run.stages, names, "teacher")
    students = [run.stage(name) for name in names]
    made: dict[str, Made] = {}
    said = []
    if clip:
        made["alignment"] = alignment_section(run.clip(clip), students, run.test, args.pairs)
    else:
        where = f"--clip=stage:NAME (in a sweep stage:{SHARED}/NAME)"
        said.append(f"No frame-word maps: name the raw CLIP by {where}, or its weights.")
    if teacher:
        fit = reconstruction.halves(min(len(run.test["video_ids"]), args.clips), run.test["pairs"])
        made["reconstruction"] = reconstruction_section(run.stage(teacher), students, fit)
    else:
        said.append("No reconstructions: none of the stages has a teacher; name one by --teacher=STAGE.")
    rows = sweep_rows(run.workdir)
    # The page draws the stages of a run against FLOPs itself.
    shown = tuple(COSTS) if rows else ("parameters",)
    rows = rows or {run.label(name): [result] for name, result in run.results.items()}
    made["cost"] = cost_section(rows, shown)

    used = {*names, teacher, clip.removeprefix(STAGE)}
    fingerprints = {name: result["fingerprint"] for name, result in run.results.items() if name in used}
    files = write_sections(run.workdir, [section for section, _ in made.values()], fingerprints)
    numbers = {name: value for name, (_, value) in made.items()}
    (run.workdir / FOLDER / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    write_report({**run.config, "stages": run.stages}, run.workdir, run.results)
    told = [section.text for section, _ in made.values()]
    page = f"The report: {run.workdir / 'report.html'}"
    return "\n".join([*said, *told, *map(str, files), page])


def _only(stages: Mapping[str, Any], names: Sequence[str], field: str) -> str:
    """What the stages that have this field say; "" where none does."""
    found = sorted({stages[name].get(field) or "" for name in names} - {""})
    if len(found) > 1:
        raise ValueError(f"the stages differ in `{field}` ({', '.join(found)}): name one by --{field}")
    return found[0] if found else ""


def alignment_section(
    clip: Model, students: Sequence[Model], test: Mapping[str, np.ndarray], pairs: int
) -> Made:
    """Frame-word maps of CLIP and of the students: their agreement over all pairs, and some of them drawn.

    Args:
      clip: raw CLIP.
      students: each with a label of its own.
      test: as `Dataset.describe` gives it.
      pairs: how many to draw, spread over the order of the last student's agreement with CLIP.

    Raises:
      ValueError: a model's maps do not vary, so that none has a correlation.
    """
    from clipdistill_jax.data.words import split_words

    own, captions = test["clip_of_text"], [str(caption) for caption in test["captions"]]
    theirs = model_maps(clip, own)
    ours = {model.label: model_maps(model, own) for model in students}
    agreed = {label: agreement(maps, theirs) for label, maps in ours.items()}
    numbers = {}
    for label, values in agreed.items():
        told = values[np.isfinite(values)]
        if not len(told):
            raise ValueError(f"{label}: its frame-word maps, or {clip.label}'s, are flat on every test pair")
        numbers[label] = {"correlation": float(told.mean()), "pairs": len(told)}
    chosen = [int(pair) for pair in spread(agreed[students[-1].label], pairs)]
    frames = _frames(clip.split, {int(own[pair]) for pair in chosen})
    panels = []
    for pair in chosen:
        maps = {clip.label: theirs, **ours}
        picture = alignment_picture(
            frames[int(own[pair])],
            split_words([captions[pair]])[0],
            {label: found.cosines[pair] for label, found in maps.items()},
            np.logical_and.reduce([found.mask[pair] for found in maps.values()]),
            {label: f"r = {values[pair]:.2f} with {clip.label}" for label, values in agreed.items()},
        )
        panels.append(Panel(f"“{captions[pair]}” ({test['video_ids'][own[pair]]})", picture))
    said = ", ".join(f"{found['correlation']:.2f} ({label})" for label, found in numbers.items())
    text = (
        "How to read it: the stronger a cell's colour, the closer a word (row) is to a frame (column) for "
        f"that model; over all {len(own):,} test pairs a map's correlation with {clip.label}'s is {said} on "
        f"average, and those drawn run evenly from the highest to the lowest of {students[-1].label}."
    )
    return Section("Frame-word alignment", text, panels, wide=True), numbers


def model_maps(model: Model, clip_of_text: np.ndarray) -> Maps:
    """A model's maps of every caption with its own clip, on the host."""

    def watch(batch: Batch) -> Features:
        seen = model.encode_video(model.variables, batch)
        return Features(frames=seen.frames, frame_mask=seen.frame_mask)

    def read(batch: Batch) -> Features:
        said = model.encode_text(model.variables, batch)
        return Features(words=said.words, word_mask=said.word_mask)

    seen = embed(watch, model.split.clips(), _on_device)
    parts, done = [], 0
    for batch in model.split.texts():  # maps one batch at a time: all words of a split may not fit
        said = embed(read, [batch], _on_device)
        clips = clip_of_text[done : done + len(said.words)]
        parts.append(frame_word_maps(seen.frames[clips], seen.frame_mask[clips], said.words, said.word_mask))
        done += len(clips)
    return Maps(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def reconstruction_section(teacher: Model, students: Sequence[Model], fit: np.ndarray) -> Made:
    """Fits of the teacher's layers from each student's, over the first test clips.

    Args:
      teacher: whose layers are fitted.
      students: each with a label of its own.
      fit: True for the clips to fit on, False for those to measure on.
    """
    models, first = (teacher, *students), next(iter(teacher.split.clips()))
    shapes = [jax.eval_shape(m.encode_video, m.variables, _on_device(first)).layers for m in models]
    grid = reconstruction.common_grid([layer for layers in shapes for layer in layers])
    widths = [[layer.shape[-1] for layer in layers] for layers in shapes]
    sums: dict[tuple[str, bool], reconstruction.Moments] = {}
    done = 0
    for batch in itertools.islice(teacher.split.clips(), -(-len(fit) // BATCH)):
        rows = np.flatnonzero(batch["mask"])[: len(fit) - done]
        theirs, *ours = (_pooled(model, batch, grid) for model in models)
        for model, layers in zip(students, ours, strict=True):
            for half in (True, False):
                here = rows[fit[done : done + len(rows)] == half]
                given = [layer[here] for layer in layers], [layer[here] for layer in theirs]
                part = reconstruction.moments(*given, batch["frame_mask"][here], grid)
                key = model.label, half
                sums[key] = sums[key] + part if key in sums else part
        done += len(rows)
    found = {
        model.label: reconstruction.reconstruct(
            sums[model.label, True], sums[model.label, False], width, widths[0]
        )
        for model, width in zip(students, widths[1:], strict=True)
    }
    said = ", ".join(
        f"{100 * values.residual.mean():.0f}% from all and {100 * values.best_single.mean():.0f}% from the "
        f"best one ({label})"
        for label, values in found.items()
    )
    text = (
        f"How to read it: each layer of {teacher.label}, on a {grid} x {grid} grid, is fitted on "
        f"{int(fit.sum())} clips as a linear combination of all of a student's layers, or of one alone; of "
        f"the variance on {int((~fit).sum())} other clips this leaves, averaged over layers, {said}, and the "
        "squares show how much each student layer adds, as a multiple of what there is to add."
    )
    index = {model.label: model.index for model in students}
    panels = [
        Panel("Left unexplained of each teacher layer", reconstruction.residual_bars(found, index)),
        Panel("Weight of each student layer", reconstruction.weight_maps(found)),
    ]
    numbers = {name: {k: v.tolist() for k, v in vars(values).items()} for name, values in found.items()}
    return Section("Teacher layers from student layers", text, panels), numbers


def _pooled(model: Model, batch: Mapping[str, np.ndarray], grid: int) -> list[np.ndarray]:
    """A batch's layers on a grid, on the host."""
    layers = model.encode_video(model.variables, _on_device(batch)).layers
    return jax.device_get([to_grid(layer, grid, grid) for layer in layers])


def sweep_rows(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """row -> its results, one a seed, of a sweep's folder; nothing of any other."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in sorted((*workdir.glob(f"{SHARED}/{ROW}"), *workdir.glob(f"*/seed*/{ROW}"))):
        said = json.loads(file.read_text())
        rows.setdefault(said["row"], []).append(said)
    return rows


def cost_section(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], shown: Sequence[str] = tuple(COSTS)
) -> Made:
    """Recall against FLOPs and against parameters.

    Args:
      rows: label -> results with `test` and `sizes`, one a seed.
      shown: which of the two the page shows.
    """
    metric = "t2v_R@1"
    points = cost_points(rows, metric)
    panels = [
        Panel(
            f"Text to video R@1 against {name}",
            tradeoff(points, (), "Text to video R@1", cost),
            shown=cost in shown,
        )
        for cost, name in (("flops", "FLOPs"), ("parameters", "parameters"))
    ]
    several = any(len(point.recalls) > 1 for point in points)
    bars = ", its bars one standard deviation over seeds, up and down" if several else ""
    numbers = {
        point.label: {"mean": point.mean, "deviation": point.deviation, metric: list(point.recalls)}
        for point in points
    }
    text = (
        f"How to read it: up is better, left is cheaper, a mark is a model{bars}; those of equal cost stand "
        "side by side in a band."
    )
    return Section("Recall against cost", text, panels), numbers


def _on_device(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items()}


def _frames(split: Split, clips: set[int]) -> dict[int, np.ndarray]:
    """Pixels [f, h, w, 3] of some clips."""
    every = (clip for batch in split.clips() for clip in batch["frames"][batch["mask"]])
    return {clip: pixels for clip, pixels in zip(range(max(clips) + 1), every, strict=False) if clip in clips}
