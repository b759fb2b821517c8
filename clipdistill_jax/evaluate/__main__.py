"""Evaluates a checkpoint: python -m clipdistill_jax.evaluate --stage=runs/quickstart/distilled --split=test.

The stage's folder says everything else: its config.json, its checkpoints, the run's prepared data beside it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a split's metrics, as a table or as JSON; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m clipdistill_jax.evaluate", description=__doc__)
    parser.add_argument("--stage", required=True, type=Path, help="folder of a stage, WORKDIR/STAGE")
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
    files = {"predictions": args.predictions, "submission": args.submission}
    try:
        metrics = evaluate_stage(args.stage, args.split, args.step, **files)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(metrics))
        return 0
    if not metrics:
        print("no label of this split is known: there is nothing to judge")
        return 0
    table = Table(title=f"{args.stage}, {args.split} split")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    return 0


def evaluate_stage(
    folder: Path,
    split: str,
    step: int | None = None,
    predictions: Path | None = None,
    submission: Path | None = None,
) -> dict[str, float]:
    """Metrics of a stage's checkpoint on a split.

    Args:
      folder: of the stage; its parent is the run's workdir.
      split: of the prepared data.
      step: None takes the one that the stage selected.
      predictions, submission: files of answers to write, see `evaluate.predictions.write_files`.

    Raises:
      FileNotFoundError: no such stage, or no whole checkpoint in it.
      ValueError: it answers no questions, and files of answers are asked for.
      KeyError: no such split.
    """
    from clipdistill_jax.dataset import open_dataset
    from clipdistill_jax.evaluate.predictions import write_files
    from clipdistill_jax.experiment import build_stage
    from clipdistill_jax.run import run_folders
    from clipdistill_jax.train import sharding
    from clipdistill_jax.weights import stage_variables

    folder = folder.expanduser().resolve()
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} is not the folder of a stage: it has no config.json")
    config = json.loads((folder / "config.json").read_text())
    variables = stage_variables(folder, step)
    dataset = open_dataset(config, run_folders(config, folder.parent)[-1])
    if split not in dataset.splits:
        raise KeyError(f"the data has the splits {', '.join(dataset.splits)}, not {split!r}")
    mesh = sharding.make_mesh(**config["mesh"])
    stage = build_stage(config, folder.name, mesh, dataset.vocab)
    evaluator = stage.system.evaluator(stage.module, stage.config, mesh)
    if evaluator is None:
        raise ValueError(f"{folder} is a stage of pretraining: it has no answers to judge")
    metrics, arrays = evaluator(variables, dataset.split(split, stage, mesh))
    if predictions or submission:
        if not isinstance(arrays, dict):
            raise ValueError(f"{folder} ranks clips: predictions and submissions are of questions")
        lines = write_files(
            arrays,
            dataset.describe(split),
            names=dataset.answer_names(),
            about={"stage": str(folder), "split": split, "step": step},
            predictions_file=predictions,
            submission_file=submission,
        )
        print("\n".join(lines), file=sys.stderr)
    return metrics


if __name__ == "__main__":
    sys.exit(main())
