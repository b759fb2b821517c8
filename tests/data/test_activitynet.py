"""The ActivityNet Captions reader: paragraphs in time order, ids with a prefix, our own validation list."""

import json
from pathlib import Path

import pytest

from clipdistill_jax.data.formats.activitynet import read
from clipdistill_jax.data.shapes.world import captions
from tests.data.damage import edit, refused
from tests.data.small_world import check, touch


def annotation(*said: tuple[float, str]) -> dict:
    return {
        "duration": 82.73,
        "timestamps": [[start, start + 5] for start, _ in said],
        "sentences": [sentence for _, sentence in said],
    }


@pytest.fixture
def root(tmp_path) -> Path:
    """v_a to v_f train, v_x and v_y test; the files of two have the prefix in their name."""
    train = {f"v_{k}": annotation((0, f" {k} begins."), (3.5, f"{k} ends.")) for k in "abcdef"}
    train["v_b"] = annotation((60, "third."), (0.5, "first\n"), (20, "second."), (20, "second too."))
    test = {f"v_{k}": annotation((0, f"{k}.")) for k in "xyz"}
    for name, value in {
        "train.json": train,
        "val_1.json": test,
        "train_ids.json": list(train),
        "val_ids.json": ["v_x", "v_y"],
    }.items():
        (tmp_path / name).write_text(json.dumps(value))
    touch(
        tmp_path / "Activity_Videos", *(f"{k}.mp4" for k in "abcx"), "d.mkv", "e.webm", "v_f.mp4", "v_y.mp4"
    )
    return tmp_path


def test_splits_of_a_good_tree(root):
    found = read(root, num_validation=0)
    assert {split: [c.video_id for c in clips] for split, clips in found.splits.items()} == {
        "train": [f"v_{k}" for k in "abcdef"],
        "test": ["v_x", "v_y"],
    }
    train = found.splits["train"]
    assert train[0].captions == ("a begins. a ends.",)
    assert train[1].captions == ("first second. second too. third.",)  # by start; alike ones as in the file
    assert [c.path.name for c in train] == ["a.mp4", "b.mp4", "c.mp4", "d.mkv", "e.webm", "v_f.mp4"]
    assert train[2].record == "train_ids.json, [2]" and train[2].seconds is None
    assert found.problems == () and found.notes == ()


def test_held_out_validation(root):
    found = read(root, num_validation=2)
    held = [c.video_id for c in found.splits["validation"]]
    assert len(held) == 2 and len(found.splits["train"]) == 4
    assert not set(held) & {c.video_id for c in found.splits["train"]}
    assert "2 clips of train_ids.json held out" in found.notes[0]
    with pytest.raises(ValueError, match="num_validation=500 of the 6 clips.*write validation_ids.json"):
        read(root)


def test_validation_list(root):
    (root / "validation_ids.json").write_text(json.dumps(["v_b", "v_d"]))
    found = read(root)  # num_validation is of no matter
    assert [c.video_id for c in found.splits["validation"]] == ["v_b", "v_d"]
    assert [c.video_id for c in found.splits["train"]] == ["v_a", "v_c", "v_e", "v_f"]
    assert found.notes == ("2 clips of validation_ids.json were taken out of the train split",)


def test_what_is_left_out(root):
    (root / "Activity_Videos" / "x.mp4").unlink()
    edit(root / "train.json", lambda d: d["v_a"]["sentences"].__setitem__(1, " "))
    edit(root / "train.json", lambda d: d["v_c"].update(sentences=[], timestamps=[]))
    edit(root / "train.json", lambda d: d.pop("v_d"))
    edit(root / "train.json", lambda d: d["v_e"]["sentences"].__setitem__(0, "word " * 90))
    assert [(p.kind, p.split, p.file, p.record) for p in read(root, num_validation=0).problems] == [
        ("empty_caption", "", "train.json", "'v_a', sentences[1]"),
        ("no_caption", "train", "train_ids.json", "[2], video_id 'v_c'"),
        ("no_caption", "train", "train_ids.json", "[3], video_id 'v_d'"),
        ("long_caption", "train", "train_ids.json", "[4], video_id 'v_e'"),
        ("missing_video", "test", "val_ids.json", "[0], video_id 'v_x'"),
    ]


def of_a(**fields):
    return lambda r: edit(r / "train.json", lambda d: d["v_a"].update(**fields))


STRUCTURE = {
    "id that leads up": (
        lambda r: edit(r / "train_ids.json", lambda d: d.append("v_../x")),
        ["train_ids.json, [6]", "'v_../x'", "refused"],
    ),
    "id twice": (
        lambda r: edit(r / "val_ids.json", lambda d: d.append("v_x")),
        ["val_ids.json, [2]", "already in", "[0]"],
    ),
    "id is a number": (
        lambda r: edit(r / "val_ids.json", lambda d: d.append(3)),
        ["val_ids.json, [2]", "expected an id", "int"],
    ),
    "train and test share a clip": (
        lambda r: edit(r / "train_ids.json", lambda d: d.append("v_y")),
        ["train_ids.json, [6]", "also a test clip", "val_ids.json, [1]"],
    ),
    "ids are an object": (lambda r: (r / "val_ids.json").write_text("{}"), ["val_ids.json", "list of ids"]),
    "no ids": (lambda r: (r / "val_ids.json").write_text("[]"), ["val_ids.json", "list of ids"]),
    "annotations are a list": (lambda r: (r / "val_1.json").write_text("[]"), ["val_1.json", "object by id"]),
    "json cut short": (lambda r: (r / "val_1.json").write_text('{"v_x": {"sen'), ["val_1.json", "cut short"]),
    "no sentences": (
        lambda r: edit(r / "train.json", lambda d: d["v_a"].pop("sentences")),
        ["train.json, 'v_a'", "'sentences' is missing"],
    ),
    "fewer times": (of_a(timestamps=[[0, 1]]), ["train.json, 'v_a'", "2 sentences but 1 timestamps"]),
    "a time is text": (of_a(timestamps=[[0, 1], "0-5"]), ["'v_a', timestamps[1]", "[start, end]", "0-5"]),
    "a time is one number": (of_a(timestamps=[[0, 1], [3]]), ["'v_a', timestamps[1]", "[start, end]"]),
    "a sentence is a number": (of_a(sentences=["x", 4]), ["'v_a', sentences[1]", "expected text", "int"]),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_errors_stop(root, name):
    damage, parts = STRUCTURE[name]
    damage(root)
    with refused(*parts):
        read(root, num_validation=0)


@pytest.mark.parametrize("name", ["train_ids.json", "train.json", "val_ids.json", "val_1.json"])
def test_missing_files(root, name):
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read(root, num_validation=0)


def test_from_the_worlds_files_to_batches(tmp_path):
    pytest.importorskip("tensorflow", reason="the pipeline runs on tf.data")

    def paragraph(scene, split):
        return [" ".join(captions(scene, 2, split == "train"))]

    check("activitynet", tmp_path, paragraph, "v_{}".format)
