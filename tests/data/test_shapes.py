"""The embedded world: what it promises of its scenes, captions, twins and files."""

import dataclasses
import json
import random

import numpy as np
import pytest

from clipdistill_jax.data.formats import FORMATS, msrvtt, reader_options
from clipdistill_jax.data.shapes import WORLDS, WRITERS, Scene, Thing, WorldConfig, scenes, write_msrvtt
from clipdistill_jax.data.shapes.drawing import render
from clipdistill_jax.data.shapes.world import SYNONYMS, captions, describe, motion_kind
from clipdistill_jax.data.video import VideoOptions, read_frames

CLIPS = [name for name, world in WORLDS.items() if world is WorldConfig]
CONFIG = WorldConfig(train=60, train_small=20, validation=20, test=20, twin_pairs=5)


def key(scene):
    return tuple(sorted(dataclasses.astuple(thing) for thing in scene.described()))


def test_splits_share_no_scene_and_held_out_scenes_are_all_different():
    world = scenes(CONFIG)
    assert [len(world[s]) for s in ("train", "validation", "test")] == [60, 20, 20]
    held_out = [key(scene) for split in ("validation", "test") for scene in world[split]]
    assert len(set(held_out)) == len(held_out)
    assert not {key(scene) for scene in world["train"]} & set(held_out)
    names = [scene.video_id for split in world.values() for scene in split]
    assert len(set(names)) == len(names)


def test_the_world_is_a_function_of_its_config():
    assert scenes(CONFIG) == scenes(CONFIG)
    assert scenes(CONFIG) != scenes(dataclasses.replace(CONFIG, seed=1))


def test_twins_have_the_same_frames_in_reverse_order_and_other_captions():
    world = scenes(CONFIG)["test"]
    for a, b in zip(world[:10:2], world[1:10:2], strict=True):
        first, second = (render(scene, np.linspace(0, 1, 3), CONFIG) for scene in (a, b))
        np.testing.assert_array_equal(first[::-1], second)
        assert not np.array_equal(first, second)
        assert key(a) != key(b)
        assert motion_kind(a) in ("direction", "order", "size", "colour", "several")


@pytest.mark.parametrize(
    "motion,back",
    [
        (("left",), ("right",)),
        (("left", "up"), ("down", "right")),
        (("grow",), ("shrink",)),
        (("still", "on the left"), ("still", "on the left")),
    ],
)
def test_playing_backwards(motion, back):
    assert Thing("red", "circle", motion).reversed().motion == back


def test_playing_a_change_of_colour_backwards():
    assert Thing("red", "circle", ("turn", "blue")).reversed() == Thing("blue", "circle", ("turn", "red"))


def test_an_object_moves_where_its_caption_says():
    config = dataclasses.replace(CONFIG, noise=0.0, size=64)
    for word, axis, sign in (("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)):
        scene = Scene("v", (Thing("yellow", "square", (word,)),), seed=3)
        frames = render(scene, [0.0, 1.0], config).astype(int)[..., :2].min(-1)  # red and green make yellow
        first, last = (np.argwhere(frame > 190)[:, axis].mean() for frame in frames)
        assert sign * (last - first) > 10


def test_full_captions_name_everything_and_partial_ones_less():
    thing = Thing("red", "circle", ("left",))
    full = describe(thing, random.Random(0))
    for word in ("red", "circle", "left"):
        assert any(said in full for said in SYNONYMS[word])
    lengths = [len(describe(thing, random.Random(i), partial=True).split()) for i in range(50)]
    assert min(lengths) < len(full.split())
    scene = scenes(CONFIG)["train"][0]
    assert captions(scene, 4, True) == captions(scene, 4, True)
    assert describe(Thing("blue", "circle", ("still", "at the top")), random.Random(1)).split()[0] in (
        "a",
        "an",
    )


def test_the_tree_reads_back_as_msrvtt(tmp_path):
    write_msrvtt(tmp_path, CONFIG, workers=1)
    splits = msrvtt.read(tmp_path, train="7k").splits
    assert [len(splits[s]) for s in ("train", "validation", "test")] == [20, 20, 20]
    assert all(len(clip.captions) == CONFIG.captions for clip in splits["train"])
    assert all(len(clip.captions) == 1 for clip in splits["test"])
    frames = read_frames(splits["test"][0].path, VideoOptions(size=32))
    assert len(frames.frames) == CONFIG.seconds + 1
    stamp = (tmp_path / "world.json").stat().st_mtime_ns
    write_msrvtt(tmp_path, CONFIG)
    assert (tmp_path / "world.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="world of other settings"):
        write_msrvtt(tmp_path, dataclasses.replace(CONFIG, seed=1))


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """The same few clips in every format."""
    config = WorldConfig(train=4, train_small=2, validation=2, test=3, twin_pairs=1, captions=2)
    folder = tmp_path_factory.mktemp("worlds")
    return config, {name: WRITERS[name](folder / name, config, 1) for name in CLIPS}


@pytest.mark.parametrize("name", CLIPS)
def test_every_format_has_the_same_clips(trees, name):
    config, folders = trees
    plain = msrvtt.read(folders["msrvtt"])
    options = {"num_validation": 0} if "num_validation" in reader_options(name) else {}
    found = FORMATS[name](folders[name], **options)
    assert found.problems == () and found.notes == ()
    assert list(found.splits) == ["train", "validation", "test"]
    for split, clips in found.splits.items():
        for clip, same in zip(clips, plain.splits[split], strict=True):
            assert clip.path.read_bytes() == same.path.read_bytes()
            # What MSR-VTT says of the clip is among what is said here, or begins the paragraph.
            assert " ".join(clip.captions).startswith(same.captions[0])
    pairs = json.loads((folders[name] / "motion_pairs.json").read_text())
    assert [pair[:2] for pair in pairs] == [[clip.video_id for clip in found.splits["test"][:2]]]
    assert found.fingerprint == FORMATS[name](folders[name], **options).fingerprint


def test_a_world_is_of_one_format(trees):
    config, folders = trees
    assert WRITERS["msvd"](folders["msvd"], config) == folders["msvd"]  # at once
    for name in CLIPS:
        if name != "msvd":
            with pytest.raises(ValueError, match="world of other settings"):
                WRITERS[name](folders["msvd"], config)
