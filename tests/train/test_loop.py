import itertools
import json
import logging
import os
import signal
import time

import jax
import numpy as np
import pytest

from clipdistill_jax.train import sharding, writers
from clipdistill_jax.train.checkpoint import Checkpointer, CheckpointError
from clipdistill_jax.train.loop import LoopConfig, train
from clipdistill_jax.train.meter import NonFiniteError
from clipdistill_jax.train.preemption import Preempted
from clipdistill_jax.train.run_folder import run_folder
from tests.train.toy_run import ROWS, batches, evaluate, host, make

MESH = sharding.make_mesh(2, devices=jax.devices()[:2])


class Memory(writers.NullWriter):
    def __init__(self):
        self.lines = {}
        self.closed = False

    def write(self, step, values):
        assert step not in self.lines
        self.lines[step] = dict(values)

    def close(self):
        self.closed = True


def run(workdir=None, pipeline=batches, config=None, mesh=MESH, options=None, **extra):
    config = {"steps": 6, "log_every": 2, **(config or {})}
    state, step_fn, _ = make(mesh, config["steps"], **(options or {}))
    memory = Memory()
    keeper = Checkpointer(workdir, best_metric=extra.pop("best_metric", None)) if workdir else None
    try:
        finished = train(
            state, step_fn, pipeline, LoopConfig(**config), mesh, writer=memory, checkpointer=keeper, **extra
        )
    finally:
        assert memory.closed
    return finished, memory.lines


def test_the_loop_does_what_the_steps_do():
    finished, lines = run()
    state, step_fn, _ = make(MESH, 6)
    losses = []
    with jax.set_mesh(MESH):
        for batch in itertools.islice(batches(0), 6):
            state, metrics = step_fn(state, None, sharding.place_batch(batch, MESH))
            losses.append(float(metrics["loss"][0]))
    for name, x in host(state).items():
        np.testing.assert_array_equal(host(finished.state)[name], x, err_msg=name)
    assert list(lines) == [2, 4, 6]
    for step, values in lines.items():
        assert values["train/loss"] == pytest.approx(np.mean(losses[step - 2 : step]), rel=1e-6)
    assert finished.metrics == {}


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, lines = run()

    def stops_after(steps):
        return lambda start: itertools.islice(batches(start), steps - start)

    config = {"save_every": 2}
    with pytest.raises(ValueError, match="the batches ended before step 6 of 6"):
        run(tmp_path, stops_after(5), config)
    resumed, rest = run(tmp_path, batches, config)
    assert list(rest) == [6]
    assert rest[6]["train/loss"] == lines[6]["train/loss"]
    for name, x in host(whole.state).items():
        np.testing.assert_array_equal(host(resumed.state)[name], x, err_msg=name)


def test_a_finished_run_finishes_at_once(tmp_path):
    calls = []

    def counted(state, step):
        calls.append(step)
        return evaluate(state, step)

    first, _ = run(tmp_path, evaluate=counted, config={"eval_every": 4})
    again, lines = run(tmp_path, evaluate=counted, config={"eval_every": 4})
    assert calls == [4, 6] and lines == {}
    assert again.metrics == first.metrics and again.metrics["val/error"] > 0
    np.testing.assert_array_equal(host(again.state)["step"], 6)


def test_a_new_best_is_saved_at_once(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.1, 4: 0.3, 5: 0.2, 6: 0.4}

    def score(state, step):
        return {"val/r1": scores[step]}

    finished, lines = run(tmp_path, config={"eval_every": 1}, evaluate=score, best_metric="val/r1")
    assert finished.metrics == {"val/r1": 0.4}
    keeper = Checkpointer(tmp_path, best_metric="val/r1")
    assert keeper.best() == 2 and keeper.latest() == 6
    assert [lines[step]["val/r1"] for step in sorted(lines)] == list(scores.values())
    with pytest.raises(ValueError, match="'val/r5' is missing"):
        run(tmp_path / "other", evaluate=score, best_metric="val/r5")


