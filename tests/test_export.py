"""Exported folders against the models they are of; what is damaged or unfinished is refused."""

import hashlib
import json
import shutil

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from transformers import CLIPModel, PreTrainedTokenizerFast

from clipdistill_jax import export
from clipdistill_jax.convert import dual_encoder
from clipdistill_jax.data.tokenizer import load_tokenizer
from clipdistill_jax.experiment import plain
from clipdistill_jax.export import export_stage, load_exported, random_inputs
from clipdistill_jax.models.build import build_model
from clipdistill_jax.weights import read_source
from tests.fake_stage import SAID, random_variables, write_stage
from tests.tiny import load_config, shrink
from tests.tiny_config import get_config


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The quickstart's student, shrunk: (stage folder, exported folder, distances, module, variables)."""
    workdir = tmp_path_factory.mktemp("run")
    module, variables = write_stage(workdir, shrink(load_config()), "distilled")
    out = workdir / "deep" / "student"
    distances = export_stage(workdir / "distilled", out)
    return workdir / "distilled", out, distances, module, variables


def copy(folder, to):
    return shutil.copytree(folder, to)


@pytest.fixture(scope="module")
def expected(student):
    """Arguments of both functions for five clips and texts, and the model's own vectors of them."""
    _, out, _, module, variables = student
    given = random_inputs(json.loads((out / "config.json").read_text()), 5)

    @jax.jit
    def vectors(variables, clips, texts):
        seen = module.apply(variables, *clips, method="encode_video")
        said = module.apply(variables, *texts, method="encode_text")
        return seen.video, said.text

    video, text = map(np.asarray, vectors(variables, given["encode_video"], given["encode_text"]))
    return given, {"encode_video": video, "encode_text": text / np.linalg.norm(text, axis=-1, keepdims=True)}


@pytest.mark.parametrize("stablehlo", [False, True])
def test_exported_functions_are_the_model_at_any_batch_size(student, expected, stablehlo):
    loaded, (given, right) = load_exported(student[1], stablehlo=stablehlo), expected
    for name in ("encode_video", "encode_text"):
        assert np.ptp(right[name], axis=0).max() > 1e-2  # the rows differ
        for size in (1, 3, 5):
            found = getattr(loaded, name)(*(x[:size] for x in given[name]))
            # float32 sums in another order; the vectors have length 1.
            np.testing.assert_allclose(np.asarray(found), right[name][:size], atol=5e-6)


def test_the_folder_holds_the_student_alone(student):
    _, out, distances, _, variables = student
    assert set(distances) == {"safetensors", "StableHLO"} and max(distances.values()) <= export.SAME
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "encode_text.stablehlo",
        "encode_video.stablehlo",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    stored = safetensors.numpy.load_file(out / "model.safetensors")
    wanted = dual_encoder.flat(variables)
    assert stored.keys() == wanted.keys() and any(name.startswith("batch_stats.") for name in stored)
    assert all(np.array_equal(stored[name], wanted[name]) for name in wanted)
    config = json.loads((out / "config.json").read_text())
    assert config["logit_scale"] == pytest.approx(np.exp(2.5))
    assert config["video"] == {
        "fps": 1.0,
        "max_frames": 32,
        "num_frames": 3,
        "image_size": 32,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
    }


def test_stablehlo_is_for_any_batch_and_every_platform(student):
    _, out, *_ = student
    config = json.loads((out / "config.json").read_text())
    functions = dual_encoder.read_functions(out, config)
    for function in functions.values():
        assert set(function.platforms) == {"cpu", "cuda", "tpu"}
        assert str(function.out_avals[0].shape) == "(b, 16)"
    # The weights are an argument and nowhere else: with zeros in their place there is nothing left.
    weights = safetensors.numpy.load_file(out / "model.safetensors")
    zeros = {name: np.zeros_like(x) for name, x in weights.items()}
    given = random_inputs(config, 3)["encode_text"]
    assert not np.asarray(functions["encode_text"].call(zeros, *given)).any()


