"""The sweep with made-up runs: claims, stale claims, kills, failures, and the plan of a small config."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from clipdistill_jax import sweep as sweeps
from clipdistill_jax.claim import CLAIM, Claim, ClaimLost, claimed
from clipdistill_jax.sweep import FAILED, ROW, Job, attempt, in_process, plan, sweep

ROOT = Path(__file__).parents[1]
SHRUNK = """
    from ml_collections import ConfigDict
    def get_config(argument="A"):
        row, _, world = argument.partition(",")
        if row not in ("teacher", "A", "B"):
            raise ValueError(f"no row {row!r}")
        stages = {"teacher": {"steps": 2}}
        if row != "teacher":
            stages["student"] = {"steps": 3, "terms": row}
        return ConfigDict(dict(seed=7, base="", mesh={}, rows=("A", "B"), world=world, stages=stages))
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "ablation.py"
    file.write_text(textwrap.dedent(SHRUNK))
    return str(file)


def job(folder, row="A", seed=0):
    return Job(row, seed, folder / row / f"seed{seed}", config={"seed": seed})


def result(recall=1.0):
    return {"stage": "student", "test": {"t2v_R@1": recall, "v2t_R@1": recall}}


def gone():
    """The pid of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def put_claim(folder, host, pids, age=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CLAIM
    file.write_text(json.dumps({"host": host, "pids": pids, "time": 0}))
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_a_claim_is_for_one_and_is_given_back(tmp_path):
    with claimed(tmp_path, 1) as first, claimed(tmp_path, 1) as second:
        assert first is not None and second is None
        owner = json.loads((tmp_path / CLAIM).read_text())
        assert owner["host"] == socket.gethostname() and owner["pids"] == [os.getpid()]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "host, pid, age, taken",
    [
        ("here", "dead", 0, True),
        ("here", "alive", 0, False),
        ("here", "alive", 90, True),  # a recycled pid shows no signs of life
        ("there", "dead", 0, False),  # another host's pids say nothing here
        ("there", "dead", 90, True),
    ],
)
def test_which_claims_are_stale(tmp_path, host, pid, age, taken):
    host = socket.gethostname() if host == "here" else "another-host"
    put_claim(tmp_path, host, [gone() if pid == "dead" else os.getppid()], age)
    with claimed(tmp_path, stale_minutes=1) as claim:
        assert (claim is not None) == taken


def test_a_claim_lives_while_its_child_does(tmp_path):
    put_claim(tmp_path, socket.gethostname(), [gone(), os.getppid()])
    with claimed(tmp_path, 1) as claim:
        assert claim is None


@pytest.mark.parametrize("age, taken", [(0, False), (90, True)])
def test_a_claim_cut_short_waits_for_its_time(tmp_path, age, taken):
    file = put_claim(tmp_path, "x", [1])
    file.write_text('{"host": "x"')
    os.utime(file, (time.time() - age, time.time() - age))
    with claimed(tmp_path, 1) as claim:
        assert (claim is not None) == taken


def test_a_lost_claim_is_noticed_and_left_alone(tmp_path):
    claim = Claim(tmp_path / CLAIM)
    claim.beat(child=123)
    assert json.loads((tmp_path / CLAIM).read_text())["pids"] == [os.getpid(), 123]
    claim.beat()
    put_claim(tmp_path, "another-host", [1])
    with pytest.raises(ClaimLost, match="another-host"):
        claim.beat()
    claim.release()
    assert (tmp_path / CLAIM).exists()


def test_a_sign_of_life_keeps_a_claim_fresh(tmp_path):
    with claimed(tmp_path, 1) as claim:
        os.utime(tmp_path / CLAIM, (0, 0))
        claim.beat()
        assert time.time() - (tmp_path / CLAIM).stat().st_mtime < 30


def test_everything_runs_once_and_is_found_finished_again(tmp_path):
    ran, said = [], []
    jobs = [job(tmp_path, row, seed) for seed in range(2) for row in "AB"]
    shared = Job("teacher", 7, tmp_path / "shared")

    def run(job, claim):
        ran.append((job.row, job.seed))
        return result(3.14159)

    assert sweep(shared, jobs, run, stale_minutes=1, say=said.append) == 0
    assert ran == [("teacher", 7), ("A", 0), ("B", 0), ("A", 1), ("B", 1)]
    row = json.loads((tmp_path / "B" / "seed1" / ROW).read_text())
    assert (row["row"], row["seed"], row["config"]) == ("B", 1, {"seed": 1})
    assert row["test"]["t2v_R@1"] == 3.14159
    assert said[1] == "A, seed 0: done, text to video R@1 3.1, video to text R@1 3.1"
    assert not list(tmp_path.rglob(CLAIM))
    assert sweep(shared, jobs, lambda *_: pytest.fail("ran again"), stale_minutes=1, say=said.append) == 0
    assert said[-1].startswith("B, seed 1: finished before")


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path):
    said, jobs = [], [job(tmp_path, row) for row in "AB"]

    def run(job, claim):
        if job.row == "A":
            raise RuntimeError("exit status 1: error: no such field")
        return result()

    shared = Job("teacher", 7, tmp_path / "shared")
    assert sweep(shared, jobs, run, stale_minutes=1, say=said.append) == 1
    failed = json.loads((jobs[0].folder / FAILED).read_text())
    assert failed["row"] == "A" and "no such field" in failed["error"]
    assert any("A, seed 0: failed" in line and "no such field" in line for line in said)
    assert (jobs[1].folder / ROW).exists() and not (jobs[0].folder / ROW).exists()
    assert not (jobs[0].folder / CLAIM).exists()
    # The next start tries it again, and forgets the failure.
    assert sweep(shared, jobs, lambda *_: result(), stale_minutes=1, say=said.append) == 0
    assert not (jobs[0].folder / FAILED).exists()


def test_without_a_teacher_there_are_no_rows(tmp_path):
    def run(job, claim):
        raise RuntimeError("no data")

    jobs = [job(tmp_path)]
    assert sweep(Job("teacher", 7, tmp_path / "shared"), jobs, run, stale_minutes=1, say=str) == 1
    assert not jobs[0].folder.exists()


def test_a_row_that_another_is_at_is_looked_at_again(tmp_path):
    jobs, ran = [job(tmp_path, row) for row in "AB"], []
    held = put_claim(jobs[0].folder, "another-host", [1])

    def run(job, claim):
        ran.append(job.row)
        if job.row == "B":
            held.unlink()  # the other has died and its machine said so
        return result()

    said = []
    shared = Job("teacher", 7, tmp_path / "shared")
    assert sweep(shared, jobs, run, stale_minutes=60, say=said.append, poll=0.01) == 0
    assert ran == ["teacher", "B", "A"]


def test_the_others_row_is_waited_for(tmp_path, monkeypatch):
    a, said = job(tmp_path), []
    held = put_claim(a.folder, "another-host", [1])

    def other(seconds):
        (a.folder / ROW).write_text(json.dumps({"row": "A", "seed": 0, **result(5)}))
        held.unlink()

    monkeypatch.setattr(sweeps.time, "sleep", other)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / ROW).write_text(json.dumps({"row": "teacher", "seed": 7, **result()}))
    run = lambda *_: pytest.fail("ran what another ran")  # noqa: E731
    assert sweep(Job("teacher", 7, tmp_path / "shared"), [a], run, stale_minutes=60, say=said.append) == 0
    assert "waiting for other processes" in said[1] and "R@1 5.0" in said[2]


def test_a_row_taken_over_meanwhile_is_left(tmp_path):
    a = job(tmp_path)

    def run(job, claim):
        put_claim(job.folder, "another-host", [1])
        claim.beat()
        pytest.fail("went on")

    assert attempt(a, run, 1) == "claimed"
    assert json.loads((a.folder / CLAIM).read_text())["host"] == "another-host"
    assert not (a.folder / ROW).exists() and not (a.folder / FAILED).exists()


KILLED = """
    import sys, time
    from pathlib import Path
    from clipdistill_jax.sweep import Job, sweep
    folder = Path(sys.argv[1])
    def run(job, claim):
        if job.row == "B":
            (folder / "in B").touch()
            time.sleep(60)
        return {"test": {}}
    jobs = [Job(row, 0, folder / row / "seed0") for row in "AB"]
    sweep(Job("teacher", 7, folder / "shared"), jobs, run, stale_minutes=60)