def test_minutes_also_make_checkpoints(tmp_path):
    run(tmp_path, config={"save_minutes": 1e-9})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004", "00000006"]  # keep = 2 of 2, 4, 6


def test_nan_stops_the_run_and_says_where(tmp_path):
    poisoned = lambda start: batches(start, poison=(3,))  # noqa: E731
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path, poisoned, {"log_every": 100, "save_every": 2})
    assert error.value.step == 4 and error.value.example_ids == list(range(3 * ROWS, 4 * ROWS))
    assert "not finite at step 4 (loss nan" in str(error.value) and "48, 49" in str(error.value)
    assert Checkpointer(tmp_path).latest() == 2  # nothing after it was saved


def test_nan_can_be_skipped_and_is_counted(tmp_path, caplog):
    poisoned = lambda start: batches(start, poison=(0, 3))  # noqa: E731
    finished, lines = run(tmp_path, poisoned, {"save_every": 4}, options={"nan_policy": "skip"})
    assert [lines[step]["train/skipped"] for step in (2, 4, 6)] == [1, 2, 2]
    assert all(np.isfinite(values["train/loss"]) for values in lines.values())
    assert all(np.all(np.isfinite(x)) for x in host(finished.state).values())
    assert "step 4 was not finite and is skipped; example ids [48, 49" in caplog.text
    keeper = Checkpointer(tmp_path)
    assert keeper.manifest(keeper.latest())["extra"] == {"skipped_steps": 2}
    _, more = run(tmp_path, poisoned, {"steps": 8}, options={"nan_policy": "skip"})
    assert more[8]["train/skipped"] == 2  # goes on counting


