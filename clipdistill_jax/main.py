"""Runs a config: python -m clipdistill_jax.main --config=configs/quickstart.py --workdir=runs/quickstart.

Any field can be overridden: --config.student.width=0.75.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, with FILE:ARGUMENT where it takes one.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> int:
    """Runs every stage and writes the report. 143 after SIGTERM, 1 after an error of the user's."""
    if len(argv) > 1:
        print(f"error: unexpected argument {argv[1]!r}; flags start with --", file=sys.stderr)
        return 2
    # Imported here, so that a mistyped flag is told at once.
    import jax

    from clipdistill_jax.report.page import write_report
    from clipdistill_jax.run import run_stages
    from clipdistill_jax.train.loop import Preempted
    from clipdistill_jax.train.sharding import init_distributed

    quiet_logging()
    init_distributed()
    config, workdir = _CONFIG.value, Path(_WORKDIR.value).expanduser()
    try:
        results = run_stages(config, workdir)
        if jax.process_index() == 0:
            print(write_report(config, workdir, results))
    except Preempted as stopped:
        print(f"stopped by a signal after a checkpoint ({stopped}); the same command goes on", file=sys.stderr)
        return stopped.exit_code
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        logging.debug("", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def quiet_logging() -> None:
    """This project's messages at INFO, other people's at WARNING."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for name in ("absl", "jax", "orbax", "tensorflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def parse_flags(args: Sequence[str]) -> Any:
    """absl's parser, with an unknown config field told in one line and not as a traceback."""
    try:
        return app.parse_flags_with_usage(args)
    except (AttributeError, KeyError) as error:
        said = str(error).replace("\\'", "'").strip("'\"")
        print(f"error: the config has no such field: {said}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
