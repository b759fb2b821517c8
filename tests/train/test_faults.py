"""Runs in processes of their own: killed, terminated, and two that train together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

TOY = pathlib.Path(__file__).with_name("toy_run.py")


def start(workdir, *args, devices=1, **environ):
    workdir.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(TOY), str(workdir), *map(str, args)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # The last one counts.
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environ,
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == code, stderr
    return stderr


def lines(workdir):
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(process, workdir, step):
    until = time.monotonic() + 90
    while time.monotonic() < until:
        if process.poll() is not None:
            pytest.fail(f"the run ended by itself: {process.communicate()[1]}")
        try:
            if any(line["step"] >= step for line in lines(workdir)):
                return
        except json.JSONDecodeError:  # in the middle of a line
            pass
        time.sleep(0.02)
    pytest.fail("the run never got there")


def final(workdir):
    with np.load(workdir / "final.npz") as arrays:
        return dict(arrays)


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        if tolerance:
            np.testing.assert_allclose(found[name], expected[name], err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir))
    return workdir


def test_a_killed_run_continues_to_the_same_bits(tmp_path, whole_run):
    process = start(tmp_path, "--sleep", 0.2)
    wait_for_step(process, tmp_path, 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "final.npz").exists()

    finish(start(tmp_path))
    assert_same(final(tmp_path), final(whole_run))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    for found, expected in zip(lines(tmp_path), lines(whole_run), strict=True):
        assert found["train/loss"] == expected["train/loss"]


def test_two_processes_give_the_numbers_of_one_and_stop_together(tmp_path, whole_run):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    common = {"CLIPDISTILL_COORDINATOR": address, "CLIPDISTILL_NUM_PROCESSES": "2"}
    args = (tmp_path, "--mesh", 2, 2, 1, "--sleep", 0.2, "--save-every", 1000)
    pair = [start(*args, devices=2, **common, CLIPDISTILL_PROCESS_ID=str(i)) for i in range(2)]
    wait_for_step(pair[0], tmp_path, 6)
    pair[1].send_signal(signal.SIGTERM)  # only one of them is told
    for process in pair:
        assert "stopped by SIGTERM after step" in finish(process, 143)
    (saved,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 6 <= saved < 12
    finish(start(tmp_path))  # alone, on one device
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    losses = [[line["train/loss"] for line in lines(where)] for where in (tmp_path, whole_run)]
    # Sums over devices run in another order; Adam's division lets the last bits of a gradient grow.
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert_same(final(tmp_path), final(whole_run), rtol=1e-4, atol=1e-5)
