"""Measures a stage: its training step, its input pipeline, its evaluation.

    python -m clipdistill_jax.benchmark step --config=configs/quickstart.py
    python -m clipdistill_jax.benchmark input --config=configs/quickstart.py --workdir=runs/quickstart
    python -m clipdistill_jax.benchmark eval --config=configs/quickstart.py

step   ms a step, clips/s (or questions/s), FLOP utilisation and peak memory, on random clips and weights;
       with a teacher also the same stage without it, in turn, so that a change of the machine's speed hits
       both
input  clips/s of the pipeline alone, and the share of a training run spent waiting for it
eval   clips/s and captions/s embedded, and ms for the matrix of their scores

Numbers are medians over --repeats with the least and the greatest; warm-up and compilation are left out.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipdistill_jax import commands

Row = tuple[str, str]


def measure(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What the command was asked for, with what it was measured on."""
    import jax

    from clipdistill_jax import measure as measured
    from clipdistill_jax.experiment import plain
    from clipdistill_jax.train import sharding

    sharding.init_distributed()
    mesh = sharding.make_mesh(**plain(config["mesh"]))
    name = commands.stage_name(config, args.stage)
    counts = {"repeats": args.repeats, "steps": args.steps}
    if args.what == "step":
        numbers = measured.measure_step(config, name, mesh, **counts)
    elif args.what == "eval":
        numbers = measured.measure_eval(config, name, mesh, **counts)
    elif args.synthetic:
        numbers = measured.measure_standard_input(config, name, mesh, args.workdir, **counts)
    else:
        numbers = measured.measure_input(config, name, mesh, args.workdir, **counts)
    return {
        "what": args.what,
        "stage": name,
        "device": {"kind": jax.devices()[0].device_kind, "count": mesh.size, "hosts": jax.process_count()},
        **counts,
        **numbers,
        "versions": commands.versions(),
        "config": plain(config),
    }


def say(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    rows = {"step": step_rows, "input": input_rows, "eval": eval_rows}[report["what"]](report)
    device = f"{report['device']['count']} x {report['device']['kind']}"
    title = f"{report['what']} of stage {report['stage']} on {device}: median (least .. greatest) of"
    return commands.table(f"{title} {report['repeats']} repeats of {report['steps']}", rows)


def step_rows(report: Mapping[str, Any]) -> list[Row]:
    """The rows of `step`."""
    work, memory, unit = report["model_flops_per_step"], report["peak_memory"], report["unit"]
    parts = "3 x student forward" + (" + 1 x teacher forward" if work["teacher"] else "")
    rows = [
        ("batch", f"{report['batch_size']} {unit}, compute in {report['dtype']}"),
        ("step", told(report["ms_per_step"], "ms")),
        ("speed", told(report[f"{unit}_per_sec"], f"{unit}/s")),
        ("model FLOPs a step", f"{commands.amount(sum(work.values()), 'FLOP')} ({parts})"),
        ("achieved", told(report["flops_per_sec"], "TFLOP/s", 1e-12)),
    ]
    if report["model_flop_utilisation"] is None:
        rows.append(("model FLOP utilisation", f"n/a: no peak is known for {report['device']['kind']}"))
    else:
        peak = commands.amount(report["peak_flops_per_device"], "FLOP/s")
        said = told(report["model_flop_utilisation"], "%", 100.0)
        rows.append(("model FLOP utilisation", f"{said} of {peak} (bfloat16) a device"))
    rows.append(("peak memory", f"{commands.amount(memory['bytes'], 'B')} of {memory['of']}"))
    if report["plain_ms_per_step"] is not None:
        rows.append(("without teacher, step", told(report["plain_ms_per_step"], "ms")))
        rows.append(("time distilled / plain", told(report["distilled_over_plain"], "")))
    return rows


def input_rows(report: Mapping[str, Any]) -> list[Row]:
    """The rows of `input`."""
    size, unit = report["image_size"], report["unit"]
    shown = f"{report['num_frames']} frames" if unit == "clips" else "an image"
    rows = [
        (unit, f"{shown} of {size} x {size}, batches of {report['batch_size']}"),
        ("pipeline alone", told(report[f"{unit}_per_sec"], f"{unit}/s")),
    ]
    if "data_wait" in report:
        rows.append(("training", told(report[f"training_{unit}_per_sec"], f"{unit}/s")))
        rows.append(("of it waiting for data", told(report["data_wait"], "%", 100.0)))
    return rows


def eval_rows(report: Mapping[str, Any]) -> list[Row]:
    """The rows of `eval`."""
    n = report["clips"]
    return [
        ("clips embedded", told(report["clips_per_sec"], "clips/s")),
        ("captions embedded", told(report["captions_per_sec"], "captions/s")),
        (f"query matrix {n} x {n}", told(report["ms_per_query_matrix"], "ms")),
    ]


def told(values: Mapping[str, float], unit: str, scale: float = 1.0) -> str:
    """A spread in words."""
    median, least, greatest = (f"{scale * values[key]:.4g}" for key in ("median", "min", "max"))
    return f"{median} ({least} .. {greatest}) {unit}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = commands.parser("clipdistill_jax.benchmark", __doc__)
    parser.add_argument("what", choices=("step", "input", "eval"))
    parser.add_argument(
        "--workdir", type=Path, help="folder of the run; input finds or prepares its data there"
    )
    parser.add_argument("--repeats", type=int, default=5, help="stretches that are timed")
    parser.add_argument("--steps", type=int, default=20, help="steps or batches of a stretch")
    parser.add_argument(
        "--synthetic", action="store_true", help="input: on a set of 12-frame clips of 224 x 224, made for it"
    )
    args, overrides = parser.parse_known_args(argv)
    if args.what == "input" and args.workdir is None:
        parser.error("input needs --workdir, where the data is or will be prepared")
    if args.repeats < 1 or args.steps < 1:
        parser.error("--repeats and --steps are at least 1")

    def work() -> str:
        report = measure(args, commands.read_config(args.config, overrides))
        commands.write_json(args.json, report)
        return say(report)

    return commands.run(work)


if __name__ == "__main__":
    sys.exit(main())
