"""Batches as pure functions of the step: order, frames, text, hosts, evaluation."""

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.data.index import read_index
from clipdistill_jax.data.pipeline import RetrievalData
from clipdistill_jax.data.plan import FrameChoice, TrainingPlan
from clipdistill_jax.data.tokenizer import open_tokenizer
from clipdistill_jax.data.video import VideoOptions, read_frames

pytest.importorskip("tensorflow", reason="the pipeline runs on tf.data")

SHAPE = {"num_frames": 4, "image_size": 48}


@pytest.fixture(scope="module")
def tokenizer(prepared, tmp_path_factory):
    captions = [text for texts in read_index(prepared, "train").captions for text in texts]
    return open_tokenizer("train:560", "clip", lambda: captions, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def data(prepared, tokenizer) -> RetrievalData:
    return RetrievalData(prepared, tokenizer, max_tokens=16, num_threads=2)


@pytest.fixture(scope="module")
def stored(tree) -> dict[str, list[np.ndarray]]:
    """The centre squares of every frame of every clip, decoded by PIL."""
    found = {}
    for path in (tree / "videos").iterdir():
        frames = read_frames(path, VideoOptions(size=48, quality=95)).frames
        found[path.stem] = [np.asarray(Image.open(io.BytesIO(jpeg)))[:, 8:56] for jpeg in frames]
    return found


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a
    )


def test_contract(data):
    (batch,) = take(data.batches(batch_size=5, **SHAPE), 1)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "frames": ((5, 4, 48, 48, 3), "uint8"),
        "frame_mask": ((5, 4), "bool"),
        "tokens": ((5, 16), "int32"),
        "token_mask": ((5, 16), "bool"),
        "word_ids": ((5, 16), "int32"),
        "example_id": ((5,), "int32"),
        "clip_id": ((5,), "int32"),
        "mask": ((5,), "bool"),
    }
    assert batch["mask"].all()
    assert data.splits == ("train", "validation", "test")
    assert (data.num_items("train"), data.num_items("train", "one")) == (18, 6)


def test_rows_hold_what_their_ids_say(data, stored, tokenizer):
    """Frames against PIL's decoding of the same JPEGs, text against the tokenizer."""
    ids, captions = data.video_ids("train"), data.captions("train")
    for batch in take(data.batches(batch_size=6, **SHAPE), 3):
        expected = tokenizer.encode([captions[k] for k in batch["example_id"]], 16)
        for name, value in expected._asdict().items():
            assert np.array_equal(batch[name], value)
        assert np.array_equal(batch["clip_id"], data.clip_of_caption("train")[batch["example_id"]])
        for row, clip in enumerate(batch["clip_id"]):
            frames = stored[ids[clip]]
            if len(frames) > 4:  # CLIP4Clip, slice_framepos=2
                frames = [frames[k] for k in np.linspace(0, len(frames) - 1, num=4, dtype=int)]
            assert batch["frame_mask"][row].tolist() == [k < len(frames) for k in range(4)]
            for k, frame in enumerate(frames):
                found = batch["frames"][row, k]
                assert np.array_equal(found[:, 1:-1], frame[:, 1:-1])
                # At the cut the decoder has no neighbour to smooth colours with.
                assert np.abs(found.astype(int) - frame).max() <= 4
            assert not batch["frames"][row, len(frames) :].any()


@pytest.mark.parametrize(("captions", "sampling"), [("all", "uniform"), ("one", "random")])
def test_starting_at_a_step_is_skipping_to_it(data, captions, sampling):
    options = {"batch_size": 5, "captions": captions, "frame_sampling": sampling, "seed": 7, **SHAPE}
    from_zero = take(data.batches(0, **options), 9)
    for start in (1, 8):
        for a, b in zip(from_zero[start:], take(data.batches(start, **options), 9 - start), strict=True):
            assert same(a, b)
    (other,) = take(data.batches(0, **(options | {"seed": 8})), 1)
    assert not same(other, from_zero[0])
    (far,) = take(data.batches(2_000_000, **options), 1)
    assert far["mask"].all()


def test_threads_do_not_change_the_batches(prepared, tokenizer, data):
    one = RetrievalData(prepared, tokenizer, max_tokens=16, num_threads=1)
    for a, b in zip(
        take(one.batches(batch_size=5, **SHAPE), 4), take(data.batches(batch_size=5, **SHAPE), 4), strict=True
    ):
        assert same(a, b)


@pytest.mark.parametrize(("captions", "count"), [("all", 2), ("one", 3)])
def test_hosts_take_disjoint_parts_of_the_same_order(data, captions, count):
    options = {"batch_size": 6, "captions": captions, "frame_sampling": "random", "seed": 3, **SHAPE}
    whole = take(data.batches(2, **options), 3)
    parts = [take(data.batches(2, process_index=p, process_count=count, **options), 3) for p in range(count)]
    for step, expected in enumerate(whole):
        joined = {k: np.concatenate([part[step][k] for part in parts]) for k in expected}
        assert same(joined, expected)


