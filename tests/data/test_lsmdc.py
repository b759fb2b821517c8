"""The LSMDC reader: lines between tabs, movies in folders."""

from pathlib import Path

import pytest

from clipdistill_jax.data.formats.lsmdc import read
from clipdistill_jax.data.shapes.world import captions
from tests.data.damage import append, refused
from tests.data.small_world import check, touch

TRAIN, VAL, TEST = (
    "LSMDC16_annos_training.csv",
    "LSMDC16_annos_val.csv",
    "LSMDC16_challenge_1000_publictect.csv",
)


def clip(movie: str, second: int) -> str:
    return f"{movie}_00.00.{second:02d}.000-00.00.{second + 2:02d}.500"


A, B, C, D = (clip(m, s) for m, s in (("0001_One", 1), ("0001_One", 5), ("1006_Two", 1), ("3009_THREE", 7)))


def line(clip_id: str, sentence: str) -> str:
    return (
        "\t".join((clip_id, "00.00.01.000", "00.00.03.000", "00.00.01.000", "00.00.03.000", sentence)) + "\n"
    )


@pytest.fixture
def root(tmp_path) -> Path:
    said = 'SOMEONE says "go, now;'  # a quote that never closes
    (tmp_path / TRAIN).write_text(line(A, said) + line(B, "B once.") + line(A, "A again.\t"))
    (tmp_path / VAL).write_text(line(C, "C\u2028on two lines."), encoding="utf-8")
    (tmp_path / TEST).write_bytes(line(D, "D.").replace("\n", "\r\n").encode())
    touch(tmp_path / "videos", f"0001_One/{A}.avi", f"0001_One/{B}.avi", f"1006_Two/{C}.mp4", f"{D}.avi")
    return tmp_path


def test_splits_of_a_good_tree(root):
    found = read(root)
    assert {split: [(c.video_id, c.captions) for c in clips] for split, clips in found.splits.items()} == {
        "train": [(A, ('SOMEONE says "go, now;', "A again.")), (B, ("B once.",))],
        "validation": [(C, ("C on two lines.",))],
        "test": [(D, ("D.",))],
    }
    assert found.splits["train"][1].path == root / "videos" / "0001_One" / f"{B}.avi"
    assert found.splits["train"][0].record == f"{TRAIN}, line 1"
    assert found.listed == {"train": 2, "validation": 1, "test": 1} and found.problems == ()


def test_what_is_left_out(root):
    other = clip("0001_One", 9)
    append(root / TRAIN, line(B, "  ") + line(other, "") + line(clip("0001_One", 11), "gone"))
    touch(root / "videos", f"0001_One/{other}.avi")
    assert [(p.kind, p.split, p.file, p.record) for p in read(root).problems] == [
        ("empty_caption", "train", TRAIN, f"line 4, clip id {B!r}"),
        ("empty_caption", "train", TRAIN, f"line 5, clip id {other!r}"),
        ("no_caption", "train", TRAIN, f"line 5, video_id {other!r}"),
        ("missing_video", "train", TRAIN, f"line 6, video_id {clip('0001_One', 11)!r}"),
    ]
    assert len(read(root).splits["train"]) == 2


STRUCTURE = {
    "too few fields": (
        lambda r: append(r / VAL, "0001_One_x\t1\t2\tone man walks\n"),
        [f"{VAL}, line 2", "4 fields between tabs, expected 6", "clip id", "one man"],
    ),
    "too many fields": (lambda r: append(r / TRAIN, line(B, "a\tman")), [f"{TRAIN}, line 4", "7 fields"]),
    "separated by commas": (
        lambda r: (r / TEST).write_text("a,1,2,3,4,b\n"),
        [f"{TEST}, line 1", "1 fields between tabs"],
    ),
    "id that leads up": (
        lambda r: append(r / TRAIN, line("../x", "y")),
        [f"{TRAIN}, line 4", "'../x'", "refused"],
    ),
    "id that is empty": (lambda r: append(r / TRAIN, line("", "y")), [f"{TRAIN}, line 4", "the id is empty"]),
    "train and test share a clip": (
        lambda r: append(r / TRAIN, line(D, "y")),
        [f"{TRAIN}, line 4", "also a test clip", f"{TEST}, line 1"],
    ),
    "not text": (lambda r: (r / VAL).write_bytes(b"a\xff"), [f"{VAL}, line 1", "not UTF-8"]),
    "empty": (lambda r: (r / VAL).write_text(""), [VAL, "the list is empty"]),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_errors_stop(root, name):
    damage, parts = STRUCTURE[name]
    damage(root)
    with refused(*parts):
        read(root)


@pytest.mark.parametrize("name", [TRAIN, VAL, TEST])
def test_missing_files(root, name):
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read(root)


def test_missing_videos(root):
    (root / "videos").rename(root / "films")
    with pytest.raises(FileNotFoundError, match="no videos.*in one of videos, LSMDC_Videos"):
        read(root)


def test_from_the_worlds_files_to_batches(tmp_path):
    pytest.importorskip("tensorflow", reason="the pipeline runs on tf.data")

    def said(scene, split):
        return captions(scene, 3 if split == "train" else 1, split == "train")

    def clip_id(name):  # two seconds each, one after the other
        second = 2 * int(name.removeprefix("video"))
        return f"1001_Moving_Shapes_00.00.{second:02d}.000-00.00.{second + 2:02d}.000"

    check("lsmdc", tmp_path, said, clip_id)
    assert [path.name for path in (tmp_path / "world" / "videos").iterdir()] == ["1001_Moving_Shapes"]
