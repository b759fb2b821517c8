"""Runs a config: every stage in order, then the report. What is done already is not done again."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for a mistake in the command, 1 for another error of the user's, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m clipdistill_jax.main",
        description=__doc__,
        epilog="Any field of the config can be overridden: --config.student.width=0.75",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the config, FILE or FILE:ARGUMENT")
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="the folder of the run")
    args, overrides = parser.parse_known_args(argv)

    from clipdistill_jax.commands import read_config

    try:
        config = read_config(args.config, overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    # Imported here, so that a mistyped field is told at once.
    import jax

    from clipdistill_jax.report.page import write_report
    from clipdistill_jax.run import run_stages
    from clipdistill_jax.train.loop import Preempted
    from clipdistill_jax.train.sharding import init_distributed

    quiet_logging()
    init_distributed()
    workdir = args.workdir.expanduser()
    try:
        results = run_stages(config, workdir)
        if jax.process_index() == 0:
            print(write_report(config, workdir, results))
    except Preempted as stopped:
        print(
            f"stopped by a signal, after a checkpoint ({stopped}); the same command goes on", file=sys.stderr
        )
        return stopped.exit_code
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def quiet_logging() -> None:
    """This project's messages at INFO, other people's at WARNING."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for name in ("absl", "jax", "orbax", "tensorflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
