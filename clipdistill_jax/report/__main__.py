"""Reports that are made on their own:

python -m clipdistill_jax.report sizes --config=configs/clipping/msrvtt.py   # parameters, FLOPs a module
python -m clipdistill_jax.report ablation --workdir=runs/sweep               # what a sweep came to
python -m clipdistill_jax.report clip_td --workdir=runs/clip_td              # CLIP-TD's methods over seeds
python -m clipdistill_jax.report figures --workdir=runs/quickstart --stages=alone,distilled
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clipdistill_jax import commands
from clipdistill_jax.report import inspection


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clipdistill_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    reports = parser.add_subparsers(dest="report", required=True)
    sizes = reports.add_parser(
        "sizes", help="parameters and FLOPs of a stage's model, beside CLIPPING's Table 2", allow_abbrev=False
    )
    sizes.add_argument("--config", required=True, metavar="FILE", help="FILE or FILE:ARGUMENT")
    sizes.add_argument("--stage", default="", help="if none is named, the first with a teacher")
    ablation = reports.add_parser(
        "ablation", help="rows of a sweep beside CLIPPING's, which orderings hold", allow_abbrev=False
    )
    ablation.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="of the sweep")
    clip_td = reports.add_parser(
        "clip_td", help="CLIP-TD's methods beside its tables, which orderings hold", allow_abbrev=False
    )
    clip_td.add_argument(
        "--workdir",
        required=True,
        type=Path,
        metavar="DIR",
        help="of a sweep, of a run, or a folder of runs",
    )
    clip_td.add_argument(
        "--table",
        default="",
        metavar="TASK/STUDENT",
        help="of the paper, such as snli_ve/villa; by default that of the data and the student",
    )
    figures = reports.add_parser(
        "figures", help="frame-word maps, reconstructions, accuracy against cost", allow_abbrev=False
    )
    inspection.arguments(figures)
    for command in (sizes, ablation, clip_td):
        command.add_argument(
            "--json", type=Path, default=None, metavar="FILE", help="write the numbers there"
        )
    args, overrides = parser.parse_known_args(argv)
    console = Console()
    try:
        if args.report == "sizes":
            _sizes(console, args, overrides)
        elif overrides:
            raise ValueError(f"unexpected argument {overrides[0]!r}")
        elif args.report == "figures":
            console.print(inspection.figures(args), markup=False, highlight=False, soft_wrap=True)
        elif args.report == "clip_td":
            _clip_td(console, args)
        else:
            _ablation(console, args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _sizes(console: Console, args: argparse.Namespace, overrides: Sequence[str]) -> None:
    config = commands.read_config(args.config, overrides)
    from clipdistill_jax.report.sizes import stage_sizes

    table, numbers = stage_sizes(config, commands.stage_name(config, args.stage))
    console.print(table)
    commands.write_json(args.json, numbers)


def _ablation(console: Console, args: argparse.Namespace) -> None:
    from clipdistill_jax.report import ablation

    workdir = args.workdir.expanduser()
    _print(console, *ablation.report(workdir), workdir / "ablation.md")
    if args.json is not None:
        scores, failures = ablation.read_sweep(workdir)
        commands.write_json(args.json, {"rows": ablation.numbers(scores), "failures": failures})


def _clip_td(console: Console, args: argparse.Namespace) -> None:
    from clipdistill_jax.report import ablation, clip_td

    workdir = args.workdir.expanduser()
    _print(console, *clip_td.report(workdir, args.table), workdir / clip_td.FILE)
    if args.json is not None:
        _, scores, shots, failures = clip_td.read_methods(workdir, args.table)
        rows = ablation.numbers(scores)
        commands.write_json(args.json, {"rows": rows, "shots": shots, "failures": failures})


def _print(console: Console, tables: Sequence[Table], lines: Sequence[str], file: Path) -> None:
    for table in tables:
        console.print(table)
    for line in (*lines, f"The same in markdown: {file}"):
        console.print(line, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
