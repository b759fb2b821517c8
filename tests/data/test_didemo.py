"""The DiDeMo reader: ids that are file names, paragraphs of moments, the first half minute."""

import json
from pathlib import Path

import numpy as np
import pytest

from clipdistill_jax.data.formats.didemo import read
from clipdistill_jax.data.shapes.world import captions
from clipdistill_jax.data.video import VideoOptions
from clipdistill_jax.prepare import prepare_dataset
from tests.data.damage import append, edit, refused
from tests.data.msrvtt_tree import write_video
from tests.data.small_world import check, touch

TRAIN = "train_data.json"


def moment(name: str, text: str, **more) -> dict:
    return {"video": name, "description": text, "times": [[0, 0], [1, 2]], "annotation_id": 1, **more}


def write_lists(root: Path) -> Path:
    """Two train clips, one validation and one test clip; a moment of a clip that no list has."""
    lists = {"train": ["1@N02_5_a.mov", "2_b.3gp"], "val": ["3_c.MOV"], "test": ["4_d.mp4"]}
    for split, names in lists.items():
        moments = [moment(name, f"{text} of {name}") for text in ("first", "then\n") for name in names]
        (root / f"{split}_data.json").write_text(json.dumps([moment("9_z.avi", "nobody's"), *moments]))
        (root / f"{split}_list.txt").write_text("".join(f"{name}\n" for name in names))
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    touch(tmp_path / "videos", "1@N02_5_a.mov", "1@N02_5_a.mp4", "2_b.mp4", "x/3_c.MOV.mp4", "4_d.mp4")
    return write_lists(tmp_path)


def test_splits_of_a_good_tree(root):
    found = read(root)
    assert {split: [c.captions for c in clips] for split, clips in found.splits.items()} == {
        "train": [
            ("first of 1@N02_5_a.mov then of 1@N02_5_a.mov",),
            ("first of 2_b.3gp then of 2_b.3gp",),
        ],
        "validation": [("first of 3_c.MOV then of 3_c.MOV",)],
        "test": [("first of 4_d.mp4 then of 4_d.mp4",)],
    }
    clips = [clip for split in found.splits.values() for clip in split]
    # The named file, else another suffix in its place or after it.
    assert [c.path.name for c in clips] == ["1@N02_5_a.mov", "2_b.mp4", "3_c.MOV.mp4", "4_d.mp4"]
    assert [c.video_id for c in clips] == ["1@N02_5_a.mov", "2_b.3gp", "3_c.MOV", "4_d.mp4"]
    assert {c.seconds for c in clips} == {31} and found.problems == ()


def test_what_is_left_out(root):
    (root / "videos" / "4_d.mp4").unlink()
    edit(root / TRAIN, lambda data: data[1].update(description=" "))
    edit(root / TRAIN, lambda data: [m.update(description="") for m in data if m["video"] == "2_b.3gp"])
    assert [(p.kind, p.split, p.file, p.record) for p in read(root).problems] == [
        ("empty_caption", "train", "train_data.json", "[1], video '1@N02_5_a.mov'"),
        ("empty_caption", "train", "train_data.json", "[2], video '2_b.3gp'"),
        ("empty_caption", "train", "train_data.json", "[4], video '2_b.3gp'"),
        ("no_caption", "train", "train_list.txt", "line 2, video_id '2_b.3gp'"),
        ("missing_video", "test", "test_list.txt", "line 1, video_id '4_d.mp4'"),
    ]
    assert read(root).splits["train"][0].captions == ("then of 1@N02_5_a.mov",)


STRUCTURE = {
    "id that leads up": (
        lambda r: append(r / "train_list.txt", "../../x.mp4\n"),
        ["train_list.txt, line 3", "refused"],
    ),
    "id twice": (lambda r: append(r / "train_list.txt", "2_b.3gp\n"), ["line 3", "already in", "line 2"]),
    "train and test share a clip": (
        lambda r: append(r / "train_list.txt", "4_d.mp4\n"),
        ["train_list.txt, line 3", "also a test clip", "test_list.txt, line 1"],
    ),
    "json is an object": (
        lambda r: (r / "val_data.json").write_text("{}"),
        ["val_data.json", "list of moments"],
    ),
    "json cut short": (
        lambda r: (r / "val_data.json").write_text((r / "val_data.json").read_text()[:-20]),
        ["val_data.json, line 1", "cut short"],
    ),
    "no description": (
        lambda r: edit(r / TRAIN, lambda data: data[2].pop("description")),
        ["train_data.json, [2]", "'description' is missing"],
    ),
    "video is a number": (
        lambda r: edit(r / TRAIN, lambda data: data[3].update(video=5)),
        ["train_data.json, [3]", "'video' should be a str", "int"],
    ),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_errors_stop(root, name):
    damage, parts = STRUCTURE[name]
    damage(root)
    with refused(*parts):
        read(root)


@pytest.mark.parametrize("name", ["train_list.txt", "val_data.json"])
def test_missing_files(root, name):
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read(root)


def test_frames_after_the_first_half_minute_are_not_kept(tmp_path):
    """A clip of 45 s gives what one of 31 s gives; a shorter one is kept whole."""
    tfds = pytest.importorskip("tensorflow_datasets")
    root = write_lists(tmp_path)
    (root / "videos").mkdir()
    for name, seconds in (("1@N02_5_a.mov", 45), ("2_b.mp4", 4), ("3_c.mp4", 3), ("4_d.mp4", 3)):
        write_video(root / "videos" / name, seconds=seconds, fps=2, codec="libx264")
    options = {"workers": 1, "progress": False}
    for most, expected in ((64, np.arange(32)), (6, np.linspace(0, 31, 6).astype(int))):
        out = tmp_path / f"out{most}"
        prepare_dataset("didemo", root, out, video=VideoOptions(size=48, max_frames=most), **options)
        long, short = tfds.builder_from_directory(out / "clips" / "1.0.0").as_data_source("train")
        np.testing.assert_allclose(long["timestamps"], expected, atol=2e-3)
        np.testing.assert_allclose(short["timestamps"], np.arange(4), atol=2e-3)
        assert len(long["frames"]) == len(expected)


def test_from_the_worlds_files_to_batches(tmp_path):
    pytest.importorskip("tensorflow", reason="the pipeline runs on tf.data")

    def paragraph(scene, split):
        return [" ".join(captions(scene, 2, split == "train"))]

    check("didemo", tmp_path, paragraph, "{}.mp4".format)