"""


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    started = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], cwd=ROOT)
    until(lambda: (tmp_path / "in B").exists())
    started.kill()
    started.wait()
    assert (tmp_path / "B" / "seed0" / CLAIM).exists()  # nobody gave it back
    ran, jobs = [], [job(tmp_path, row) for row in "AB"]

    def run(job, claim):
        ran.append(job.row)
        return result()

    assert sweep(Job("teacher", 7, tmp_path / "shared"), jobs, run, stale_minutes=60, say=str) == 0
    assert ran == ["B"]


def until(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def talk(status):
    print("said to stdout", flush=True)
    print("said to stderr", file=sys.stderr)
    return status


def sleep(file):
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)
    return 0


def test_a_process_of_its_own(tmp_path):
    beats = []
    assert in_process(talk, (3,), tmp_path / "log.txt", beats.append) == 3
    assert sorted((tmp_path / "log.txt").read_text().split("\n")) == ["", "said to stderr", "said to stdout"]
    assert len(beats) >= 1 and beats[0] != os.getpid()


def test_a_process_ends_with_its_claim(tmp_path):
    def beat(pid):
        if (tmp_path / "pid").exists():
            raise ClaimLost("gone")

    with pytest.raises(ClaimLost):
        in_process(sleep, (str(tmp_path / "pid"),), tmp_path / "log.txt", beat, every=0.1)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


ORPHANED = """
    import sys
    from pathlib import Path
    from clipdistill_jax.sweep import in_process
    from tests.test_sweep import sleep
    if __name__ == "__main__":
        in_process(sleep, (sys.argv[1],), Path(sys.argv[1] + ".log"), lambda pid: None)
