"""CLIP's weights in and out: parity with transformers' models, and round trips through every format."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.convert import hf_clip
from clipdistill_jax.models.clip import (
    ClipText,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
    interpolate_positions,
)
from tests.convert.originals import close, flax_model, same_tree

torch = pytest.importorskip("torch", reason="parity with transformers' torch models")
transformers = pytest.importorskip("transformers", reason="parity with transformers' models")

VISION = ClipVisionConfig(
    image_size=32, patch_size=8, width=64, layers=3, heads=1, mlp_width=128, projection_dim=48
)
TEXT = ClipTextConfig(
    vocab_size=60,
    context_length=10,
    width=128,
    layers=2,
    heads=2,
    mlp_width=256,
    projection_dim=48,
    bos_token_id=58,
    eos_token_id=59,
    pad_token_id=1,
)


def hugging_face(act: str = "quick_gelu", ln_eps: float = 1e-5, seed: int = 0):
    """A random torch CLIPModel of the sizes above, every parameter moved from its initial value."""
    torch.manual_seed(seed)
    both = {"hidden_act": act, "layer_norm_eps": ln_eps, "projection_dim": 48}
    config = transformers.CLIPConfig(
        vision_config={
            **both,
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "intermediate_size": 128,
        },
        text_config={
            **both,
            "vocab_size": 60,
            "max_position_embeddings": 10,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "bos_token_id": 58,
            "eos_token_id": 59,
        },
        projection_dim=48,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def model():
    return hugging_face()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(1, 58, (3, 10)).astype(np.int32)
    token_mask = np.arange(10) < np.array([[10], [7], [2]])
    tokens[:, 0] = 58
    tokens[np.arange(3), token_mask.sum(-1) - 1] = 59
    return pixels, np.where(token_mask, tokens, 0), token_mask


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A directory that transformers wrote."""
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_flax(folder):
    return flax_model("FlaxCLIPModel", folder)


def run(vision, text, params, inputs):
    pixels, tokens, token_mask = inputs
    seen = jax.jit(ClipVision(vision).apply)({"params": params["vision"]}, pixels)
    said = jax.jit(ClipText(text).apply)({"params": params["text"]}, tokens, token_mask)
    return seen, said


def torch_outputs(model, inputs):
    pixels, tokens, _ = inputs
    with torch.no_grad():
        return model(
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
            input_ids=torch.tensor(tokens).long(),
            output_hidden_states=True,
        )


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("act, ln_eps", [("quick_gelu", 1e-5), ("gelu", 1e-3)])
def test_towers_equal_torch_in_every_hidden_state(act, ln_eps, inputs):
    model = hugging_face(act, ln_eps)
    vision, text, params = hf_clip.from_state_dict(model.state_dict(), model.config.to_dict())
    assert vision == dataclasses.replace(VISION, act=act, ln_eps=ln_eps)
    assert text == dataclasses.replace(TEXT, act=act, ln_eps=ln_eps)
    seen, said = run(vision, text, params, inputs)
    expected = torch_outputs(model, inputs)

    assert len(seen.hidden) == 4 and len(said.hidden) == 3
    for ours, theirs in zip(seen.hidden, expected.vision_model_output.hidden_states, strict=True):
        close(ours, theirs)
    for ours, theirs in zip(said.hidden, expected.text_model_output.hidden_states, strict=True):
        close(ours, theirs)
    # transformers returns the projected vectors divided by their length.
    close(unit(seen.embedding), expected.image_embeds)
    close(unit(said.embedding), expected.text_embeds)
    with torch.no_grad():
        close(seen.embedding, model.visual_projection(expected.vision_model_output.pooler_output))
        close(said.tokens, model.text_projection(expected.text_model_output.last_hidden_state))
    logits = np.exp(params["logit_scale"]) * unit(said.embedding) @ unit(seen.embedding).T
    close(logits, expected.logits_per_text, atol=1e-4)  # scale 14: 1e-5 relative to the largest possible