def test_random_frames_are_in_order_and_differ_between_epochs(data, stored):
    """Each frame of a clip is 20 levels brighter than the one before: the frames tell their own number."""
    options = {"batch_size": 6, "captions": "one", "shuffle": False, "frame_sampling": "random", **SHAPE}
    numbers = set()
    for batch in take(data.batches(**options), 20):
        assert batch["clip_id"].tolist() == list(range(6))
        red = batch["frames"][5, ..., 0].mean(axis=(1, 2))
        chosen = np.round((red - stored["video5"][0][..., 0].mean()) / 20).astype(int)
        assert (np.diff(chosen) > 0).all() and chosen.min() >= 0 and chosen.max() <= 7
        numbers.add(tuple(chosen.tolist()))
        assert batch["frame_mask"][0].tolist() == [True, True, True, False]  # three frames: all of them
    assert len(numbers) > 10  # of 70


def test_max_clips_draws_from_the_first_clips_alone(data):
    batches = take(data.batches(batch_size=6, max_clips=2, **SHAPE), 3)
    seen = np.concatenate([b["example_id"] for b in batches])
    assert sorted(seen.tolist()) == sorted([*range(6)] * 3)
    assert set(np.concatenate([b["clip_id"] for b in batches]).tolist()) == {0, 1}


@pytest.mark.parametrize(("size", "worst"), [(24, 2), (64, 2)])
def test_other_sizes_are_bicubic_like_pil(data, stored, size, worst):
    """PIL's bicubic with antialias in fixed point against TensorFlow's in floating point: rounding alone."""
    (batch,) = take(
        data.batches(batch_size=6, captions="one", shuffle=False, num_frames=3, image_size=size), 1
    )
    expected = Image.fromarray(stored["video0"][1]).resize((size, size), Image.Resampling.BICUBIC)
    found = batch["frames"][0, 1].astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= worst


