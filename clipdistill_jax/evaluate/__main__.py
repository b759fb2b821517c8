"""Evaluates a checkpoint: python -m clipdistill_jax.evaluate --stage=runs/quickstart/distilled --split=test.

The stage's folder says everything else: its config.json, its checkpoints, the run's prepared data beside it.
Of VCR, --stage=A --stage=B takes a model of the answers and one of the rationales as one.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a split's metrics, as a table or as JSON, writes files of answers; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m clipdistill_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--stage",
        required=True,
        type=Path,
        action="append",
        dest="stages",
        help="folder of a stage, WORKDIR/STAGE; may be given twice",
    )
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument(
        "--step", type=int, default=None, help="a checkpoint's step; the selected one by default"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="of questions: write every answer")
    parser.add_argument(
        "--submission", type=Path, metavar="FILE", help="write VCR's leaderboard csv or VQA's result json"
    )
    args = parser.parse_args(argv)
    from clipdistill_jax.evaluate.predictions import write_files

    files = {"predictions_file": args.predictions, "submission_file": args.submission}
    try:
        stages = [open_stage(folder, args.split) for folder in args.stages]
        items = question_items(stages, files)  # what cannot be written is said before the work
        metrics, arrays, steps = evaluate(stages, items, args.step)
        _print_metrics(metrics, f"{', '.join(map(str, args.stages))}, {args.split} split", args.json)
        if any(files.values()):
            dataset, names = stages[0].dataset, map(str, args.stages)
            lines = write_files(
                arrays,
                items,
                expected=dataset.listed(args.split),
                names=dataset.answer_names(),
                about={"split": args.split, "steps": dict(zip(names, steps, strict=True))},
                **files,
            )
            print("\n".join(lines), file=sys.stderr)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    return 0


class Opened(NamedTuple):
    """A stage that is ready to answer: its folder, its split of the data, its model without weights."""

    folder: Path
    split: str
    dataset: Any
    stage: Any
    mesh: Any
    evaluator: Any


def open_stage(folder: Path, split: str) -> Opened:
    """Opens a stage's data and builds its model.

    Args:
      folder: of the stage; its parent is the run's workdir.
      split: of the prepared data.

    Raises:
      FileNotFoundError: no such stage.
      ValueError: it is one of pretraining.
      KeyError: no such split.
    """
    from clipdistill_jax.dataset import open_dataset
    from clipdistill_jax.experiment import build_stage
    from clipdistill_jax.run import run_folders
    from clipdistill_jax.train import sharding

    folder = folder.expanduser().resolve()
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} is not the folder of a stage: it has no config.json")
    config = json.loads((folder / "config.json").read_text())
    dataset = open_dataset(config, run_folders(config, folder.parent)[-1])
    if (folder / "result.json").exists():
        dataset.check_answers(folder)
    if split not in dataset.splits:
        raise KeyError(f"the data has the splits {', '.join(dataset.splits)}, not {split!r}")
    mesh = sharding.make_mesh(**config["mesh"])
    stage = build_stage(config, folder.name, mesh, dataset.vocab)
    evaluator = stage.system.evaluator(stage.module, stage.config, mesh)
    if evaluator is None:
        raise ValueError(f"{folder} is a stage of pretraining: it has no answers to judge")
    return Opened(folder, split, dataset, stage, mesh, evaluator)


def evaluate(
    stages: Sequence[Opened], items: Mapping[str, np.ndarray], step: int | None = None
) -> tuple[dict[str, float], Any, list[int]]:
    """Metrics of the stages' checkpoints taken together, what they are of, and the stages' steps.

    Args:
      stages: one, or several.
      items: their questions, see `question_items`.
      step: of each; None takes the one that a stage selected.

    Raises:
      FileNotFoundError: no whole checkpoint.
    """
    from clipdistill_jax.evaluate.choices import QuestionSplit, question_metrics
    from clipdistill_jax.evaluate.predictions import join_arrays
    from clipdistill_jax.weights import selected_step, stage_variables

    steps = [selected_step(opened.folder) if step is None else step for opened in stages]
    found = [
        opened.evaluator(
            stage_variables(opened.folder, loaded),
            opened.dataset.split(opened.split, opened.stage, opened.mesh),
        )
        for opened, loaded in zip(stages, steps, strict=True)
    ]
    ((metrics, arrays), *more) = found
    if more:
        arrays = join_arrays([arrays for _, arrays in found])
        fields = {name: items[name] for name in ("kinds", "record_ids", "categories", "labels")}
        whole = QuestionSplit(batches=list, **fields)
        metrics = question_metrics(arrays["outcome"], arrays["judged"], whole)
    return metrics, arrays, steps


def question_items(stages: Sequence[Opened], files: Mapping[str, Path | None]) -> dict[str, np.ndarray]:
    """The questions of all stages, see `evaluate.predictions`; none where clips are ranked.

    Args:
      stages: of one split.
      files: that shall be written, as `evaluate.predictions.write_files` takes them.

    Raises:
      ValueError: the stages do not belong together, or cannot give these files.
      OSError: a file cannot be written.
    """
    from clipdistill_jax.evaluate.predictions import check_submission, join_items
    from clipdistill_jax.evaluate.submissions import check_writable
    from clipdistill_jax.question_dataset import QuestionDataset

    wanted = [file for file in files.values() if file is not None]
    ranking = [opened.folder for opened in stages if not isinstance(opened.dataset, QuestionDataset)]
    if ranking and (wanted or len(stages) > 1):
        raise ValueError(f"{ranking[0]} ranks clips: files of answers and several stages are of questions")
    if ranking:
        return {}
    items = join_items([opened.dataset.describe(opened.split) for opened in stages])
    if files["submission_file"] is not None:
        check_submission(items, stages[0].dataset.listed(stages[0].split))
    for file in wanted:
        check_writable(file)
    return items


def _print_metrics(metrics: Mapping[str, float], title: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(metrics))
        return
    if not metrics:
        print("no label of this split is known: there is nothing to judge")
        return
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
