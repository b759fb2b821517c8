"""Vectors read from a cache against the model itself: features, and every loss that is taken from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.distill import TERMS
from clipdistill_jax.distill.cache import (
    RAW_CLIP,
    TEACHER,
    TeacherCache,
    build_cache,
    cache_spec,
    cached_features,
    frozen_vectors,
    join_cached,
    similarity_variables,
)
from clipdistill_jax.distill.local import frame_word_scores
from clipdistill_jax.models.build import build_model
from clipdistill_jax.train.sharding import batch_sharding, make_mesh, place_batch

CLIPS, SAID, F, T, SIDE = 22, 2, 3, 8, 16  # SAID captions a clip
U = 2.0**-8  # bfloat16 keeps 8 bits: rounding to nearest changes a number by at most this part of it


class Data:
    """Random clips and captions, served by id as `RetrievalData` serves them."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.clips = {
            "frames": rng.integers(0, 256, (CLIPS, F, SIDE, SIDE, 3)).astype(np.uint8),
            "frame_mask": np.arange(F) < rng.integers(1, F + 1, (CLIPS, 1)),
        }
        tokens = rng.integers(3, 12, (CLIPS * SAID, 1))
        words = np.arange(T) - 1
        self.captions = {
            "tokens": rng.integers(1, 60, (CLIPS * SAID, T)).astype(np.int32),
            "token_mask": np.arange(T) < tokens,
            "word_ids": np.where((words >= 0) & (words < tokens - 2), words, -1).astype(np.int32),
        }

    def clip_batches(self, ids):
        for row in ids:
            yield {name: x[np.maximum(row, 0)] for name, x in self.clips.items()}

    def caption_batches(self, ids):
        for row in ids:
            yield {name: x[np.maximum(row, 0)] for name, x in self.captions.items()}

    def batch(self, example_id):
        clip_id = example_id // SAID
        return {
            **{name: x[clip_id] for name, x in self.clips.items()},
            **{name: x[example_id] for name, x in self.captions.items()},
            "example_id": example_id,
            "clip_id": clip_id,
        }


def tiny(head):
    text = dict(kind="clip", context_length=T, width=16, layers=1, heads=2, mlp_width=32, vocab_size=64)
    tower = dict(kind="clip", image_size=SIDE, patch_size=8, width=16, layers=1, heads=2, mlp_width=32)
    temporal = {
        "meanP": {},
        "seqTransf": dict(layers=1, heads=2),
        "tightTransf": dict(layers=1, heads=2, width=16),
    }
    return build_model(
        dict(
            tower,
            projection_dim=16,
            text=dict(text, projection_dim=16),
            temporal=dict(temporal[head], kind=head),
        )
    )