def test_evaluation_has_every_clip_and_caption_once(data, tokenizer):
    clips = list(data.eval_clips("train", batch_size=4, **SHAPE))
    assert [b["frames"].shape for b in clips] == [(4, 4, 48, 48, 3)] * 2
    assert np.concatenate([b["clip_id"] for b in clips]).tolist() == [*range(6), -1, -1]
    assert np.concatenate([b["mask"] for b in clips]).tolist() == [True] * 6 + [False] * 2
    assert not clips[1]["frame_mask"][2:].any() and not clips[1]["frames"][2:].any()
    assert all(b["frame_mask"][b["mask"]].any(axis=1).all() for b in clips)
    (train,) = take(data.batches(batch_size=6, captions="one", shuffle=False, **SHAPE), 1)
    assert np.array_equal(np.concatenate([b["frames"] for b in clips])[:6], train["frames"])

    texts = list(data.eval_captions("train", batch_size=4))
    mask = np.concatenate([b["mask"] for b in texts])
    assert mask.tolist() == [True] * 18 + [False] * 2
    joined = {k: np.concatenate([b[k] for b in texts]) for k in texts[0]}
    assert joined["example_id"].tolist() == [*range(18), -1, -1]
    assert joined["clip_id"].tolist() == [k // 3 for k in range(18)] + [-1, -1]
    assert np.array_equal(joined["tokens"][mask], tokenizer.encode(data.captions("train"), 16).tokens)
    assert joined["token_mask"].any(axis=1).all()  # the filling rows are harmless text
    assert {k: v.dtype.name for k, v in joined.items()} == {
        "tokens": "int32",
        "token_mask": "bool",
        "word_ids": "int32",
        "example_id": "int32",
        "clip_id": "int32",
        "mask": "bool",
    }


def test_evaluation_on_several_hosts(data):
    """As many batches on every host, though only some have examples left."""
    count = 4
    for name, options in (("eval_clips", SHAPE), ("eval_captions", {})):
        whole = list(getattr(data, name)("test", batch_size=4, **options))
        parts = [
            list(getattr(data, name)("test", batch_size=4, process_index=p, process_count=count, **options))
            for p in range(count)
        ]
        assert {len(part) for part in parts} == {len(whole)} == {1}
        for step, expected in enumerate(whole):
            joined = {k: np.concatenate([part[step][k] for part in parts]) for k in expected}
            assert same(joined, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": "some"}, "captions='some' must be one of all, one"),
        ({"frame_sampling": "first"}, "frame_sampling='first' must be one of uniform, random"),
        ({"batch_size": 19}, "batch_size=19 is more than the 18 items"),
        ({"batch_size": 7, "captions": "one"}, "batch_size=7 is more than the 6 items"),
        ({"batch_size": 6, "max_clips": 1}, "batch_size=6 is more than the 3 items"),
        ({"max_clips": 0}, "max_clips=0"),
        ({"batch_size": 5, "process_count": 2}, "batch_size=5 must divide over the 2 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 must lie in 0 .. 1"),
        ({"num_frames": 0}, "num_frames=0 must be at least 1"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_bad_arguments(data, options, message):
    with pytest.raises(ValueError, match=message):
        data.batches(**({"batch_size": 4} | SHAPE | options))


def test_unknown_split_and_folder(data, tokenizer, tmp_path):
    with pytest.raises(KeyError, match="train, validation, test, not 'val'"):
        data.batches(split="val", batch_size=4, **SHAPE)
    with pytest.raises(FileNotFoundError, match="prepare it first"):
        RetrievalData(tmp_path, tokenizer)


def test_closing_ends_an_iterator(data):
    batches = data.batches(batch_size=4, **SHAPE)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_a_process_ends_with_an_iterator_half_used(prepared, tokenizer, tmp_path):
    """Background threads that call into Python must not hang the interpreter's end."""
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    code = f"""
from clipdistill_jax.data.pipeline import RetrievalData
from clipdistill_jax.data.tokenizer import load_tokenizer
data = RetrievalData({str(prepared)!r}, load_tokenizer({str(tmp_path)!r}))
batches = data.batches(batch_size=4, num_frames=4, image_size=48)
next(batches)
raise SystemExit(3)
"""
    root = Path(sys.modules[RetrievalData.__module__].__file__).parents[2]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, timeout=120)
    assert done.returncode == 3


def plan(counts, **options) -> TrainingPlan:
    defaults = {"one_caption": False, "shuffle": True, "seed": 0, "batch_size": 4}
    return TrainingPlan(np.array(counts), **(defaults | options))


def test_an_epoch_is_a_permutation_and_nothing_is_dropped():
    p = plan([3, 1, 4, 2, 1], batch_size=4)  # 11 items: batches span epochs
    captions = np.concatenate([p.rows(s).caption for s in range(22)])
    epochs = captions.reshape(8, 11)
    assert (np.sort(epochs, axis=1) == np.arange(11)).all()
    assert len({tuple(e) for e in epochs}) == 8
    clips = np.concatenate([p.rows(s).clip for s in range(22)])
    assert np.array_equal(clips, np.repeat(np.arange(5), [3, 1, 4, 2, 1])[captions])
    unshuffled = plan([3, 1, 4, 2, 1], shuffle=False)
    assert np.concatenate([unshuffled.rows(s).caption for s in range(3)]).tolist() == [*range(11), 0]


def test_every_order_is_equally_likely():
    """3 items have 6 orders; over 6000 epochs each comes 1000 times, with a deviation of 29."""
    p = plan([1, 1, 1], batch_size=3)
    orders = [tuple(p.rows(s).caption.tolist()) for s in range(6000)]
    counts = [orders.count(o) for o in itertools.permutations(range(3))]
    assert sum(counts) == 6000 and max(abs(c - 1000) for c in counts) < 5 * 29
    # Orders of following epochs have nothing to do with each other: 1 in 6 is the same again.
    again = sum(a == b for a, b in itertools.pairwise(orders))
    assert abs(again - 1000) < 5 * 29


def test_ids_outside_a_split_are_refused(data):
    for ids in (np.array([[0, 6]]), np.array([[-2, 0]]), np.arange(3)):
        with pytest.raises(ValueError, match=r"clip ids .* must be \[batches, b\] and lie in -1 .. 5"):
            data.clip_batches("train", ids, **SHAPE)
    with pytest.raises(ValueError, match="caption ids"):
        data.caption_batches("train", np.array([[18]]))


def test_one_caption_shows_all_of_them_in_turn():
    counts = [3, 1, 4]
    p = plan(counts, one_caption=True, batch_size=3)
    first = [0, 3, 4]
    seen = [[], [], []]
    for epoch in range(12):
        rows = p.rows(epoch)
        assert sorted(rows.clip.tolist()) == [0, 1, 2]
        for caption, clip in zip(rows.caption, rows.clip, strict=True):
            seen[clip].append(int(caption) - first[clip])
    for clip, count in enumerate(counts):
        for start in range(0, 12, count):
            assert sorted(seen[clip][start : start + count]) == list(range(count))
    many = plan([5] * 4000, one_caption=True, batch_size=4000, shuffle=False)
    drawn = np.bincount(many.rows(0).caption % 5, minlength=5)
    assert np.abs(drawn - 800).max() < 5 * np.sqrt(4000 * 0.2 * 0.8)


def test_random_frames_are_uniform():
    choice = FrameChoice(np.array([6]), 2, "random", seed=1)
    chosen = choice.choose(np.zeros(6000, int), np.arange(6000))
    assert (chosen[:, 0] < chosen[:, 1]).all()
    pairs = np.bincount(chosen[:, 0] * 6 + chosen[:, 1], minlength=36).reshape(6, 6)[np.triu_indices(6, 1)]
    assert pairs.sum() == 6000 and np.abs(pairs - 400).max() < 5 * np.sqrt(400)


def test_frames_of_rows_without_a_clip():
    choice = FrameChoice(np.array([2, 9]), 3)
    assert choice.choose(np.array([-1, 0, 1]), np.arange(3)).tolist() == [[-1] * 3, [0, 1, -1], [0, 4, 8]]
