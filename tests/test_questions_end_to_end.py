"""CLIP-TD on the embedded world, as small as it goes: from rendered trees to metrics, files, the report."""

import csv
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipdistill_jax import defaults
from clipdistill_jax.convert import hf_clip
from clipdistill_jax.data.tokenizer import open_tokenizer
from clipdistill_jax.dataset import open_dataset
from clipdistill_jax.evaluate.__main__ import main as evaluate_main
from clipdistill_jax.evaluate.choices import ChoiceEvaluator
from clipdistill_jax.experiment import plain, raw_clip
from clipdistill_jax.report.page import write_report
from clipdistill_jax.report.tokens import read_words
from clipdistill_jax.run import run_stages
from clipdistill_jax.train import sharding

TOWER = dict(width=16, layers=1, heads=2, mlp_width=32, projection_dim=16)
CLIP = dict(
    kind="clip", image_size=16, patch_size=8, text=dict(kind="clip", context_length=40, **TOWER), **TOWER
)
CLIP_TD = {name: {"weight": 0.05} for name in ("vision", "language", "tokens")}
VISION, TOKENS = ({name: CLIP_TD[name]} for name in ("vision", "tokens"))


def on_devices(patch, count):
    patch.setattr(sharding, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:count]))


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """One where nothing else is said: everything here compiles sooner for it."""
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A Hugging Face directory of a CLIP with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    said = ["a cook in white lifts a red ball on the left"]
    tokenizer = open_tokenizer("train:560", "clip", lambda: said, folder)
    config = {"data": {"format": "karpathy"}, "teacher": CLIP}
    module = raw_clip(config, {"teacher": tokenizer.vocab_size})
    batch = {
        "frames": jax.numpy.zeros((1, 1, 16, 16, 3), "uint8"),
        "frame_mask": jax.numpy.ones((1, 1), bool),
        "tokens": jax.numpy.zeros((1, 8), "int32"),
        "token_mask": jax.numpy.ones((1, 8), bool),
        "word_ids": jax.numpy.zeros((1, 8), "int32"),
    }
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, method="complete"))["params"]
    params = jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    weights = folder.parent / "weights"
    hf_clip.save(weights, (module.vision.config, module.text.config), params)
    for file in weights.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def run_config(kind, clip, student="uniter", **stages):
    config = ConfigDict(sort_keys=False)
    config.seed, config.base = 0, ""
    config.world = dict(train=8, validation=4, test=4, size=32, questions=3, region_width=12)
    config.data = defaults.data(
        format=kind,
        image_size=16,
        max_tokens=40,
        clip_tokens=40,
        tokenizer=str(clip),
        student_tokenizer="train:200",
        region_width=12,
        max_regions=12,
        buckets=1,
        workers=1,
    )
    config.data.questions = ("qa", "qar")
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.teacher = CLIP
    config.student = dict(kind=student, width=16, layers=1, heads=2, mlp_width=32, context_length=48)
    shared = dict(model="student", steps=2, batch_size=8, eval_batch_size=8, log_every=1, select="", keep=1)
    shared["optimizer"] = dict(name="sgd", learning_rate=1e-3, clip_norm=0.0)  # compiles sooner than AdamW
    config.stages = ConfigDict(
        {name: defaults.stage(**{**shared, **fields}) for name, fields in stages.items()}, sort_keys=False
    )
    return plain(config)


@pytest.fixture(scope="module")
def vcr(clip, tmp_path_factory):
    """A finished run on VCR: (config, workdir, results)."""
    taught = dict(clip=str(clip), cache=True)
    few = dict(protocol="low_shot", shots=2)
    config = run_config(
        "vcr",
        clip,
        pretrain=dict(**taught, terms=VISION, pretraining=dict(ratios=dict(mlm=1, mrckl=1))),
        clip_td=dict(
            **taught, **few, terms=CLIP_TD, gate=dict(temperature=1.0), init=dict(model="stage:pretrain")
        ),
    )
    workdir = tmp_path_factory.mktemp("vcr")
    return config, workdir, run_stages(config, workdir)


