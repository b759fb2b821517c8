"""CLIP4Clip checkpoints that do not fit; the heads' numbers are checked in tests/models/test_temporal.py."""

import jax
import numpy as np
import pytest

from clipdistill_jax.convert import clip4clip, openai_clip
from clipdistill_jax.models.clip import ClipTextConfig, ClipVisionConfig, param_shapes
from clipdistill_jax.models.temporal import MeanPool

VISION = ClipVisionConfig(
    image_size=8, patch_size=4, width=64, layers=1, heads=1, mlp_width=64, projection_dim=64
)
TEXT = ClipTextConfig(
    vocab_size=20, context_length=9, width=64, layers=1, heads=1, mlp_width=64, projection_dim=64
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = param_shapes(VISION, TEXT)
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), np.float32), shapes)


@pytest.fixture
def state(params):
    """A meanP checkpoint, its towers in half precision as CLIP4Clip keeps them."""
    return {f"clip.{k}": v.astype(np.float16) for k, v in openai_clip.to_state_dict(params).items()}


def test_mean_pooling_has_the_towers_only(state, params):
    loaded = clip4clip.from_state_dict(state)
    assert loaded.kind == "meanP" and loaded.head == MeanPool()
    assert loaded.configs[0] == VISION
    assert loaded.params["temporal"] == {}
    for name in ("vision", "text", "logit_scale"):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16).astype(np.float32)),
            loaded.params[name],
            params[name],
        )


def test_what_does_not_fit_is_named(state):
    with pytest.raises(ValueError, match=r"b\.1 \(clip\.\).*unknown: visual\.conv2\.weight"):
        clip4clip.from_state_dict(state | {"clip.visual.conv2.weight": np.zeros(1)}, "b.1")
    with pytest.raises(ValueError, match=r"head meanP.*unknown: decoder\.weight"):
        clip4clip.from_state_dict(state | {"decoder.weight": np.zeros(1)})
    block = {"transformerClip.resblocks.0.ln_1.weight": np.zeros(64)}
    with pytest.raises(ValueError, match=r"missing: frame_position_embeddings\.weight"):
        clip4clip.from_state_dict(state | block)
    positions = {"frame_position_embeddings.weight": np.zeros((9, 64))}
    with pytest.raises(ValueError, match=r"head seqTransf.*missing: transformerClip\.resblocks\.0\.attn"):
        clip4clip.from_state_dict(state | block | positions)
    with pytest.raises(ValueError, match=r"missing: lstm_visual\.bias_ih_l0"):
        clip4clip.from_state_dict(state | {"lstm_visual.weight_ih_l0": np.zeros((256, 64))})
    # Frame positions alone belong to no head.
    with pytest.raises(ValueError, match=r"head meanP.*unknown: frame_position_embeddings\.weight"):
        clip4clip.from_state_dict(state | positions)
