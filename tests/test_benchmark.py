"""The benchmark: its arithmetic by hand, and that every command gives its numbers."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from clipdistill_jax import benchmark, commands, measure
from clipdistill_jax.dataset import Dataset
from clipdistill_jax.devices import peak_flops
from clipdistill_jax.experiment import build_stage, plain
from clipdistill_jax.train import sharding

CONFIG = Path(__file__).with_name("tiny_config.py")
VOCAB = {"teacher": 600, "student": 600}
SGD = [f"--config.stages.{stage}.optimizer.name=sgd" for stage in ("alone", "distilled")]  # quick to compile


@pytest.fixture(scope="module")
def config():
    return commands.read_config(str(CONFIG), SGD)


def run(capsys, tmp_path, *arguments):
    file = tmp_path / "report.json"
    assert benchmark.main([*arguments, f"--config={CONFIG}", f"--json={file}", *SGD]) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


def ordered(spread):
    return 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_spread():
    assert measure.spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "max": 10.0}


def test_utilisation_by_hand():
    # 2 GFLOP in 4 ms are 500 GFLOP/s: half of a peak of 1 TFLOP/s. In 2 ms it is all of it.
    found = measure.utilisation(2e9, {"median": 4.0, "min": 2.0, "max": 8.0}, 1e12)
    assert found == pytest.approx({"median": 0.5, "min": 0.25, "max": 1.0}, rel=1e-12)
    assert measure.utilisation(2e9, {"median": 4.0, "min": 2.0, "max": 8.0}, None) is None


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),  # v5p
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 PCIe", None),  # clocked lower than the SXM card
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_model_flops(config):
    stage = build_stage(config, "distilled", sharding.make_mesh(), VOCAB)
    work = measure.model_flops(config, stage)
    # Student and teacher are the same model here: three forward passes against one.
    assert work["student"] == 3 * work["teacher"]
    # The matrix products of that forward pass by hand: 8 clips of 2 frames of 4 patches, 8 tokens, width 16.
    w, mlp, tokens, patches = 16, 32, 8, 5

    def block(n):  # q, k, v, o; scores and their sum; two layers of the MLP
        return 2 * (4 * n * w * w + 2 * n * n * w + 2 * n * w * mlp)

    frame = block(patches) + 2 * 4 * (8 * 8 * 3) * w + 2 * w * w
    text = block(tokens) + 2 * tokens * w * w
    by_hand = 8 * (2 * frame + text) + 2 * 8 * 8 * w
    # Norms, softmax and activations come on top: at this width less than as much again.
    assert by_hand < work["teacher"] < 2 * by_hand
    assert (
        measure.model_flops(config, build_stage(config, "alone", sharding.make_mesh(), VOCAB))["teacher"] == 0
    )


def test_without_teacher_leaves_the_rest(config):
    changed = measure.without_teacher(config, "distilled")
    settings = changed["stages"]["distilled"]
    assert settings["teacher"] == "" and settings["terms"] == {}
    assert config["stages"]["distilled"]["teacher"] == "alone"  # the config itself is as it was
    before = plain(config["stages"]["distilled"])
    assert {**settings, "teacher": "alone", "terms": before["terms"]} == before


def test_random_batches_fit_the_stage(config):
    stage = build_stage(config, "alone", sharding.make_mesh(), VOCAB)
    batch = measure.random_batch(config, stage, 8, VOCAB)
    assert batch["frames"].shape == (8, 2, 16, 16, 3) and batch["frames"].dtype == np.uint8
    assert batch["tokens"].max() < 600 and batch["frames"].std() > 60
    assert batch["word_ids"][0].tolist() == [-1, 0, 1, 2, 3, 4, 5, -1]


def test_step(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "peak_flops", lambda kind: 1e9)
    report, said = run(capsys, tmp_path, "step", "--repeats=3", "--steps=2")
    assert report["stage"] == "distilled"  # the one with a teacher
    assert all(ordered(report[key]) for key in ("ms_per_step", "clips_per_sec", "plain_ms_per_step"))
    ms, speed = report["ms_per_step"], report["clips_per_sec"]
    assert speed["median"] == pytest.approx(1000 * 8 / ms["median"])
    needed = sum(report["model_flops_per_step"].values())
    by_hand = needed / (ms["median"] / 1000) / (1e9 * 8)  # eight devices
    assert report["model_flop_utilisation"]["median"] == pytest.approx(by_hand)
    assert ordered(report["distilled_over_plain"])
    # Each repeat's quotient lies between the extremes of the two times.
    plain, ratio = report["plain_ms_per_step"], report["distilled_over_plain"]
    assert ms["min"] / plain["max"] <= ratio["min"] and ratio["max"] <= ms["max"] / plain["min"]
    assert report["peak_memory"]["bytes"] > 2**20 and "process" in report["peak_memory"]["of"]
    assert report["versions"]["jax"] == jax.__version__
    assert report["config"]["stages"]["distilled"]["terms"] == {"spatial": {"weight": 1.0}}
    assert "time distilled / plain" in said and "1 GFLOP/s" in said


def test_step_without_teacher_on_an_unknown_device(capsys, tmp_path):
    report, said = run(capsys, tmp_path, "step", "--stage=alone", "--repeats=1", "--steps=1")
    assert report["distilled_over_plain"] is None and report["model_flop_utilisation"] is None
    assert "n/a: no peak is known for cpu" in said and "TFLOP/s" in said


def test_eval(capsys, tmp_path):
    report, said = run(capsys, tmp_path, "eval", "--stage=alone", "--repeats=2", "--steps=3")
    assert report["clips"] == 24 and "query matrix 24 x 24" in said
    assert all(ordered(report[key]) for key in ("clips_per_sec", "captions_per_sec", "ms_per_query_matrix"))


class Paced(Dataset):
    """A dataset whose batches take a set time to come."""

    def __init__(self, config, seconds):
        self.vocab = VOCAB
        self._config, self._seconds = config, seconds

    def train_batches(self, stage, start, seed, mesh):
        batch = measure.random_batch(self._config, stage, 8, VOCAB)
        while True:
            time.sleep(self._seconds)
            yield dict(batch)


def test_input_measures_the_wait(config, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "open_dataset", lambda config, workdir: Paced(config, 0.1))
    report = measure.measure_input(config, "alone", sharding.make_mesh(), tmp_path, repeats=2, steps=5)
    # 8 clips in a tenth of a second at best; the tiny step takes far less than that. While training, two of
    # the five batches may have been ready before the clock started.
    assert 20 < report["clips_per_sec"]["median"] <= 80
    assert report["training_clips_per_sec"]["median"] <= 80 * 5 / 3
    assert report["data_wait"]["median"] > 0.4


def test_input_wants_a_workdir(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["input", f"--config={CONFIG}"])
    assert "needs --workdir" in capsys.readouterr().err