def test_sigterm_saves_then_raises(tmp_path):
    def terminated(start):
        for i, batch in enumerate(batches(start)):
            if start + i == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stopped:
        run(tmp_path, terminated, {"steps": 50})
    assert stopped.value.exit_code == 143 and stopped.value.step == Checkpointer(tmp_path).latest() < 50
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_batch_of_another_shape_is_refused_before_it_compiles():
    def grows(start):
        for i, batch in enumerate(batches(start)):
            yield {**batch, "y": np.pad(batch["y"], ((0, 0), (0, i // 3)))}

    with pytest.raises(ValueError, match=r"batch\['y'\] is float32\[16, 5\] at step 4, but was .* 4\]"):
        run(pipeline=grows)


def test_an_error_in_the_pipeline_arrives_and_the_thread_ends():
    closed = []

    def broken(start):
        try:
            yield next(batches(start))
            raise OSError("clip17.mp4 is gone")
        finally:
            closed.append(True)

    with pytest.raises(OSError, match="clip17.mp4 is gone"):
        run(pipeline=broken)
    assert closed == [True]

    def endless(start):
        try:
            yield from batches(start)
        finally:
            closed.append(True)

    run(pipeline=endless)
    assert closed == [True, True]


@pytest.mark.parametrize("shapes", [1, 2])
def test_the_step_compiles_once_a_shape(shapes):
    state, step_fn, _ = make(MESH, 6, ema_decay=0.9)
    compiled = step_fn._cache_size()

    def cut(start, count=shapes):
        for step, batch in enumerate(batches(start), start):
            # Batches of `count` sizes in turn.
            yield {name: x[: len(x) - 8 * (step % count)] for name, x in batch.items()}

    train(state, step_fn, cut, LoopConfig(steps=6, shapes=shapes), MESH)
    assert step_fn._cache_size() <= compiled + shapes
    state, step_fn, _ = make(MESH, 6, ema_decay=0.9)
    with pytest.raises(ValueError, match="would compile again"):
        train(state, step_fn, lambda start: cut(start, shapes + 1), LoopConfig(steps=6, shapes=shapes), MESH)


def test_a_frozen_argument_on_the_host_is_refused_and_on_the_device_kept():
    with pytest.raises(ValueError, match="frozen scale is a ndarray on the host"):
        state, step_fn, _ = make(MESH, 6)
        train(state, step_fn, batches, LoopConfig(steps=1), MESH, frozen={"scale": np.ones(())})
    frozen = sharding.place_tree({"scale": np.float32(2)}, {"scale": sharding.replicated(MESH)})
    finished, lines = run(frozen=frozen)
    assert float(frozen["scale"]) == 2
    assert lines[2]["train/loss"] != run()[1][2]["train/loss"]


def test_another_runs_checkpoint_is_refused_and_the_state_survives(tmp_path):
    run(tmp_path)
    state, step_fn, _ = make(MESH, 6, ema_decay=0.9)
    with pytest.raises(CheckpointError, match="ema/first/bias: expected float32"):
        train(state, step_fn, batches, LoopConfig(steps=9), MESH, checkpointer=Checkpointer(tmp_path))
    assert not state.params["first"]["kernel"].is_deleted()


def test_speed_leaves_out_compilation_evaluation_and_saving(tmp_path):
    def slow_evaluation(state, step):
        time.sleep(0.6)
        return {"val/x": 0.0}

    def slow_step(*args):
        time.sleep(0.05)
        return step_fn(*args)

    state, step_fn, _ = make(MESH, 8)
    memory = Memory()
    config = LoopConfig(steps=8, log_every=4, eval_every=2, save_every=1, unit="rows")
    keeper = Checkpointer(tmp_path)
    extra = {"writer": memory, "checkpointer": keeper, "evaluate": slow_evaluation}
    train(state, slow_step, batches, config, MESH, **extra)
    for step in (4, 8):
        values = memory.lines[step]
        # 20 a second at best; with the 1.2 seconds of evaluation between reports it would be under 3.
        assert 3 < values["speed/steps_per_sec"] < 20
        assert values["speed/rows_per_sec"] == pytest.approx(ROWS * values["speed/steps_per_sec"])
        assert 0 <= values["speed/data_wait"] < 0.5


def test_waiting_for_data_shows():
    lines = run(pipeline=lambda start: batches(start, sleep=0.1), config={"log_every": 6})[1]
    assert 0.5 < lines[6]["speed/data_wait"] <= 1


def test_a_hang_is_shown(capfd, monkeypatch):
    # The watchdog writes to the file descriptor of stderr.
    import sys

    def hangs(start):
        for i, batch in enumerate(batches(start)):
            if i == 2:
                time.sleep(0.5)
            yield batch

    monkeypatch.setattr(sys, "__stderr__", sys.stderr if hasattr(sys.stderr, "fileno") else sys.__stderr__)
    run(pipeline=hangs, config={"hang_minutes": 0.2 / 60})
    err = capfd.readouterr().err
    assert "Timeout" in err and "prefetch" in err


def test_the_run_folder_tells_how_the_run_was_started(tmp_path, caplog):
    folder = run_folder(tmp_path / "a" / "run", {"student": {"width": 0.5}}, ["python", "-m", "x", "--a=b c"])
    assert json.loads((folder / "config.json").read_text()) == {"student": {"width": 0.5}}
    with caplog.at_level(logging.WARNING):
        run_folder(folder, {"student": {"width": 0.5}})
        assert not caplog.text
        run_folder(folder, {"student": {"width": 0.75}})
    assert '-    "width": 0.5' in caplog.text and '+    "width": 0.75' in caplog.text
    launches = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    assert [launch["config"]["student"]["width"] for launch in launches] == [0.5, 0.5, 0.75]
    assert launches[0]["command"] == "python -m x '--a=b c'"
    assert launches[0]["packages"]["jax"] == jax.__version__
    assert launches[0]["devices"] == {"kind": "cpu", "count": 8, "local": 8, "hosts": 1}