def test_towers_equal_flax_in_every_hidden_state(by_flax, folder, inputs):
    seen, said = run(*hf_clip.load(folder), inputs)
    pixels, tokens, _ = inputs

    @jax.jit
    def forward(weights):
        return by_flax(
            pixel_values=jnp.asarray(pixels.transpose(0, 3, 1, 2)),
            input_ids=tokens,
            params=weights,
            output_hidden_states=True,
        )

    expected = forward(by_flax.params)
    for ours, theirs in zip(seen.hidden, expected.vision_model_output.hidden_states, strict=True):
        close(ours, theirs)
    for ours, theirs in zip(said.hidden, expected.text_model_output.hidden_states, strict=True):
        close(ours, theirs)
    close(unit(seen.embedding), expected.image_embeds)
    close(unit(said.embedding), expected.text_embeds)


def test_every_format_gives_the_same_parameters(model, by_flax, folder, tmp_path):
    expected = hf_clip.load(folder)
    assert (folder / "model.safetensors").is_file()

    torch_folder = tmp_path / "torch"
    model.save_pretrained(torch_folder, safe_serialization=False)
    assert (torch_folder / "pytorch_model.bin").is_file()
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    flax_folder = tmp_path / "flax"
    by_flax.save_pretrained(flax_folder)
    assert (flax_folder / "flax_model.msgpack").is_file()
    for other in (torch_folder, sharded, flax_folder):
        vision, text, params = hf_clip.load(str(other))
        assert (vision, text) == expected[:2]
        same_tree(params, expected[2])


def test_a_written_directory_loads_in_transformers(model, folder, tmp_path, inputs):
    vision, text, params = hf_clip.load(folder)
    vision = dataclasses.replace(vision, mean=(0.5, 0.25, 0.75), std=(0.5, 1.0, 0.25))
    hf_clip.save(tmp_path / "out", (vision, text), jax.tree.map(jnp.asarray, params))
    again, report = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    expected, given = torch_outputs(model, inputs), torch_outputs(again.eval(), inputs)
    assert torch.equal(expected.logits_per_image, given.logits_per_image)

    back = hf_clip.load(tmp_path / "out")
    assert back[:2] == (vision, text)
    same_tree(back[2], params)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_mean == [0.5, 0.25, 0.75] and processor.crop_size == {"height": 32, "width": 32}


def test_another_image_size_interpolates_the_positions(folder, inputs):
    vision, text, params = hf_clip.load(folder)
    larger, _, resized = hf_clip.load(folder, image_size=48)
    assert larger == dataclasses.replace(vision, image_size=48)
    table = resized["vision"]["position_embedding"]
    assert table.shape == (1 + 6 * 6, 64)
    np.testing.assert_array_equal(table, interpolate_positions(params["vision"]["position_embedding"], 6))
    # The tower runs, on pictures of any size.
    seen = jax.jit(ClipVision(larger).apply)({"params": resized["vision"]}, inputs[0])
    assert seen.layers[-1].shape == (3, 6, 6, 64)
    with pytest.raises(ValueError, match="image_size 50 is not a multiple of the patch size 8"):
        hf_clip.load(folder, image_size=50)


def test_directories_that_are_not_clip_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="of a 'bert' model, not 'clip'"):
        hf_clip.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        hf_clip.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        hf_clip.load(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown: text_model\.encoder\.layers\.1\."):
        hf_clip.load(tmp_path)


@pytest.mark.parametrize("patch", [32, 16])
def test_full_size_embeddings_equal_torch(patch):
    """ViT-B/32 and ViT-B/16, random weights, one picture and one caption, in float32."""
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config={"patch_size": patch})).eval()
    vision, text, params = hf_clip.from_state_dict(model.state_dict(), model.config.to_dict())
    if patch == 32:
        assert sum(x.size for x in jax.tree.leaves(params)) == 151_277_313
        assert sum(x.size for x in jax.tree.leaves(params["vision"])) == 87_849_216
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(1, 224, 224, 3)).astype(np.float32)
    tokens = np.array([[49406, *rng.integers(1, 49406, 8), 49407, 0, 0]], np.int32)
    seen, said = run(vision, text, params, (pixels, tokens, np.arange(12)[None] < 10))
    expected = torch_outputs(model, (pixels, tokens, None))
    with torch.no_grad():
        image = model.visual_projection(expected.vision_model_output.pooler_output)
        caption = model.text_projection(expected.text_model_output.pooler_output)
    close(seen.embedding, image)
    close(said.embedding, caption)
    assert np.abs(image).max() > 0.1 and np.abs(caption).max() > 0.1