def test_a_student_of_vcr_from_its_files_to_its_results(vcr):
    _, workdir, results = vcr
    assert results["pretrain"]["test"] == {} and results["clip_td"]["split"] == "validation"
    metrics = results["clip_td"]["test"]
    assert {"accuracy", "Q->A", "QA->R", "Q->AR"} <= metrics.keys()
    assert metrics["Q->AR"] <= min(metrics["Q->A"], metrics["QA->R"])
    drawn = json.loads((workdir / "clip_td" / "training_examples.json").read_text())
    assert len(drawn["labelled"]) == 2 * 7 and not drawn["unlabelled"]
    lines = (workdir / "clip_td" / "metrics.jsonl").read_text().splitlines()
    assert {"train/tokens_loss", "train/tokens_gate", "train/task_loss"} <= json.loads(lines[0]).keys()
    # CLIP saw what each stage draws: all, and two questions of each category with their rationales.
    caches = [json.loads(file.read_text())["facts"] for file in workdir.glob("teacher_cache/*/cache.json")]
    assert sorted(facts["texts"] for facts in caches) == [2 * 7 * 2, 8 * 3 * 2]
    whole = json.loads((workdir / "pretrain" / "training_examples.json").read_text())
    assert whole["protocol"] == "full" and len(whole["labelled"]) == 8 * 3
    examples = read_words(workdir / "clip_td" / "words.npz")
    assert examples and not (workdir / "pretrain" / "words.npz").exists()
    for name, scores in examples.items():
        assert name.removesuffix(" (qa)").removesuffix(" (qar)") in drawn["labelled"]
        assert len(scores.words) > 4 and scores.chosen.sum() == 2
        assert scores.importance.sum() == pytest.approx(1.0) and (scores.total[scores.chosen] > 0).all()


def test_a_finished_run_is_left_alone_and_reported(vcr, monkeypatch):
    config, workdir, results = vcr
    monkeypatch.setattr("clipdistill_jax.run.run_stage", lambda *args: pytest.fail("ran again"))
    assert run_stages(config, workdir) == results
    assert "clip_td" in write_report(config, workdir, results)
    assert "QA" in (workdir / "report.html").read_text()


