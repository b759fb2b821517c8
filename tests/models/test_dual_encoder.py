"""The dual encoder: its similarity, masks, word means, logit scale, and equality over meshes and chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.experiment import build_stage, example_batch, plain
from clipdistill_jax.models.build import build_model
from clipdistill_jax.models.dual_encoder import clamp_from_above, mean_by_word
from clipdistill_jax.train import sharding
from clipdistill_jax.train import state as states
from tests.tiny import load_config, shrink

CONFIG = plain(shrink(load_config()))
SHALLOW = {**CONFIG["teacher"], "layers": 1}


def random_batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    batch = {name: np.array(x) for name, x in example_batch(CONFIG, "teacher", size).items()}
    batch["frames"] = rng.integers(0, 256, batch["frames"].shape).astype(np.uint8)
    batch["frame_mask"][1, 1:] = False
    batch["tokens"] = rng.integers(1, 500, batch["tokens"].shape).astype(np.int32)
    batch["token_mask"][:, 12:] = False
    return batch


def test_similarity_is_the_scaled_cosine_of_text_and_pooled_frames():
    model = build_model(CONFIG["teacher"], vocab_size=520)
    batch = random_batch(4)
    seen, _ = model.init_with_output(jax.random.key(0), batch, method="complete")
    for t in range(4):
        for v in range(4):
            frames = [
                np.asarray(f) / np.linalg.norm(f)
                for f, m in zip(seen.temporal[v], seen.frame_mask[v], strict=True)
                if m
            ]
            clip, text = np.mean(frames, 0), np.asarray(seen.text[t])
            cosine = clip @ text / np.linalg.norm(clip) / np.linalg.norm(text)
            np.testing.assert_allclose(seen.similarity[t, v], cosine / 0.07, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["meanP", "seqLSTM", "seqTransf"])
def test_masked_frames_change_nothing(head):
    model = build_model(CONFIG["teacher"], vocab_size=520, temporal=head)
    batch = random_batch(4)
    variables = model.init(jax.random.key(0), batch, method="complete")
    other = dict(
        batch,
        frames=np.where(batch["frame_mask"][..., None, None, None], batch["frames"], 255 - batch["frames"]),
    )
    a, b = (model.apply(variables, x, method="complete").similarity for x in (batch, other))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_mean_pooling_cannot_tell_the_order_of_frames_and_the_transformer_can():
    batch = random_batch(4)
    batch["frame_mask"][:] = True
    back = dict(batch, frames=batch["frames"][:, ::-1])
    differences = {}
    for head in ("meanP", "seqTransf"):
        model = build_model(
            {
                **CONFIG["teacher"],
                "temporal": {
                    "kind": head,
                    **({"positions": 8, "position_std": 0.5} if head != "meanP" else {}),
                },
            },
            vocab_size=520,
        )
        variables = model.init(jax.random.key(0), batch, method="complete")
        a, b = (model.apply(variables, x, method="complete").video for x in (batch, back))
        differences[head] = float(jnp.abs(a - b).max())
    assert differences["meanP"] < 1e-6 and differences["seqTransf"] > 1e-3


def test_mean_by_word():
    states = jnp.asarray(np.arange(12, dtype=np.float32).reshape(1, 6, 2))
    words, mask = mean_by_word(states, jnp.array([[-1, 0, 0, 1, -1, -1]]))
    np.testing.assert_allclose(words[0, 0], (states[0, 1] + states[0, 2]) / 2)
    np.testing.assert_allclose(words[0, 1], states[0, 3])
    np.testing.assert_array_equal(mask, [[True, True, False, False, False, False]])
    assert not np.any(np.asarray(words[0, 2:]))


def test_the_scale_is_clamped_and_can_come_back():
    grad = jax.grad(clamp_from_above)
    assert float(clamp_from_above(jnp.float32(9.0), 4.6)) == pytest.approx(4.6)
    assert float(grad(jnp.float32(4.0), 4.6)) == 1
    for cotangent, expected in ((-1.0, 0.0), (1.0, 1.0)):  # descent follows minus the gradient
        found = jax.grad(lambda x, c=cotangent: c * clamp_from_above(x, 4.6))(jnp.float32(9.0))
        assert float(found) == expected


def test_an_unknown_kind_or_field_is_named():
    with pytest.raises(ValueError, match="'vit' is not one of clip, mobilevit"):
        build_model({**CONFIG["teacher"], "kind": "vit"})
    with pytest.raises(ValueError, match="patch_sise"):
        build_model({**CONFIG["teacher"], "patch_sise": 8})


def one_step(teacher, mesh, chunks=1, **placement):
    config = plain(shrink(load_config()))
    config["teacher"] = SHALLOW
    config["student"] = {**SHALLOW}  # no batch norm, whose statistics depend on the chunks
    config["stages"]["distilled"].update(chunks=chunks, **placement)
    stage = build_stage(config, "distilled", mesh, {"teacher": 520, "student": 520})
    state = states.create(stage.init, stage.optimizer, mesh, jax.random.key(0), **stage.placement)
    frozen = sharding.place_tree({"teacher": teacher}, jax.tree.map(lambda x: x.sharding, stage.frozen))
    with jax.set_mesh(mesh):
        state, metrics = stage.step(state, frozen, sharding.place_batch(random_batch(), mesh))
    losses = {name: float(total) / max(float(count), 1) for name, (total, count) in metrics.items()}
    return losses, state


@pytest.mark.slow
def test_distillation_is_the_same_on_every_mesh_and_in_chunks():
    devices = jax.devices()
    module, batch = build_model(SHALLOW, vocab_size=520), random_batch(2)
    init = jax.jit(lambda key: module.init(key, batch, method="complete"))
    teacher = jax.device_get(init(jax.random.key(7)))
    expected, _ = one_step(teacher, sharding.make_mesh(devices=devices[:1]))
    assert expected["temporal_loss"] > 0 and expected["global_loss"] > 0
    cases = [
        dict(mesh=sharding.make_mesh(devices=devices[:4])),
        dict(mesh=sharding.make_mesh(data=2, fsdp=2, devices=devices[:4]), fsdp_min_size=64, chunks=2),
        dict(
            mesh=sharding.make_mesh(data=2, tensor=2, devices=devices[:4]),
            sharding_rules=[[r"mlp/fc1/kernel$", [None, "tensor"]], [r"mlp/fc2/kernel$", ["tensor", None]]],
        ),
        dict(mesh=sharding.make_mesh(devices=devices[:1]), chunks=4),
    ]
    for case in cases:
        found, _ = one_step(teacher, **case)
        for name in ("loss", "task_loss", "temporal_loss", "spatial_loss", "global_loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=2e-5), (name, case)
