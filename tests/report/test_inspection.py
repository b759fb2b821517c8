"""The numbers of a run's figures against its models called clip by clip; the command on a finished run."""

import argparse
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.evaluate.evaluator import Split
from clipdistill_jax.experiment import plain
from clipdistill_jax.models.build import build_model
from clipdistill_jax.report import inspection
from clipdistill_jax.report.opened import BATCH, Model, Opened
from clipdistill_jax.report.reconstruction import halves
from tests import fake_stage, tiny_config
from tests.report import fake_run

CLIPS, FRAMES, SIDE, TOKENS = 20, 2, 16, 6
CAPTIONS = ["a red circle moves", "a blue square grows", "two green stars"]


@pytest.fixture(scope="module")
def data():
    """Pixels, masks and tokens of 20 clips with 23 captions, of which clip 3 has four."""
    rng = np.random.default_rng(0)
    own = np.sort(np.concatenate([np.arange(CLIPS), [3, 3, 3]])).astype(np.int32)
    lengths = rng.integers(3, TOKENS + 1, len(own))
    tokens = {
        "tokens": rng.integers(0, 600, (len(own), TOKENS), np.int32),
        "token_mask": np.arange(TOKENS) < lengths[:, None],
        "word_ids": np.where(np.arange(TOKENS) < lengths[:, None] - 1, np.arange(TOKENS) - 1, -1).astype(
            np.int32
        ),
    }
    clips = {
        "frames": rng.integers(0, 255, (CLIPS, FRAMES, SIDE, SIDE, 3), np.uint8),
        "frame_mask": np.arange(FRAMES) < rng.integers(1, FRAMES + 1, CLIPS)[:, None],
    }
    return clips, tokens, own


def batches(arrays, count):
    """Batches of BATCH rows, the last filled with rows of mask False and nonsense."""
    for start in range(0, count, BATCH):
        rows = np.arange(start, start + BATCH)
        batch = {name: value[rows % count] for name, value in arrays.items()}
        yield {**batch, "mask": rows < count}


@pytest.fixture(scope="module")
def models(data):
    """Two CLIPs of other weights, and a convolutional student."""
    clips, tokens, own = data
    split = Split(lambda: batches(clips, CLIPS), lambda: batches(tokens, len(own)), own)
    clip = plain(tiny_config.get_config().student)
    student = clip | dict(kind="mobilevit", width=1.0, embed_dim=16, channels=(4,) * 5, stem_channels=4)
    student |= dict(depths=(1, 1, 1), strides=(2, 2, 1, 2, 1, 1), depthwise="shift")
    for field in ("image_size", "patch_size", "layers", "heads", "mlp_width", "projection_dim"):
        del student[field]
    first = {name: value[:1] for name, value in {**clips, **tokens}.items()}
    rng, made = np.random.default_rng(1), []

    def value(path, x):
        """As a network starts, and without compiling its `init`."""
        if path[-1].key in ("scale", "var"):
            return np.ones(x.shape, x.dtype)
        return np.asarray(rng.normal(size=x.shape) / np.sqrt(max(np.prod(x.shape[:-1]), 1)), x.dtype)

    for index, (label, spec) in enumerate({"raw CLIP": clip, "teacher": clip, "student": student}.items()):
        module = build_model(spec)
        shapes = jax.eval_shape(lambda m=module: m.init(jax.random.key(0), first, method="complete"))
        variables = jax.tree_util.tree_map_with_path(value, dict(shapes))
        made.append(Model(label, index, module, variables, split))
    return made


def test_maps_are_those_of_each_caption_with_its_own_clip(data, models):
    clips, tokens, own = data
    model = models[0]
    maps = inspection.model_maps(model, own)
    assert maps.cosines.shape == (len(own), FRAMES, TOKENS)
    for pair in (0, 4, 19, len(own) - 1):
        seen = model.encode_video(model.variables, {k: x[own[pair]][None] for k, x in clips.items()})
        said = model.encode_text(model.variables, {k: x[pair][None] for k, x in tokens.items()})
        a, b = np.asarray(seen.frames[0]), np.asarray(said.words[0])
        real = clips["frame_mask"][own[pair]][:, None] & np.asarray(said.word_mask[0])
        norms = np.linalg.norm(a, axis=-1)[:, None] * np.linalg.norm(b, axis=-1)
        expected = np.where(real, a @ b.T / np.maximum(norms, 1e-12), 0)
        np.testing.assert_array_equal(maps.mask[pair], real)
        np.testing.assert_allclose(maps.cosines[pair], expected, atol=2e-5)  # float32, other batch sizes


def test_alignment_section(data, models):
    own = data[2]
    test = {
        "clip_of_text": own,
        "captions": np.array([CAPTIONS[i % 3] for i in range(len(own))]),
        "video_ids": np.array([f"video{i}" for i in range(CLIPS)]),
    }
    clip = models[0]
    itself = Model("itself", 5, clip.module, clip.variables, clip.split)
    section, numbers = inspection.alignment_section(clip, [models[2], itself], test, pairs=2)
    assert numbers["itself"]["correlation"] == pytest.approx(1, abs=1e-9)
    assert abs(numbers["student"]["correlation"]) < 0.9
    assert numbers["student"]["pairs"] <= len(own) and section.wide and len(section.panels) == 2
    assert "1.00 (itself)" in section.text and "video" in section.panels[0].heading