def test_the_tokenizer_is_the_runs_and_hugging_faces(student):
    loaded = load_exported(student[1])
    length = loaded.config["text"]["max_tokens"]
    tokens = loaded.tokenizer.encode(SAID, length)
    theirs = PreTrainedTokenizerFast.from_pretrained(student[1])
    for row, mask, text in zip(tokens.tokens, tokens.token_mask, SAID, strict=True):
        assert theirs(text).input_ids == row[mask].tolist()
    assert loaded.encode_sentences(SAID).shape == (3, 16)


def test_the_card_tells_metrics_and_sizes(student):
    _, out, *_ = student
    said = (out / "README.md").read_text()
    assert "| t2v_R@1 | 12.50 |" in said and "1,000 parameters; 0.0015 GFLOPs" in said
    assert "| t2v_MdR | 4.00 |" in said and "3 frames" in said
    assert "distilled from the stage `teacher`" in said and "{" not in said.split("```")[0]


def test_a_clip_teacher_is_exported_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "compare", lambda *args: {})  # compiles most; the student's test has it
    config = get_config()
    config.base = str(tmp_path / "base")  # a run that uses another's data has its tokenizer there
    write_stage(tmp_path, config, "alone")
    (tmp_path / "base").mkdir()
    (tmp_path / "tokenizer").rename(tmp_path / "base" / "tokenizer")
    export_stage(tmp_path / "alone", tmp_path / "clip")
    config = load_exported(tmp_path / "clip").config
    assert config["model"]["kind"] == "clip" and config["video"]["mean"][0] == pytest.approx(0.48145466)


def test_a_clip_is_exported_as_hugging_faces(tmp_path, capsys):
    module, variables = write_stage(tmp_path, get_config(), "alone")
    stage, out = tmp_path / "alone", tmp_path / "clip"
    assert export.main([f"--stage={stage}", f"--out={out}", "--format=clip"]) == 0
    jax.tree.map(np.testing.assert_array_equal, read_source(str(out), ())["params"], variables["params"])
    tokenizer = load_tokenizer(out)
    tokens = tokenizer.encode(SAID, 8)
    torch = pytest.importorskip("torch", reason="parity with transformers' torch models")
    theirs = CLIPModel.from_pretrained(out).eval()
    assert theirs.config.text_config.eos_token_id == tokenizer.eot_id
    pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        seen = theirs.get_image_features(torch.tensor(pixels.transpose(0, 3, 1, 2)))
        said = theirs.get_text_features(torch.tensor(tokens.tokens, dtype=torch.long))
    video = module.apply(variables, pixels[:, None], np.ones((2, 1), bool), method="encode_video").video
    text = module.apply(variables, *tokens, method="encode_text").text
    # float32 sums in another order; the video's vector has length 1.
    seen = seen / seen.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(seen.numpy(), video, atol=5e-6)
    np.testing.assert_allclose(said.numpy(), text, rtol=2e-4, atol=2e-5)
    config = get_config()
    config.stages.alone.temporal = "seqLSTM"
    write_stage(tmp_path / "other", config, "alone")
    arguments = [f"--stage={tmp_path / 'other' / 'alone'}", f"--out={tmp_path / 'no'}", "--format=clip"]
    assert export.main(arguments) == 1 and not (tmp_path / "no").exists()
    assert "temporal head" in capsys.readouterr().err


def test_other_text_towers_and_heads_are_exported_too():
    config = plain(get_config())
    spec = dict(config["student"], temporal=dict(kind="seqLSTM"))
    spec["text"] = dict(
        kind="bert", vocab_size=50, width=16, layers=1, heads=2, mlp_width=32, projection_dim=16
    )
    module = build_model(spec)
    variables = random_variables(module, frames=2, side=16, tokens=8)
    shapes = {"video": dict(num_frames=2, image_size=16), "text": dict(max_tokens=8, vocab_size=50)}
    weights, given = dual_encoder.flat(variables), random_inputs(shapes, 3)
    for name, function in dual_encoder.lower(module, shapes, weights).items():
        function = jax.export.deserialize(function.serialize())
        right = getattr(dual_encoder, name)(module, weights, *given[name])
        np.testing.assert_allclose(function.call(weights, *given[name]), right, atol=5e-6)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "config"])
