"""Trains the rows of an ablation config, several seeds of each, one after another.

    python -m clipdistill_jax.sweep --config=configs/clipping/ablation.py --world=shapes --seeds=3 \
        --workdir=DIR

The teacher is trained once, in DIR/shared, with the data that all rows use; each row and seed is a run of
`main` in DIR/ROW/seedN. Start the same command on several machines that see DIR (each on its own, not as one
job of many tasks), and they share the rows. Interrupt it at any time, also with kill -9: the same command
goes on, and what is finished is not done again.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipdistill_jax import commands
from clipdistill_jax.claim import Claim, ClaimLost, claimed, text, write_whole

ROW, FAILED, LOG = "row.json", "failed.json", "log.txt"
TEACHER, SHARED = "teacher", "shared"  # the row that is trained before the others, and its folder
BEAT = 30.0  # seconds between signs of life
STOPPED = 143  # exit status after SIGTERM
_SHOWN = {
    "t2v_R@1": "text to video R@1",
    "v2t_R@1": "video to text R@1",
    "Q->A": "Q->A",
    "accuracy": "accuracy",
}
_ANYWHERE = {"base": "", "mesh": {}, "rows": ()}  # fields of a config that change no result


@dataclasses.dataclass(frozen=True)
class Job:
    """A row with a seed: what is trained in one folder.

    Attributes:
      argv: of `main`.
      config: what `argv` resolves to, json-able.
    """

    row: str
    seed: int
    folder: Path
    argv: tuple[str, ...] = ()
    config: Any = None


# Trains a job and returns its result, json-able; shows signs of life in the claim meanwhile.
Runner = Callable[[Job, Claim], dict[str, Any]]


def sweep(
    shared: Job,
    jobs: Sequence[Job],
    run: Runner,
    *,
    stale_minutes: float | int,
    say: Callable[[str], None] = print,
    poll: float | int = 5.0,
) -> int:
    """Runs the shared job, then the others; returns how many failed here.

    A job that another process is at is left to it, and looked at again when nothing else is left.
    """
    failures = _complete([shared], run, stale_minutes, say, poll)
    return failures or _complete(jobs, run, stale_minutes, say, poll)


def _complete(
    jobs: Sequence[Job],
    run: Runner,
    stale_minutes: float | int,
    say: Callable[[str], None],
    poll: float | int,
) -> int:
    pending, failures, told = list(jobs), 0, False
    while pending:
        left = []
        for job in pending:
            status = attempt(job, run, stale_minutes)
            if status == "claimed":
                left.append(job)
                continue
            failures += status == "failed"
            say(f"{job.row}, seed {job.seed}: {_outcome(job, status)}")
        if left and len(left) == len(pending):
            if not told:
                say(f"waiting for other processes, which are at {', '.join(str(j.folder) for j in left)}")
            told = True
            time.sleep(poll)
        pending = left
    return failures


def attempt(job: Job, run: Runner, stale_minutes: float | int) -> str:
    """Runs a job unless that is done or being done: "finished", "claimed", "done" or "failed".

    Its result goes to row.json, written last, or the error to failed.json.
    """
    if (job.folder / ROW).exists():
        return "finished"
    with claimed(job.folder, stale_minutes) as claim:
        if claim is None:
            return "claimed"
        if (job.folder / ROW).exists():  # another finished it while this one looked
            return "finished"
        who = {"row": job.row, "seed": job.seed, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            result = run(job, claim)
        except ClaimLost:
            return "claimed"
        except Exception as error:
            said = "".join(traceback.format_exception_only(error)).strip()
            write_whole(job.folder / FAILED, json.dumps({**who, "error": said}, indent=1))
            return "failed"
        write_whole(job.folder / ROW, json.dumps({**who, **result, "config": job.config}, indent=1))
        (job.folder / FAILED).unlink(missing_ok=True)
        return "done"


def _outcome(job: Job, status: str) -> str:
    if status == "failed":
        error = json.loads((job.folder / FAILED).read_text())["error"]
        return f"failed: {error} (more in {job.folder / LOG})"
    test = json.loads((job.folder / ROW).read_text()).get("test", {})
    shown = [f"{name} {test[key]:.1f}" for key, name in _SHOWN.items() if key in test]
    return ", ".join(["finished before" if status == "finished" else "done", *shown])


def train_job(job: Job, claim: Claim) -> dict[str, Any]:
    """Runs `main` in a process of its own, so that its memory is returned; the result of its last stage.

    Raises:
      RuntimeError: it failed; says its last line.
      SystemExit: it was stopped by SIGTERM, after a checkpoint.
    """
    status = in_process(_main, (list(job.argv),), job.folder / LOG, claim.beat)
    if status in (STOPPED, -signal.SIGTERM):
        raise SystemExit(STOPPED)
    if status:
        said = [line for line in (job.folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"exit status {status}: {said[-1] if said else 'it said nothing'}")
    stage = list(job.config["stages"])[-1]
    result = json.loads((job.folder / stage / "result.json").read_text())
    return {"stage": stage, **{key: result[key] for key in ("test", "sizes", "step", "seconds")}}


def _main(argv: list[str]) -> int:
    sys.orig_argv = [sys.executable, "-m", "clipdistill_jax.main", *argv]  # how the run says it was started
    from clipdistill_jax.main import main

    return main(argv)


def in_process(
    work: Callable[..., int],
    args: tuple[Any, ...],
    log: Path,
    beat: Callable[[int], None],
    every: float | int = BEAT,
) -> int:
    """Calls `work` in a fresh process and returns its exit status; minus the signal where one ended it.

    What it prints goes to `log`. `beat` is called with its pid, at once and every so many seconds. It gets
    SIGTERM when this process ends, however that ends, and when `beat` raises.
    """
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(work, args, log))
    child.start()
    assert child.pid is not None
    try:
        while child.is_alive():
            beat(child.pid)
            child.join(every)
    finally:
        if child.is_alive():
            child.terminate()
            child.join()
    return child.exitcode or 0


def _child(work: Callable[..., int], args: tuple[Any, ...], log: Path) -> None:
    out = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(out, stream.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(work(*args))


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def plan(
    config: str, world: str, rows: Sequence[str], seeds: int, workdir: Path, overrides: Sequence[str]
) -> tuple[Job, list[Job]]:
    """The shared job and the others, every seed's rows together.

    Args:
      config: the file. Its argument is a row, with `world` as an option after it.
      rows: empty takes the config's `rows`.
      overrides: "--config.FIELD=VALUE", for every run; the shared one is spared those of stages it has not.

    Raises:
      ValueError: an unknown row or field, a job that was finished with another config.
    """
    option = f",world={world}" if world else ""

    def job(row: str, folder: Path, given: Sequence[str]) -> Job:
        file = f"{config}:{row}{option}"
        resolved = json.loads(json.dumps(commands.read_config(file, given)))
        argv = (f"--config={file}", f"--workdir={folder}", *given)
        made = Job(row, resolved["seed"], folder, argv, resolved)
        _check_finished(made)
        return made

    first = commands.read_config(f"{config}:{TEACHER}{option}", ())
    names = [row for row in dict.fromkeys(rows or first["rows"]) if row != TEACHER]
    jobs = [
        job(
            row,
            workdir / row / f"seed{seed}",
            (*overrides, f"--config.seed={seed}", f"--config.base={workdir / SHARED}"),
        )
        for seed in range(seeds)
        for row in names
    ]
    only_rows = {stage for made in jobs for stage in made.config["stages"]} - set(first["stages"])
    elsewhere = tuple(f"--config.stages.{stage}." for stage in only_rows)
    return job(TEACHER, workdir / SHARED, [o for o in overrides if not o.startswith(elsewhere)]), jobs


def _check_finished(job: Job) -> None:
    if (said := text(job.folder / ROW)) is None:
        return
    changed = _difference({**json.loads(said)["config"], **_ANYWHERE}, {**job.config, **_ANYWHERE})
    if changed:
        raise ValueError(
            f"{job.folder} was finished with another config: {changed}. Take another --workdir, or remove it"
        )


def _difference(before: Any, now: Any, name: str = "config") -> str:
    """The first field in which two configs differ, with both values; empty where they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = (_difference(before.get(f), now.get(f), f"{name}.{f}") for f in {**before, **now})
        return next((said for said in found if said), "")
    return "" if before == now else f"{name} was {before!r}, now {now!r}"


def _stop(*_: Any) -> None:
    raise SystemExit(STOPPED)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, 1 where a row failed, 2 for a mistake in the command, 143 after SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m clipdistill_jax.sweep",
        description=__doc__,
        epilog="Any field can be overridden, in every run: --config.stages.student.steps=200",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a config whose argument is a row")
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--world", default="", help="an option of the config: shapes, the embedded world")
    parser.add_argument("--rows", default="", metavar="A,B", help="by default those that the config names")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of each row: 0 to N-1")
    parser.add_argument(
        "--stale_minutes", type=float, default=15.0, help="after which a silent process counts as dead"
    )
    args, overrides = parser.parse_known_args(argv)
    rows = [row for row in args.rows.split(",") if row]
    workdir = args.workdir.expanduser().resolve()
    try:
        shared, jobs = plan(args.config, args.world, rows, args.seeds, workdir, overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        failures = sweep(
            shared,
            jobs,
            train_job,
            stale_minutes=args.stale_minutes,
            say=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if failures:
        print(f"error: {failures} failed; the same command tries them again", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