def test_the_leaderboards_file_and_predictions(vcr, tmp_path, capsys):
    _, workdir, results = vcr
    stage = ["--stage", str(workdir / "clip_td")]
    predictions, submission = tmp_path / "predictions.json", tmp_path / "vcr.csv"
    assert evaluate_main([*stage, "--split=validation", "--json", f"--predictions={predictions}"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(results["clip_td"]["test"])
    said = json.loads(predictions.read_text())
    assert said["about"] == {"split": "validation", "steps": {stage[1]: 2}}
    assert len(said["predictions"]) == 4 * 3 * 2
    assert evaluate_main([*stage, "--split=test", f"--submission={submission}"]) == 0
    rows = list(csv.reader(submission.open()))
    assert len(rows) == 1 + 4 * 3 and len(rows[0]) == 1 + 4 + 16


@pytest.fixture
def halves(vcr, tmp_path):
    """The run's stage twice, once with the answers alone and once with the rationales."""
    _, workdir, _ = vcr
    for kind in ("qa", "qar"):
        shutil.copytree(workdir / "clip_td", tmp_path / kind / "clip_td")
        shutil.copytree(workdir / "prepared", tmp_path / kind / "prepared")
        for shared in ("world", "student_tokenizer"):
            (tmp_path / kind / shared).symlink_to(workdir / shared)
        config = json.loads((workdir / "clip_td" / "config.json").read_text())
        config["data"]["questions"] = [kind]
        (tmp_path / kind / "clip_td" / "config.json").write_text(json.dumps(config))
    return [f"--stage={tmp_path / kind / 'clip_td'}" for kind in ("qa", "qar")]


def test_two_stages_answer_as_one(vcr, halves, tmp_path, capsys):
    _, workdir, results = vcr
    assert evaluate_main([*halves, "--split=validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(results["clip_td"]["test"])
    whole = [f"--stage={workdir / 'clip_td'}"]
    for stages, name in ((halves, "two.csv"), (whole, "one.csv")):
        assert evaluate_main([*stages, f"--submission={tmp_path / name}"]) == 0
    one, two = ((tmp_path / name).read_text().splitlines() for name in ("one.csv", "two.csv"))
    assert one[0] == two[0] and len(one) == len(two)
    for a, b in zip(one[1:], two[1:], strict=True):
        (a, *scores), (b, *others) = a.split(","), b.split(",")
        assert a == b
        np.testing.assert_allclose(np.float64(others), np.float64(scores), rtol=0, atol=1e-5)


def test_what_cannot_be_submitted_is_said_before_the_work(halves, tmp_path, capsys, monkeypatch):
    submission = f"--submission={tmp_path / 'out' / 'vcr.csv'}"
    monkeypatch.setattr("clipdistill_jax.evaluate.__main__.evaluate", lambda *_: pytest.fail("evaluated"))

    def refused(*arguments):
        assert evaluate_main(arguments) == 1
        return capsys.readouterr().err

    assert "no scores of its rationales given answer 0" in refused(halves[0], submission)
    assert "two stages answer questions of the kind qa" in refused(halves[0], halves[0])
    assert "given answer" in refused(*halves, "--split=validation", submission)
    assert f"{tmp_path} is a folder" in refused(halves[0], f"--predictions={tmp_path}")
    manifest = tmp_path / "qa" / "prepared" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["splits"]["test"]["left_out"] = ["test-77"]
    manifest.write_text(json.dumps(said))
    assert "misses test-77 (1 in all; the split has 13)" in refused(*halves, submission)
    assert not (tmp_path / "out").exists()


def test_a_file_that_fails_leaves_the_metrics(halves, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("clipdistill_jax.evaluate.predictions.write_files", full)
    assert evaluate_main([halves[0], "--split=validation", "--json", f"--predictions={tmp_path / 'p'}"]) == 1
    said = capsys.readouterr()
    assert "Q->A" in json.loads(said.out) and "error: disk full" in said.err


@pytest.mark.parametrize("kind, student", [("snli_ve", "vl_bert"), ("vqa", "uniter")])
def test_the_gate_of_labels_and_of_open_answers(kind, student, clip, tmp_path, monkeypatch):
    on_devices(monkeypatch, 2 if kind == "vqa" else 1)
    fields = dict(clip=str(clip), terms=TOKENS, gate=dict(temperature=1e6), cache=kind == "vqa")
    config = run_config(kind, clip, student, clip_td=fields)
    if kind == "vqa":
        (tmp_path / "answers.txt").write_text("yes\nno\n1\n<unk>\n2\nred\nball\n")
        config["data"]["answers"] = str(tmp_path / "answers.txt")
    answered, answer = [], ChoiceEvaluator.__call__
    monkeypatch.setattr(ChoiceEvaluator, "__call__", lambda *given: answered.append(1) or answer(*given))
    result = run_stages(config, tmp_path / "run")["clip_td"]
    assert 0 <= result["test"]["accuracy"] <= 100
    # Results of the validation split are those of the last validation.
    assert len(answered) == (1 if kind == "vqa" else 2)
    assert kind != "vqa" or result["test"] == {
        name.removeprefix("validation/"): value for name, value in result["validation"].items()
    }
    if kind == "vqa":
        dataset, stage = open_dataset(config, tmp_path / "run"), tmp_path / "run" / "clip_td"
        assert dataset.vocab["unknown"] == 3
        dataset.check_answers(stage)
        (stage / "result.json").write_text(json.dumps({**result, "answers": "0123456789abcdef"}))
        with pytest.raises(ValueError, match="clip_td was trained with another answer vocabulary"):
            dataset.check_answers(stage)
    assert result["split"] == ("test" if kind == "snli_ve" else "validation")
    last = json.loads((tmp_path / "run" / "clip_td" / "metrics.jsonl").read_text().splitlines()[0])
    assert last["train/tokens_gate"] == pytest.approx(1.0)  # so hot a gate is open for all