def test_reconstruction_section(models):
    clip, teacher, student = models
    itself = Model("itself", 5, teacher.module, teacher.variables, teacher.split)
    fit = halves(18, np.zeros((0, 2), int))  # ends within the second batch
    section, numbers = inspection.reconstruction_section(teacher, [student, itself], fit)
    assert len(section.panels) == 2
    assert max(numbers["itself"]["residual"]) < 0.01 < min(numbers["student"]["residual"])
    assert np.shape(numbers["student"]["single"]) == (1, 5)
    # The same from all clips in one batch.
    clips = next(iter(teacher.split.clips()))
    more = list(teacher.split.clips())[1]
    whole = {name: np.concatenate([clips[name], more[name]])[:18] for name in ("frames", "frame_mask")}
    layers = [
        [
            np.asarray(x)
            for x in m.encode_video(m.variables, {k: jnp.asarray(v) for k, v in whole.items()}).layers
        ]
        for m in (student, teacher)
    ]
    parts = [
        inspection.reconstruction.moments(
            *([x[half] for x in found] for found in layers), whole["frame_mask"][half], 2
        )
        for half in (fit, ~fit)
    ]
    widths = [[x.shape[-1] for x in found] for found in layers]
    expected = inspection.reconstruction.reconstruct(*parts, *widths)
    np.testing.assert_allclose(numbers["student"]["residual"], expected.residual, rtol=1e-3)
    np.testing.assert_allclose(numbers["student"]["single"], expected.single, rtol=1e-3)


def parsed(*argv):
    parser = argparse.ArgumentParser()
    inspection.arguments(parser)
    return parser.parse_args(argv)


def test_the_rows_of_a_sweep(tmp_path):
    for name, row, recall in (("shared", "teacher", 40.0), ("T/seed0", "T", 20.0), ("T/seed1", "T", 22.0)):
        (tmp_path / name).mkdir(parents=True)
        result = {"test": {"t2v_R@1": recall}, "sizes": {"total": 10, "flops_clip": 1e9}}
        (tmp_path / name / "row.json").write_text(json.dumps({"row": row, "seed": 0, **result}))
    section, numbers = inspection.cost_section(inspection.sweep_rows(tmp_path))
    assert numbers["T"] == {"mean": 21.0, "deviation": pytest.approx(2**0.5), "t2v_R@1": [20.0, 22.0]}
    assert "one standard deviation" in section.text and len(section.panels) == 2
    assert inspection.sweep_rows(tmp_path / "elsewhere") == {}


def test_a_missing_stage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is not the folder of a stage"):
        inspection.figures(parsed(f"--workdir={tmp_path}", "--stages=nothing"))


@pytest.mark.slow
def test_the_command_on_a_run_and_on_one_based_on_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow", reason="the clips are read with TensorFlow")
    # Its warnings, kept by pytest, keep frames alive, and with them iterators that are long done.
    monkeypatch.setattr(logging.getLogger("tensorflow"), "disabled", True)
    config = plain(tiny_config.get_config())
    config["world"]["train"] = 8
    config["stages"]["alone"]["title"] = "alone & co"
    config["stages"]["distilled"]["title"] = "taught"
    run = tmp_path / "shared"
    for name in ("alone", "distilled"):
        fake_stage.write_stage(run, config, name)
        file, made_up = run / name / "result.json", fake_run.result(name, fake_run.scores("student"))
        found = json.loads(file.read_text())
        file.write_text(json.dumps({**made_up, **found, "test": made_up["test"]}))
    said = inspection.figures(parsed(f"--workdir={run}", "--stages=distilled", "--clip=stage:alone"))
    numbers = json.loads((run / "figures" / "numbers.json").read_text())
    assert list(numbers) == ["alignment", "reconstruction", "cost"]
    assert list(numbers["cost"]) == ["alone & co", "taught"]
    page = (run / "report.html").read_text()
    assert "Frame-word alignment" in page and "Teacher layers from student layers" in page
    assert "R@1 against parameters" in page and "R@1 against FLOPs" not in page  # which it draws itself
    files = [line for line in said.splitlines() if line.endswith(".png")]
    assert len(files) == 3 + 2 + 2
    assert all(min(Image.open(file).size) > 200 for file in files)

    # A row of a sweep: the student lies apart, its data and its teacher in the run that it is based on.
    expected = Opened(run, ["distilled"]).stage("distilled")
    row = tmp_path / "T" / "seed0"
    row.mkdir(parents=True)
    shutil.move(run / "distilled", row / "distilled")
    file = row / "distilled" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base": str(run)}))
    opened = Opened(tmp_path, ["T/seed0/distilled"])
    assert list(opened.results) == ["shared/alone", "T/seed0/distilled"]
    assert opened.stages["T/seed0/distilled"]["teacher"] == "shared/alone"
    found = opened.stage("T/seed0/distilled")
    assert (found.label, found.index) == (expected.label, 1) and not (row / "world").exists()
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
    jax.tree.map(
        np.testing.assert_array_equal, next(iter(found.split.clips())), next(iter(expected.split.clips()))
    )
    assert opened.clip("stage:shared/alone").label == "raw CLIP"
    (run / "alone" / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"alone has no result\.json"):
        opened = Opened(tmp_path, ["T/seed0/distilled"])
        opened.stage(opened.stages["T/seed0/distilled"]["teacher"])
