"""Where weights start: parts, sources, position tables."""

import jax
import numpy as np
import pytest

from clipdistill_jax.convert import hf_clip, mobilevit
from clipdistill_jax.experiment import plain
from clipdistill_jax.models.build import build_model
from clipdistill_jax.weights import read_initial
from tests.fake_stage import random_variables
from tests.tiny import load_config, shrink

PARTS = ("vision", "text", "logit_scale")
CONFIG = plain(shrink(load_config()))


def variables(kind, seed, **change):
    model = build_model({**CONFIG[kind], **change}, vocab_size=520)
    data, side = CONFIG["data"], change.get("image_size", CONFIG["data"]["image_size"])
    made = random_variables(model, data["num_frames"], side, data["max_tokens"], seed)
    return model, made["params"], made.get("batch_stats", {})


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    model, params, _ = variables("teacher", 1)
    folder = tmp_path_factory.mktemp("clip")
    towers = {name: params[name] for name in PARTS}
    hf_clip.save(folder, (model.vision.config, model.text.config), towers)
    return folder, params


def test_a_hugging_face_directory_fills_both_towers(clip_directory, tmp_path):
    folder, saved = clip_directory
    _, params, _ = variables("teacher", 2)
    made, _ = read_initial({"model": str(folder)}, params, {}, (tmp_path,))
    assert equal(made["vision"], saved["vision"]) and equal(made["text"], saved["text"])
    assert equal(made["temporal"], params["temporal"])


def test_one_part_alone(clip_directory, tmp_path):
    folder, saved = clip_directory
    _, params, state = variables("student", 2)
    made, _ = read_initial({"text": str(folder)}, params, {"batch_stats": state}, (tmp_path,))
    assert equal(made["text"], saved["text"]) and equal(made["vision"], params["vision"])


def test_a_temporal_head_can_start_from_the_text_tower(tmp_path):
    wide = {**CONFIG["teacher"]["text"], "mlp_width": 64}  # a head's blocks are four times as wide inside
    model, saved, _ = variables("teacher", 1, text=wide)
    folder = tmp_path / "clip"
    hf_clip.save(folder, (model.vision.config, model.text.config), {k: saved[k] for k in PARTS})
    _, params, _ = variables("teacher", 2, text=wide)
    made, _ = read_initial({"model": str(folder), "temporal": "text"}, params, {}, (tmp_path,))
    assert equal(made["temporal"]["transformer"]["block_0"], saved["text"]["transformer"]["block_0"])


def test_positions_are_interpolated_to_the_models_grid(clip_directory, tmp_path):
    folder, saved = clip_directory
    _, params, _ = variables("teacher", 2, patch_size=8, image_size=64)
    made, _ = read_initial({"model": str(folder)}, params, {}, (tmp_path,))
    table = made["vision"]["position_embedding"]
    assert table.shape == (65, 16)
    np.testing.assert_array_equal(table[0], saved["vision"]["position_embedding"][0])


def test_a_vision_tower_of_others_keeps_the_models_projection(tmp_path):
    from safetensors.numpy import save_file

    _, theirs, stats = variables("student", 1)
    vision = {name: value for name, value in theirs["vision"].items() if name != "embedding"}
    file = tmp_path / "model.safetensors"
    tensors = mobilevit.to_timm({"params": vision, "batch_stats": stats["vision"]})
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file)
    _, params, state = variables("student", 2)
    made, moved = read_initial({"vision": str(file)}, params, {"batch_stats": state}, (tmp_path,))
    assert equal(made["vision"]["stem"], theirs["vision"]["stem"])
    assert equal(made["vision"]["embedding"], params["vision"]["embedding"])
    assert equal(moved["batch_stats"]["vision"], stats["vision"])


@pytest.mark.parametrize(
    "init,message",
    [
        ({"modle": "x"}, "init has no 'modle'"),
        ({"temporal": "stage:nothing"}, "nothing"),
    ],
)
def test_bad_sources_are_named(init, message, tmp_path):
    _, params, _ = variables("teacher", 2)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_initial(init, params, {}, (tmp_path,))


def test_a_file_that_is_no_known_model_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a.weight": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    _, params, _ = variables("teacher", 2)
    with pytest.raises(ValueError, match="neither CLIP"):
        read_initial({"model": str(tmp_path / "x.safetensors")}, params, {}, (tmp_path,))
