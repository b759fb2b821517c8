"""Two processes of one job, each with its rows of the batches, answer as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from clipdistill_jax.data.questions.buckets import Shape, evaluation_rows
from clipdistill_jax.evaluate.choices import ChoiceEvaluator, QuestionSplit
from clipdistill_jax.models.features import Features
from clipdistill_jax.train import sharding

ITEMS = 11  # three batches, of which the last has a row that only fills it
SHAPES = (Shape(3, 1), Shape(5, 1))


def answer(devices=None):
    """Metrics and arrays of a model that says what its batches tell it to, as one host of the job."""
    mesh = sharding.make_mesh(devices=devices)
    index, count = sharding.process_parts(mesh)
    said = np.random.default_rng(0).normal(size=(ITEMS, 4)).astype(np.float32)
    kinds, rows = evaluation_rows(np.arange(ITEMS) % 2, SHAPES, 4, index, count)

    def batches():
        for kind, items in zip(kinds, rows, strict=True):
            real = items >= 0
            tokens = np.zeros((len(items), SHAPES[kind].tokens), np.float32)
            shown, ids = np.where(real, items, -1 - items), np.where(real, items, -1).astype(np.int32)
            yield {"said": said[shown], "tokens": tokens, "mask": real, "example_id": ids}

    def given(module, variables, batch):
        return Features(logits=batch["said"] + batch["tokens"].sum(-1, keepdims=True))

    split = QuestionSplit(
        batches=batches,
        kinds=np.array(["qa"] * ITEMS),
        record_ids=np.array([f"val-{i}" for i in range(ITEMS)]),
        categories=np.array(["role", "scene"] * 5 + ["role"]),
        labels=np.where(np.arange(ITEMS) == 4, -1, np.arange(ITEMS) % 4).astype(np.int32),
    )
    metrics, arrays = ChoiceEvaluator(None, mesh, kind="vcr", forward=given)(np.float32(0), split)
    np.testing.assert_array_equal(arrays["scores"], said)
    return {"metrics": metrics, "rows": len(rows[0]), **{name: x.tolist() for name, x in arrays.items()}}


@pytest.mark.slow
def test_two_processes_answer_as_one():
    one = answer(jax.devices()[:1])
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the last one counts
    job = dict(CLIPDISTILL_COORDINATOR=f"localhost:{port}", CLIPDISTILL_NUM_PROCESSES="2")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **job}
    command, root = [sys.executable, "-m", "tests.evaluate.test_hosts"], Path(__file__).parents[2]
    both = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**env, "CLIPDISTILL_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in both:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert json.loads(out.splitlines()[-1]) == {**one, "rows": 2}


if __name__ == "__main__":
    sharding.init_distributed()
    print(json.dumps(answer()))
