"""Two processes of one job train, evaluate and report as one process of two devices does."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import pytest

from clipdistill_jax import commands
from clipdistill_jax.run import run_stages
from clipdistill_jax.train import sharding

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "clipdistill_jax.main", f"--config={ROOT}/tests/tiny_config.py"]
OVERRIDES = [
    "--config.stages.distilled.cache=True",
    *(
        f"--config.stages.{stage}.{field}"
        for stage in ("alone", "distilled")
        for field in ("steps=3", "save_every=0", "optimizer.name=sgd")  # which compiles faster than AdamW
    ),
]


def start(workdir: Path, **environ: str) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the last one counts
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environ}
    command = [*COMMAND, f"--workdir={workdir}", *OVERRIDES]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:2]))
    run_stages(commands.read_config(f"{ROOT}/tests/tiny_config.py", OVERRIDES), tmp_path / "one")
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
