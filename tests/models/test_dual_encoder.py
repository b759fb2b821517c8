"""The dual encoder: its similarity, masks, word means, logit scale, and equality over meshes and chunks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.experiment import build_stage, example_batch, plain
from clipdistill_jax.models.build import build_model
from clipdistill_jax.models.dual_encoder import clamp_from_above, mean_by_word
from clipdistill_jax.train import sharding
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


def random_variables(shapes, seed=0):
    """Variables of those shapes, made here: an initialisation compiles longer than the model."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        return (0.3 * rng.normal(size=x.shape) + (path[-1].key == "scale")).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes_of(model, batch):
    return jax.eval_shape(lambda key: model.init(key, batch, method="complete"), jax.random.key(0))


def test_similarity_is_the_scaled_cosine_of_text_and_pooled_frames():
    model = build_model(SHALLOW, vocab_size=520)
    batch = random_batch(4)
    variables = random_variables(shapes_of(model, batch))

    @jax.jit
    def run(variables, key):
        start = model.init(key, batch, method="complete")["params"]["logit_scale"]
        variables = {"params": {**variables["params"], "logit_scale": start}}
        return model.apply(variables, batch, method="complete")

    seen = run(variables, jax.random.key(0))
    assert not np.asarray(seen.frame_mask).all()
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


@pytest.mark.parametrize("head", ["meanP", "seqTransf"])
def test_masked_frames_change_nothing_and_the_transformer_alone_tells_the_order(head):
    fields = dict(layers=1, heads=2, positions=8) if head == "seqTransf" else {}
    model = build_model({**SHALLOW, "temporal": dict(kind=head, **fields)}, vocab_size=520)
    batch = random_batch(4)
    variables = random_variables(shapes_of(model, batch))
    run = jax.jit(lambda batch: model.apply(variables, batch, method="complete"))
    frames, mask = batch["frames"], batch["frame_mask"]
    other = dict(batch, frames=np.where(mask[..., None, None, None], frames, 255 - frames))
    np.testing.assert_allclose(run(batch).similarity, run(other).similarity, atol=1e-5)
    assert np.abs(run(dict(batch, frames=255 - frames)).similarity - run(batch).similarity).max() > 1e-3

    whole = dict(batch, frame_mask=np.ones_like(mask))
    change = np.abs(run(whole).video - run(dict(whole, frames=frames[:, ::-1])).video).max()
    assert change > 1e-3 if head == "seqTransf" else change < 1e-6


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


def one_step(mesh, **fields):
    """The losses of a step, and the parameters after it."""
    config = plain(shrink(load_config()))
    config["teacher"] = SHALLOW
    config["student"] = {**SHALLOW}  # no batch norm, whose statistics depend on the chunks
    sgd = dict(name="sgd", learning_rate=0.1, clip_norm=0.0)  # compiles sooner than AdamW
    config["stages"]["distilled"].update(optimizer=sgd, **fields)
    stage = build_stage(config, "distilled", mesh, {"teacher": 520, "student": 520})
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), stage.template)
    state = state.replace(params=random_variables(stage.template.params))
    given, shapes = (state, random_variables(stage.frozen, 7)), (stage.template, stage.frozen)
    state, frozen = sharding.place_tree(given, jax.tree.map(lambda x: x.sharding, shapes))
    with jax.set_mesh(mesh):
        state, metrics = stage.step(state, frozen, sharding.place_batch(random_batch(16), mesh))
    losses = {name: float(total) / max(float(count), 1) for name, (total, count) in metrics.items()}
    return losses, jax.device_get(state.params)


@pytest.mark.slow
def test_distillation_is_the_same_in_chunks_on_every_axis_of_a_mesh():
    expected, expected_params = one_step(sharding.make_mesh(devices=jax.devices()[:1]))
    assert expected["temporal_loss"] > 0 and expected["global_loss"] > 0
    found, params = one_step(
        sharding.make_mesh(data=2, fsdp=2, tensor=2),
        chunks=4,
        fsdp_min_size=64,
        sharding_rules=[[r"mlp/fc1/kernel$", [None, "tensor"]], [r"mlp/fc2/kernel$", ["tensor", None]]],
    )
    for name in ("loss", "task_loss", "temporal_loss", "spatial_loss", "global_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=2e-5), name
    # A float32 gradient's sums in another order, times the learning rate.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6 * expected["grad_norm"])
    jax.tree.map(close, params, expected_params)