"""


def test_a_process_ends_with_its_parent_even_if_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(ORPHANED))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pid")], env=env)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def ended():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")  # where nobody collects it, it stays as a zombie
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    until(ended)


def fails_at_once(argv):
    print("error: the config has no such field: widht", file=sys.stderr)
    return 2


def stopped_at_once(argv):
    return 143


def test_a_failed_run_says_its_last_words(tmp_path, monkeypatch):
    a = job(tmp_path)
    a.folder.mkdir(parents=True)
    claim = Claim(a.folder / CLAIM)
    monkeypatch.setattr(sweeps, "_main", fails_at_once)
    with pytest.raises(RuntimeError, match="exit status 2: error: the config has no such field: widht"):
        sweeps.train_job(a, claim)
    monkeypatch.setattr(sweeps, "_main", stopped_at_once)
    with pytest.raises(SystemExit) as stopped:
        sweeps.train_job(a, claim)
    assert stopped.value.code == 143


def test_the_plan_of_a_sweep(config, tmp_path):
    shared, jobs = plan(config, "shapes", [], 2, tmp_path / "sweep", ["--config.stages.student.steps=9"])
    assert [(j.row, j.seed) for j in jobs] == [("A", 0), ("B", 0), ("A", 1), ("B", 1)]
    assert shared.row == "teacher" and shared.config["stages"] == {"teacher": {"steps": 2}}
    assert shared.config["world"] == "world=shapes" and shared.seed == 7
    b = jobs[3]
    assert b.folder == tmp_path / "sweep" / "B" / "seed1"
    assert b.config["base"] == str(tmp_path / "sweep" / "shared") and b.config["seed"] == 1
    assert b.config["stages"]["student"]["steps"] == 9
    assert b.argv[:2] == (f"--config={config}:B,world=shapes", f"--workdir={b.folder}")
    assert "--config.stages.student.steps=9" in b.argv
    assert not any("student" in word for word in shared.argv)


def test_rows_by_name(config, tmp_path):
    _, jobs = plan(config, "", ["B", "teacher", "B"], 1, tmp_path, [])
    assert [j.row for j in jobs] == ["B"]


@pytest.mark.parametrize(
    "rows, overrides, said",
    [
        (["C"], [], "no row 'C'"),
        ([], ["--config.stages.student.setps=3"], "setps"),
        ([], ["--config.stages.teachre.steps=3"], "teachre"),
        ([], ["steps=3"], "unexpected argument"),
    ],
)
def test_mistakes_are_told_before_anything_runs(config, tmp_path, rows, overrides, said, capsys):
    with pytest.raises(ValueError, match=said):
        plan(config, "", rows, 1, tmp_path, overrides)
    command = [f"--config={config}", f"--workdir={tmp_path}", f"--rows={','.join(rows)}", *overrides]
    assert sweeps.main(command) == 2
    assert said in capsys.readouterr().err


def test_rows_of_another_config_are_not_mixed_in(config, tmp_path):
    _, jobs = plan(config, "", ["A"], 1, tmp_path, [])
    assert attempt(jobs[0], lambda *_: result(), 1) == "done"
    plan(config, "", ["A"], 3, tmp_path, [])  # more seeds are no other config
    with pytest.raises(ValueError, match=r"config.stages.student.steps was 3, now 4"):
        plan(config, "", ["A"], 1, tmp_path, ["--config.stages.student.steps=4"])


def test_the_command(config, tmp_path, monkeypatch, capsys):
    ran = []

    def run(job, claim):
        ran.append((job.row, job.seed))
        if job.row == "B":
            raise ValueError("bad")
        return result()

    monkeypatch.setattr(sweeps, "train_job", run)
    command = [f"--config={config}", f"--workdir={tmp_path / 'out'}", "--seeds=2"]
    assert sweeps.main(command) == 1
    assert ran == [("teacher", 7), ("A", 0), ("B", 0), ("A", 1), ("B", 1)]
    said = capsys.readouterr()
    assert "2 failed" in said.err and "B, seed 1: failed: ValueError: bad" in said.out
