"""Two processes of one job train, evaluate and report as one process of two devices does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from clipdistill_jax import commands
from clipdistill_jax.experiment import plain
from clipdistill_jax.run import run_stages
from clipdistill_jax.train import sharding

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "tests" / "tiny_config.py")
OVERRIDES = [f"--config.stages.{stage}.steps=3" for stage in ("alone", "distilled")]
OVERRIDES += ["--config.stages.distilled.cache=True", "--config.world.train=16"]


def start(workdir: Path, **environ: str) -> subprocess.Popen:
    flags = "--xla_force_host_platform_device_count=1"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environ}
    main = [sys.executable, "-m", "clipdistill_jax.main"]
    command = [*main, f"--config={CONFIG}", f"--workdir={workdir}", *OVERRIDES]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path, monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    with monkeypatch.context() as patch:  # this process has eight
        patch.setattr(sharding, "make_mesh", lambda **axes: mesh)
        run_stages(plain(commands.read_config(CONFIG, OVERRIDES)), tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    job = dict(CLIPDISTILL_COORDINATOR=f"localhost:{port}", CLIPDISTILL_NUM_PROCESSES="2")
    both = [start(tmp_path / "two", CLIPDISTILL_PROCESS_ID=str(i), **job) for i in range(2)]
    said = [finish(process) for process in both]
    assert "report.html" in said[0] and "report.html" not in said[1]
    for stage in ("alone", "distilled"):
        one, two = (
            json.loads((tmp_path / run / stage / "result.json").read_text()) for run in ("one", "two")
        )
        assert two["test"] == pytest.approx(one["test"], abs=1e-6)
        lines = [
            [json.loads(line) for line in (tmp_path / run / stage / "metrics.jsonl").read_text().splitlines()]
            for run in ("one", "two")
        ]
        assert len(lines[0]) == len(lines[1])
        for a, b in zip(*lines, strict=True):
            losses = [name for name in a if name.endswith("_loss")]
            assert losses and {n: b[n] for n in losses} == pytest.approx({n: a[n] for n in losses}, rel=1e-4)
