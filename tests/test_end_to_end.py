"""The quickstart's own config, shrunk: from rendered mp4 files to the report, through the command line."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipdistill_jax.dataset import open_dataset
from clipdistill_jax.evaluate.__main__ import main as evaluate_main
from clipdistill_jax.evaluate.evaluator import RetrievalEvaluator
from clipdistill_jax.experiment import build_stage, plain
from clipdistill_jax.report.page import write_report
from clipdistill_jax.report.sizes import count
from clipdistill_jax.run import run_stages, stage_order
from clipdistill_jax.train import sharding
from clipdistill_jax.train.checkpoint import CheckpointError
from clipdistill_jax.weights import stage_variables
from tests.tiny import ROOT, load_config, shrink

STAGES = ["clip", "teacher", "alone", "distilled"]
SGD = dict(name="sgd", learning_rate=0.01, clip_norm=0.0)  # a third less to compile than AdamW


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Of eight, on which each of the many steps here would take longer to compile and to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:2]))
        yield


@pytest.fixture(scope="module")
def config():
    made = shrink(load_config())
    for name in ("alone", "distilled"):
        made.stages[name].optimizer = ConfigDict(SGD)
    return made


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A finished run: (workdir, results)."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run_stages(plain(config), workdir)


@pytest.mark.slow
def test_every_stage_leaves_its_results(run):
    workdir, results = run
    assert list(results) == STAGES
    for name, result in results.items():
        folder = workdir / name
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]
        assert 0 <= result["test"]["t2v_R@1"] <= 100 and result["test"]["motion_pairs"] >= 0
        assert np.load(folder / "scores.npz")["scores"].shape == (12, 12)
        assert {**json.loads((folder / "result.json").read_text()), "folder": str(folder)} == result
    last = json.loads((workdir / "distilled" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"train/temporal_loss", "train/spatial_loss", "train/global_loss", "train/task_loss"} <= set(last)


@pytest.mark.slow
def test_alone_and_distilled_start_alike_and_see_the_same_batches(config, run):
    workdir, _ = run
    first = [
        json.loads((workdir / name / "metrics.jsonl").read_text().splitlines()[0]) for name in STAGES[2:]
    ]
    assert first[0]["train/task_loss"] == pytest.approx(first[1]["train/task_loss"], rel=1e-6)


@pytest.mark.slow
def test_the_distilled_checkpoint_holds_no_teacher(run):
    workdir, _ = run
    manifest = json.loads(next((workdir / "distilled" / "checkpoints").glob("*/*anifest*.json")).read_text())
    names = list(manifest["arrays"])
    assert any(name.startswith("params/student/vision") for name in names)
    assert not any("patch_embedding" in name for name in names)  # only the teacher has one
    assert manifest["identity"]["teacher"]


@pytest.mark.slow
def test_a_second_run_does_nothing_and_says_the_same(config, run, monkeypatch):
    workdir, results = run
    monkeypatch.setattr("clipdistill_jax.run.run_stage", lambda *args: pytest.fail("ran again"))
    assert run_stages(plain(config), workdir) == results


@pytest.mark.slow
def test_another_teacher_is_refused(config, run, tmp_path):
    workdir, _ = run
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "distilled" / "result.json").unlink()
    # As if the student had learned from a teacher that has since been trained anew.
    manifest = next((copy / "distilled" / "checkpoints").glob("*/*anifest*.json"))
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**told, "identity": {**told["identity"], "teacher": "0123456789abcdef"}}))
    with pytest.raises(CheckpointError, match="teacher"):
        run_stages(plain(config), copy)


def row(config, base, **stage):
    """The config of one more student, on the data and teacher of a finished run."""
    made = plain(config)
    student = made["stages"]["distilled"] | {"clip": "stage:clip", "teacher": "teacher", **stage}
    stages = {name: made["stages"][name] for name in ("clip", "teacher")}
    return {**made, "base": str(base), "stages": {**stages, "student": student}}


def curves(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name.startswith("train/")} for line in lines]


@pytest.mark.slow
def test_a_student_of_every_term_on_another_runs_teacher_cached_and_online(config, run, tmp_path):
    base, before = run
    layers = dict(weight=1.0, student_layers=(0, 1))
    terms = {name: layers for name in ("sab", "tab", "ol2ol")} | {
        name: dict(weight=1.0) for name in ("temporal", "spatial", "global", "local")
    }
    terms["sab"] = {**layers, "mask": "random_spatial"}
    found = {}
    for cache in (False, True):
        changed = row(config, base, terms=terms, cache=cache, init={}, optimizer=SGD)
        changed["seed"] = 1  # the base's stages are used all the same
        changed["data"]["student_tokenizer"] = "train:300"  # words have other pieces than CLIP's
        text = dict(kind="bert", width=16, layers=1, heads=2, mlp_width=32, projection_dim=16)
        changed["student"] = {
            **changed["teacher"],
            "text": {**text, "context_length": 32},
        }  # quick to compile
        results = run_stages(changed, tmp_path / str(cache))
        assert list(results) == ["clip", "teacher", "student"]
        assert results["teacher"] == before["teacher"]
        assert {p.name for p in (tmp_path / str(cache)).iterdir()} == {"student"}
        found[cache] = curves(tmp_path / str(cache) / "student")
    write_report(changed, tmp_path / "True", results)
    assert {f"train/{name}_loss" for name in terms} <= set(found[True][0])
    # The models are of float32, and so are the vectors.
    for online, cached in zip(found[False], found[True], strict=True):
        assert cached == pytest.approx(online, rel=1e-4)
    assert len(list((base / "teacher_cache").iterdir())) == 2  # the teacher's and raw CLIP's
    variables = stage_variables(tmp_path / "True" / "student")
    vocab = variables["params"]["text"]["embeddings"]["token_embedding"]["embedding"].shape[0]
    files = json.loads((base / "student_tokenizer" / "tokenizer.json").read_text())
    assert vocab == len(files["model"]["vocab"]) != 520
    changed["world"]["noise"] = 9.0
    with pytest.raises(ValueError, match="other settings|another recipe"):
        run_stages(changed, tmp_path / "other")


@pytest.mark.slow
def test_evaluation_batch_size_does_not_change_the_numbers(config, run):
    workdir, results = run
    changed = plain(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    dataset = open_dataset(changed, workdir)
    changed["stages"]["alone"]["eval_batch_size"] = 5  # of 12 clips
    stage = build_stage(changed, "alone", mesh, dataset.vocab)
    metrics, _ = RetrievalEvaluator(stage.module, mesh)(
        stage_variables(workdir / "alone"), dataset.split("test", stage, mesh)
    )
    assert metrics == pytest.approx(results["alone"]["test"], abs=1e-6)


@pytest.mark.slow
def test_the_evaluate_command_says_what_the_run_said(run, capsys):
    workdir, results = run
    assert evaluate_main([f"--stage={workdir / 'clip'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(results["clip"]["test"], abs=1e-6)
    assert evaluate_main([f"--stage={workdir / 'clip'}", "--split=tset"]) == 1
    assert "not 'tset'" in capsys.readouterr().err
    assert evaluate_main([f"--stage={workdir / 'nothing'}"]) == 1
    assert "not the folder of a stage" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_shows_the_results(config, run):
    workdir, results = run
    said = write_report(plain(config), workdir, results)
    assert "report.html" in said
    assert "student distilled" in (workdir / "report.md").read_text()


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "clipdistill_jax.main", *args],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, **env},
    )


def test_a_wrong_field_fails_with_the_nearest_right_one(tmp_path):
    done = command("--config=configs/quickstart.py", f"--workdir={tmp_path}", "--config.student.widht=0.75")
    assert done.returncode == 2
    assert "widht" in done.stderr and "width" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_config_is_named(tmp_path):
    done = command("--config=configs/nothing.py", f"--workdir={tmp_path}")
    assert done.returncode != 0
    assert "configs/nothing.py" in done.stderr and "Traceback" not in done.stderr


def test_stages_run_after_those_they_need():
    config = plain(load_config())
    config["stages"] = dict(reversed(config["stages"].items()))
    order = stage_order(config)
    assert sorted(order) == sorted(STAGES)
    assert order.index("clip") < order.index("teacher") < order.index("distilled")
    config["stages"]["clip"]["init"]["model"] = "stage:teacher"
    with pytest.raises(ValueError, match="wait for each other"):
        stage_order(config)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda s: s["distilled"].update(teacher=""), "compares with `teacher`, and the stage names none"),
        (lambda s: s["distilled"]["terms"].update(globe={"weight": 1.0}), "'globe' is not one of"),
        (lambda s: s["distilled"].update(model="pupil"), "'teacher' or 'student'"),
        (lambda s: s["alone"]["optimizer"].update(name="adma"), "adma"),
    ],
)
def test_what_does_not_fit_together_is_told_when_the_stage_is_built(change, message):
    config = plain(shrink(load_config()))
    change(config["stages"])
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    name = "alone" if "adm" in message else "distilled"
    with pytest.raises(ValueError, match=message):
        build_stage(config, name, mesh, {"teacher": 520, "student": 520})


@pytest.mark.slow
def test_the_msrvtt_config_builds_the_papers_models():
    config = plain(load_config("clipping/msrvtt"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    teacher = build_stage(config, "teacher", mesh)
    heads = 12_609_536 + 77 * 512  # four blocks of 512 and the frame positions
    assert count(teacher.template.params["student"]) == 151_277_313 + heads
    assert teacher.optimizer.parts["student/vision/projection/kernel"].multiplier == 1e-2
    assert teacher.optimizer.parts["student/temporal/position_embedding"].multiplier == 1
    student = build_stage(config, "distilled", mesh)
    assert count(student.template.params["student"]["vision"]) == 4_388_841 + 512 * 512 + 512
    assert set(student.template.params["terms"]) == {"sab"}  # the other widths are 512: nothing to project


def test_the_core_runs_without_tensorflow():
    """Models, terms and a train step on in-memory batches import no TensorFlow."""
    code = (
        "import sys; sys.modules['tensorflow'] = None; sys.modules['tensorflow_datasets'] = None\n"
        "import clipdistill_jax.models.build, clipdistill_jax.distill.objective, clipdistill_jax.train.loop\n"
        "import clipdistill_jax.experiment, clipdistill_jax.evaluate.evaluator, clipdistill_jax.weights\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(ROOT), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