def test_damaged_weights_are_refused(student, tmp_path, damage):
    out = copy(student[1], tmp_path / "copy")
    file, error, message = out / "model.safetensors", ValueError, "damaged or was changed"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-3] ^= 1  # one bit of one weight, which safetensors itself would not notice
        file.write_bytes(data)
    elif damage == "gone":
        file.unlink()
        error, message = FileNotFoundError, "no such file"
    else:
        config = json.loads((out / "config.json").read_text())
        config["model"]["text"]["width"] = 8
        (out / "config.json").write_text(json.dumps(config))
        message = "do not fit the model: params.text"
    with pytest.raises(error, match=message) as told:
        load_exported(out)
    assert str(file) in str(told.value)


def test_damaged_functions_and_other_folders_are_refused(student, tmp_path):
    out = copy(student[1], tmp_path / "copy")
    file = out / "encode_text.stablehlo"
    file.write_bytes(file.read_bytes()[:-10])
    load_exported(out)  # needs none of them
    with pytest.raises(ValueError, match="encode_text.stablehlo is damaged"):
        load_exported(out, stablehlo=True)
    with pytest.raises(FileNotFoundError, match="not an exported model"):
        load_exported(student[0] / "checkpoints")
    with pytest.raises(ValueError, match="model_type is None"):
        load_exported(student[0])  # a stage has a config.json too


def describe_again(folder, name, data):
    """Replaces a file of the folder, so that config.json still says that it is right."""
    (folder / name).write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    config["files"][name] = hashlib.sha256(data).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", ["safetensors", "StableHLO"])
def test_what_was_written_is_compared_with_the_model(student, tmp_path, form):
    _, source, _, module, variables = student
    out = copy(source, tmp_path / "copy")
    if form == "safetensors":
        weights = safetensors.numpy.load_file(out / "model.safetensors")
        weights["params.text.ln_final.bias"][0] += 0.1
        describe_again(out, "model.safetensors", safetensors.numpy.save(weights))
    else:

        def constant(weights, tokens, token_mask, word_ids):
            return jnp.full((tokens.shape[0], 16), 0.25)

        (b,) = jax.export.symbolic_shape("b")
        config = json.loads((out / "config.json").read_text())
        shapes = dual_encoder.inputs(config, b)["encode_text"]
        other = jax.export.export(jax.jit(constant))(dual_encoder.flat(variables), *shapes)
        describe_again(out, "encode_text.stablehlo", bytes(other.serialize()))
    with pytest.raises(ValueError, match=f"read back from {form} differ"):
        export.compare(out, module, variables, load_exported(out).tokenizer)


def test_what_differs_leaves_nothing(student, tmp_path, monkeypatch):
    def differs(folder, *args):
        assert folder.is_dir()
        raise ValueError("not the model")

    monkeypatch.setattr(export, "compare", differs)
    monkeypatch.setattr(dual_encoder, "write", lambda folder, *args: (folder / "config.json").touch())
    with pytest.raises(ValueError, match="not the model"):
        export_stage(student[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unfinished_stages_and_taken_folders_are_refused(student, tmp_path, capsys):
    stage = copy(student[0], tmp_path / "distilled")
    copy(student[0].parent / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    out = f"--out={tmp_path / 'out'}"
    assert export.main([f"--stage={stage}", f"--out={tmp_path / 'taken'}"]) == 1
    assert "no empty folder" in capsys.readouterr().err
    assert export.main([f"--stage={tmp_path}", out]) == 1
    assert "not the folder of a finished stage: it has no config.json" in capsys.readouterr().err
    result = json.loads((stage / "result.json").read_text())
    (stage / "result.json").write_text(json.dumps({**result, "fingerprint": "0"}))
    assert export.main([f"--stage={stage}", out]) == 1
    assert "other weights" in capsys.readouterr().err
    (stage / "result.json").unlink()
    assert export.main([f"--stage={stage}", out]) == 1
    assert "not run to its end" in capsys.readouterr().err
    assert (tmp_path / "taken" / "file").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_head_that_scores_pairs_is_refused(student):
    config = get_config()
    config.stages.alone.temporal = "tightTransf"
    tokenizer = load_exported(student[1]).tokenizer
    with pytest.raises(ValueError, match="no vector of a clip"):
        export.describe(plain(config), {"stage": "alone"}, {}, tokenizer, "float32")