def random_variables(module, batch, seed):
    """Made here, as an initialisation compiles longer than the model; the tight head's scores spread too."""
    rng = np.random.default_rng(seed)
    middle = {"scale": 1.0, "logit_scale": 2.5}

    def draw(path, x):
        deviation = np.prod(x.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1
        return (deviation * rng.normal(size=x.shape) + middle.get(path[-1].key, 0.0)).astype(x.dtype)

    shapes = jax.eval_shape(lambda key: module.init(key, batch, method="complete"), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def frame_bound(student, teacher, mask):
    """How far rounding the teacher can move mean_d (s - t)^2: 2 |s - t| |t| u + (t u)^2, over real frames."""
    s, t = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    moved = np.mean(2 * np.abs(s - t) * np.abs(t) * U + (t * U) ** 2, -1)
    return (moved * mask).sum(-1) / mask.sum(-1)


def kl_bound(moved, online, student):
    """How far other teacher scores can move the KL of rows and columns.

    d KL(p || q) / d(logits of p) = p (log p/q - KL): scores that move by e move a KL by at most 2 e R, with
    R the range of the difference of teacher and student; rows and columns make two of them.
    """
    e = np.abs(moved - online).max()
    return 4 * e * (np.ptp(online - student) + 2 * e)


def scores_of(term, model):
    if term == "global":
        return np.asarray(model.similarity)
    return np.asarray(
        frame_word_scores(model.frames, model.frame_mask, model.words, model.word_mask) * model.logit_scale
    )


@pytest.mark.parametrize(
    ("head", "fields", "dtypes"),
    [
        ("seqTransf", TEACHER, ("float32", "bfloat16")),
        ("tightTransf", TEACHER, ("bfloat16",)),
        ("meanP", RAW_CLIP, ("bfloat16",)),
    ],
)
def test_cached_and_online_teachers_agree(tmp_path, head, fields, dtypes):
    data, mesh, module = Data(), make_mesh(devices=jax.devices()[:2]), tiny(head)
    example_id = np.array([40, 3, 2, 17, 9, 30, 31, 0], np.int32)  # 3 and 2 are of one clip
    batch = data.batch(example_id)
    variables, others = (random_variables(module, batch, seed) for seed in (0, 1))
    complete = jax.jit(lambda variables, batch: module.apply(variables, batch, method="complete"))
    online, student = complete(variables, batch), complete(others, batch)
    field_of = {"temporal": "temporal", "spatial": "frames", "global": "similarity"}
    field_of = {term: field for term, field in field_of.items() if field in (*fields, "similarity")}
    if "words" in fields:
        field_of["local"] = "words"
    valid = jnp.ones(8, bool)
    losses = jax.jit(lambda s, t: {term: TERMS[term]().apply({}, s, t, valid) for term in field_of})
    expected = {term: np.asarray(x) for term, x in losses(student, online).items()}
    mask = np.asarray(online.frame_mask)
    specs = [
        cache_spec(
            online,
            fingerprint="f00d",
            data={"num_frames": F},
            clips=CLIPS,
            captions=CLIPS * SAID,
            frame_sampling="uniform",
            fields=fields,
            dtype=dtype,
        )
        for dtype in dtypes
    ]
    vectors = frozen_vectors(
        module,
        variables,
        specs[0],
        clips=data.clip_batches,
        captions=data.caption_batches,
        place=lambda rows: place_batch(rows, mesh),
        sharding=batch_sharding(mesh),
    )
    scale = float(online.logit_scale)
    for dtype, spec in zip(dtypes, specs, strict=True):
        folder = spec.folder(tmp_path)
        build_cache(folder, spec, vectors, batch_size=8, steps_per_file=2, scalars={"logit_scale": scale})
        cache = TeacherCache(folder, spec)
        assert cache.scalars == {"logit_scale": scale}
        (joined,) = join_cached(iter([batch]), [cache])
        shapes = {name: (x.shape, x.dtype) for name, x in spec.zeros(8).items()}
        assert {name: (x.shape, x.dtype) for name, x in joined.items() if "/" in name} == shapes
        few = similarity_variables(module, variables)
        cached = jax.jit(lambda few, joined: cached_features(module, few, joined))(few, joined)

        assert cached.given() == {*fields, "similarity", "logit_scale"}
        for name in cached.given() - {"similarity"}:
            ours, theirs = np.asarray(getattr(cached, name)), np.asarray(getattr(online, name))
            rounded = dtype == "bfloat16" and name in ("frames", "temporal", "words")
            np.testing.assert_allclose(ours, theirs, rtol=U if rounded else 1e-6, atol=1e-6, err_msg=name)
            assert not rounded or np.abs(ours - theirs).max() > 1e-4  # it is bfloat16 that was read
        # Loose heads score `video` and `text`, which stay float32. The tight head reads rounded frames; its
        # blocks are about as steep as the identity, so a score moves by a few roundings.
        exact = head != "tightTransf"
        spread = float(jnp.abs(online.similarity).max())
        np.testing.assert_allclose(
            cached.similarity, online.similarity, rtol=0, atol=spread * (2e-6 if exact else 4 * U)
        )
        if "words" in fields:
            # Rounding turns a vector by at most U, so a cosine moves by 2 U; a maximum or a mean by no more.
            moved = np.abs(scores_of("local", cached) - scores_of("local", online)).max()
            assert 0 < moved < 2 * U * (1 + U) * scale
        for term, found in losses(student, cached).items():
            theirs, field = expected[term], field_of[term]
            assert theirs.min() > 1e-6
            bound = 1e-6 * np.maximum(theirs, 1)
            if term in ("global", "local"):
                bound = bound + kl_bound(*(scores_of(term, model) for model in (cached, online, student)))
            elif dtype == "bfloat16":
                both = mask & np.asarray(student.frame_mask)
                bound = bound + frame_bound(getattr(student, field), getattr(online, field), both)
            assert (np.abs(found - theirs) <= bound).all(), (term, dtype, found - theirs, bound)


def test_a_batch_without_vectors_is_refused():
    with pytest.raises(ValueError, match="no teacher/... vectors, only clip_id"):
        cached_features(tiny("meanP"), {}, {"clip_id": np.zeros(2)})
