"""The cache of questions: read back it is what CLIP says; ragged words, kills, damage and other caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.distill.cache_files import CacheError, pack, unpack
from clipdistill_jax.distill.choice_cache import (
    cached_choice_features,
    choice_cache_spec,
    frozen_choice_vectors,
)
from clipdistill_jax.distill.choices import choice_features
from clipdistill_jax.distill.vector_cache import TeacherCache, build_cache, join_cached
from clipdistill_jax.models.build import build_model
from clipdistill_jax.models.features import Features
from clipdistill_jax.train.sharding import batch_sharding, make_mesh, place_batch

IMAGES, ITEMS, K, T, SIDE, D = 7, 14, 3, 8, 16, 12
U = 2.0**-8  # bfloat16 keeps 8 bits: rounding to nearest changes a number by at most this part of it


class Data:
    """Random images and items, served by id; texts have 0 to 4 words; the first word of all is cut off."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.image = rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3)).astype(np.uint8)
        self.words = rng.integers(0, T - 1, (ITEMS, K, 1))
        self.words[0, 0], self.words[3, 2] = T - 2, 0
        self.words[8:] = np.minimum(self.words[8:], 3)
        place = np.arange(T)
        inside = (place > 0) & (place <= self.words)
        self.text = {
            "clip_tokens": rng.integers(1, 60, (ITEMS, K, T)).astype(np.int32),
            "clip_token_mask": place < self.words + 2,
            "clip_word_ids": np.where(inside, place // 2 + 1, -1).astype(np.int32),
        }
        self.importance = rng.random((ITEMS, K, T)).astype(np.float32)
        self.asked = []

    def images(self, ids):
        for row in ids:
            yield {"image": self.image[np.maximum(row, 0)], "image_id": row, "mask": row >= 0}

    def texts(self, ids):
        """Steps of short texts are narrow."""
        for row in ids:
            self.asked.extend(row[row >= 0].tolist())
            slots = self.slots(row[row >= 0]) if (row >= 0).any() else 6
            yield {name: x[np.maximum(row, 0), :, :slots] for name, x in self.text.items()}

    def slots(self, ids):
        return 6 if self.words[ids].max() <= 4 else T

    def batch(self, ids, slots=T):
        image_id = ids // 2
        return {
            "image": self.image[image_id],
            **{name: x[ids, :, :slots] for name, x in self.text.items()},
            "importance": self.importance[ids, :, :slots],
            "label": (ids % (K + 1) - 1).astype(np.int32),
            "example_id": ids,
            "image_id": image_id,
        }


def tiny(dtype="float32"):
    tower = dict(kind="clip", width=16, layers=1, heads=2, mlp_width=32, projection_dim=D)
    text = dict(tower, context_length=T, vocab_size=64)
    vision = dict(tower, image_size=SIDE, patch_size=8)
    return build_model(dict(vision, text=text, temporal=dict(kind="meanP"), dtype=dtype))


@pytest.fixture(scope="module")
def clip():
    """A module, its variables, and what it says, compiled."""
    module, data = tiny(), Data()
    few = data.batch(np.arange(2))
    names = ("clip_tokens", "clip_token_mask", "clip_word_ids")
    first = dict(zip(("tokens", "token_mask", "word_ids"), (few[name][:, 0] for name in names), strict=True))
    first |= {"frames": few["image"][:, None], "frame_mask": np.ones((2, 1), bool)}
    init = jax.jit(lambda key: module.init(key, first, method="complete"))
    return module, init(jax.random.key(0)), jax.jit(lambda v, batch: choice_features(module, v, batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_and_online_clip_agree(tmp_path, clip, dtype):
    module, variables, say = clip
    data, mesh = Data(), make_mesh(devices=jax.devices()[:2])
    ids = np.array([12, 3, 2, 9, 0, 10], np.int32)  # 3 and 2 are of one image
    online = say(variables, data.batch(ids))
    spec = choice_cache_spec(
        online, fingerprint="f00d", data={"image_size": SIDE}, images=IMAGES, texts=ITEMS, dtype=dtype
    )
    vectors = frozen_choice_vectors(
        module,
        variables,
        spec,
        images=data.images,
        texts=data.texts,
        place=lambda rows: place_batch(rows, mesh),
        sharding=batch_sharding(mesh),
    )
    folder = spec.folder(tmp_path)
    build_cache(folder, spec, vectors, batch_size=4, steps_per_file=2)
    cache = TeacherCache(folder, spec, "clip")
    read = jax.jit(lambda few, joined: cached_choice_features(module, few, joined))
    scale_alone = {"params": {"logit_scale": variables["params"]["logit_scale"]}}

    def cached(batch):
        """What a distilled step has: no image, no text."""
        given = ("importance", "label", "example_id", "image_id")
        (joined,) = join_cached(iter([{name: batch[name] for name in given}]), [cache])
        slots = batch["importance"].shape[-1]
        shapes = {name: (x.shape, x.dtype) for name, x in spec.zeros(len(ids), "clip", slots).items()}
        assert {name: (x.shape, x.dtype) for name, x in joined.items() if "/" in name} == shapes
        return read(scale_alone, joined)

    found = cached(data.batch(ids))
    assert found.given() == online.given() - {"tokens", "token_mask"}
    for name in found.given():
        ours, theirs = np.asarray(getattr(found, name)), np.asarray(getattr(online, name))
        rounded = dtype == "bfloat16" and name == "words"
        np.testing.assert_allclose(ours, theirs, rtol=U if rounded else 1e-5, atol=1e-6, err_msg=name)
        assert not rounded or np.abs(ours - theirs).max() > 1e-4  # it is bfloat16 that was read
    counts = np.asarray(found.word_mask).sum(-1)
    assert counts.min() == 0 and len(np.unique(counts)) > 2

    # A narrow bucket: short texts in fewer slots.
    short = np.array([8, 13, 11, 9, 8, 10], np.int32)
    narrow = data.batch(short, slots=6)
    wide, found = say(variables, data.batch(short)), cached(narrow)
    assert found.words.shape == (6, K, 6, D) and found.importance.shape == found.word_mask.shape
    np.testing.assert_array_equal(found.word_mask, np.asarray(wide.word_mask)[..., :6])
    np.testing.assert_allclose(found.words, np.asarray(wide.words)[..., :6, :], rtol=U, atol=1e-6)
    np.testing.assert_allclose(found.logits, wide.logits, rtol=1e-5, atol=1e-5)


def test_records_hold_real_words_alone():
    rng = np.random.default_rng(0)
    mask = rng.random((5, K, T)) < 0.4
    mask[1], mask[2] = False, True
    words = rng.normal(size=(5, K, T, D)).astype(np.float32) * mask[..., None]
    text = rng.normal(size=(5, K, D)).astype(np.float32)
    layout = {
        "text": ((K, D), "float32"),
        "word_mask": ((K, T), "bool"),
        "words": ((K, T, D), "float32"),
    }
    records = pack(layout, {"text": text, "words": words, "word_mask": mask}, np.array([4, 5, 6, 7, 8]))
    fixed = 4 * K * D + K * T
    assert [len(r) for r in records] == [fixed + 4 * D * mask[i].sum() for i in range(5)]
    for slots in (None, T, 3, T + 2):
        found = unpack(layout, records, slots)
        width = slots or T
        np.testing.assert_array_equal(found["text"], text)
        for name, x in (("words", words), ("word_mask", mask)):
            expected = np.zeros((5, K, width, *x.shape[3:]), x.dtype)
            expected[:, :, : min(width, T)] = x[:, :, :width]
            np.testing.assert_array_equal(found[name], expected)


def fake(kind, ids):
    """Vectors that tell their own id; item i has i % T words in its first text and none in its second."""
    x = np.sin(ids[:, None] * 7.0 + np.arange(4)).astype(np.float32)
    if kind == "images":
        return {"image": x}
    mask = np.stack([np.arange(T) < ids[:, None] % T, np.zeros((len(ids), T), bool)], 1)
    words = mask[..., None] * np.cos(ids[:, None, None, None] + np.arange(T)[:, None] + np.arange(4.0))
    return {"text": np.stack([x, -x], 1), "word_mask": mask, "words": words.astype(np.float32)}


def fake_vectors(asked, die_at=None):
    def make(kind):
        def run(ids):
            for step, row in enumerate(ids):
                if kind == "texts" and step == die_at:
                    raise KeyboardInterrupt
                asked.setdefault(kind, []).extend(row[row >= 0].tolist())
                yield fake(kind, row)

        return run

    return {kind: make(kind) for kind in ("images", "texts")}


def fake_spec(**changes):
    x = fake("images", np.arange(2)) | fake("texts", np.arange(2))
    about = dict(fingerprint="f00d", data={"manifest": "abc"}, images=20, texts=44, dtype="float32")
    return choice_cache_spec(Features(**x), **{**about, **changes})


STEPS = dict(batch_size=4, steps_per_file=2)  # files of 8


def check(folder, spec, ids, image_id):
    joined = TeacherCache(folder, spec, "clip").join({"example_id": ids, "image_id": image_id})
    expected = fake("images", image_id) | fake("texts", ids)
    assert joined.keys() == {f"clip/{name}" for name in expected}
    for name, x in expected.items():
        np.testing.assert_array_equal(joined[f"clip/{name}"], x)


def test_a_build_that_was_cut_goes_on_where_it_was(tmp_path):
    spec = fake_spec()
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path, spec, fake_vectors({}, die_at=7), **STEPS)
    last = max(tmp_path.glob("texts-*.arrayrecord"))
    assert last.name == "texts-000000016-000000024.arrayrecord"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(CacheError, match="28 of 44 texts are missing: build it again"):
        TeacherCache(tmp_path, spec)
    build_cache(tmp_path, spec, fake_vectors(asked := {}), **STEPS)
    assert asked == {"texts": list(range(16, 44))}
    ids = np.random.default_rng(0).permutation(44).astype(np.int32)
    check(tmp_path, spec, ids, ids % 20)


def test_only_what_a_protocol_trains_on_is_kept(tmp_path):
    texts, images = np.array([41, 3, 7, 16, 9, 22, 30, 31, 40, 5]), np.array([1, 19, 4])
    spec = fake_spec(texts=texts, images=images)
    build_cache(tmp_path, spec, fake_vectors(asked := {}), **STEPS)
    assert asked == {"images": [1, 4, 19], "texts": sorted(texts.tolist())}
    check(tmp_path, spec, texts.astype(np.int32), np.resize(images, 10).astype(np.int32))
    for id_, kind in ((8, "texts"), (43, "texts"), (-1, "texts"), (0, "images")):
        ids = {"example_id": np.array([3, 5]), "image_id": np.array([4, 4])}
        ids["example_id" if kind == "texts" else "image_id"][1] = id_
        with pytest.raises(CacheError, match=f"has the id {id_}, which is none of the .* {kind}"):
            TeacherCache(tmp_path, spec).join(ids)
    with pytest.raises(CacheError, match="ended before id 31:"):
        short = {**fake_vectors({}), "texts": lambda ids: fake_vectors({})["texts"](ids[:1])}
        build_cache(tmp_path / "short", spec, short, batch_size=4, steps_per_file=1)
    with pytest.raises(ValueError, match="the texts to cache are 0 ids"):
        fake_spec(texts=np.zeros(0, int))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "beef"}, "fingerprint is 'f00d', not 'beef'"),
        ({"data": {"manifest": "abd"}}, "manifest is 'abc', not 'abd'"),
        ({"texts": 45}, "texts is 44, not 45"),
        ({"texts": np.arange(44)}, "texts/ids is None, not"),
        ({"dtype": "bfloat16"}, r"texts/words is 'float32\[2, 8, 4\] where word_mask', not 'bfloat16"),
    ],
)
def test_another_cache_is_refused(tmp_path, changes, message):
    build_cache(tmp_path, fake_spec(), fake_vectors({}), **STEPS)
    other = fake_spec(**changes)
    assert other.folder(tmp_path) != fake_spec().folder(tmp_path)
    with pytest.raises(CacheError, match=message):
        TeacherCache(tmp_path, other)
    with pytest.raises(CacheError, match=message):
        build_cache(tmp_path, other, fake_vectors({}), **STEPS)


def test_vectors_that_cannot_be_kept_are_refused(tmp_path):
    def broken(ids):
        for row in ids:
            found = fake("texts", row)
            found["words"][row == 13, 0, 2] = np.nan
            yield found

    with pytest.raises(CacheError, match="words of id 13 is not finite"):
        build_cache(tmp_path, fake_spec(), {**fake_vectors({}), "texts": broken}, **STEPS)
    with pytest.raises(ValueError, match="dtype is 'float16'"):
        fake_spec(dtype="float16")
    with pytest.raises(ValueError, match="no clip/... vectors, only label"):
        cached_choice_features(tiny(), {}, {"label": jnp.zeros(2)})
