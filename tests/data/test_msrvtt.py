"""The MSR-VTT reader: what it gives, what stops it, what it notes and goes on."""

import shutil
from pathlib import Path

import pytest

from clipdistill_jax.data.formats.msrvtt import read
from tests.data.damage import append, edit, refused
from tests.data.msrvtt_tree import captions_of, write_list, write_tree

TRAIN, VAL, TEST, DATA = (
    "MSRVTT_train.9k.csv",
    "MSRVTT_val.csv",
    "MSRVTT_JSFUSION_test.csv",
    "MSRVTT_data.json",
)


@pytest.fixture
def copy(tree, tmp_path) -> Path:
    """A copy of the tree that the test may damage."""
    return Path(shutil.copytree(tree, tmp_path / "copy"))


def edit_data(root: Path, change) -> None:
    edit(root / DATA, change)


def test_splits_of_a_good_tree(tree):
    found = read(tree)
    assert list(found.splits) == ["train", "validation", "test"]
    assert [[c.video_id for c in clips] for clips in found.splits.values()] == [
        [f"video{k}" for k in range(6)],
        ["video6", "video7"],
        ["video8", "video9", "video10"],
    ]
    assert found.listed == {"train": 6, "validation": 2, "test": 3}
    assert found.problems == () and found.notes == ()
    train, test = found.splits["train"], found.splits["test"]
    assert [c.captions for c in train] == [tuple(captions_of(k)) for k in range(6)]
    assert [c.captions for c in test] == [(captions_of(k)[1],) for k in (8, 9, 10)]
    assert [c.path.suffix for c in train[:3]] == [".mp4", ".webm", ".avi"]
    assert all(c.path.is_file() for clips in found.splits.values() for c in clips)
    assert train[4].record == f"{TRAIN}, line 6"


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_and_7k(tmp_path, tree, delimiter):
    root = write_tree(tmp_path / "tree", test=3, delimiter=delimiter, list_name="7k")
    expected = [(c.video_id, c.captions) for clips in read(tree).splits.values() for c in clips]
    found = read(root, train="7k")
    assert [(c.video_id, c.captions) for clips in found.splits.values() for c in clips] == expected
    with pytest.raises(FileNotFoundError, match=TRAIN):
        read(root, train="9k")
    with pytest.raises(ValueError, match="train must be one of"):
        read(root, train="8k")


def test_byte_order_mark_blank_lines_and_line_breaks_in_quotes(copy):
    write_list(
        copy / TEST, [["video8", "one\nsentence, on two lines"], ["video9", "x"]], ["video_id", "sentence"]
    )
    text = (copy / TEST).read_text().replace("\nvideo9", "\n\n\nvideo9")
    (copy / TEST).write_text("\ufeff" + text, encoding="utf-8")
    first, second = read(copy).splits["test"]
    assert first.captions == ("one sentence, on two lines",)
    assert second.record == f"{TEST}, line 6"


def test_file_suffixes_have_an_order(copy):
    shutil.copy(copy / "videos" / "video1.webm", copy / "videos" / "video1.avi")
    shutil.copy(copy / "videos" / "video2.avi", copy / "videos" / "video2.MP4")
    train = read(copy).splits["train"]
    assert train[1].path.name == "video1.webm" and train[2].path.name == "video2.MP4"


def test_videos_in_the_folder_of_the_archive(copy):
    (copy / "videos").rename(copy / "all")
    (copy / "videos").mkdir()
    (copy / "all").rename(copy / "videos" / "all")
    assert len(read(copy).splits["train"]) == 6


def test_held_out_validation(copy, tmp_path):
    (copy / VAL).unlink()
    found = read(copy, num_validation=2)
    held = {c.video_id: c.captions for c in found.splits["validation"]}
    assert len(held) == 2 and held.keys().isdisjoint(c.video_id for c in found.splits["train"])
    assert len(found.splits["train"]) == 4
    assert all(captions == (captions_of(int(i[5:]))[0],) for i, captions in held.items())
    assert "2 clips" in found.notes[0] and TRAIN in found.notes[0]
    # The same clips, whatever the order of the list, and a superset when more are held out.
    write_list(copy / TRAIN, [[f"video{k}"] for k in (5, 3, 1, 0, 2, 4)], ["video_id"])
    assert {c.video_id for c in read(copy, num_validation=2).splits["validation"]} == held.keys()
    assert held.keys() < {c.video_id for c in read(copy, num_validation=3).splits["validation"]}
    assert "validation" not in read(copy, num_validation=0).splits
    with pytest.raises(ValueError, match=f"num_validation=4 of the 6 clips.*{TRAIN}.*{VAL}"):
        read(copy, num_validation=4)


def test_validation_list_takes_clips_out_of_train(copy):
    append(copy / VAL, "ret,msr,video2,a held out clip\n")
    found = read(copy)
    assert "video2" not in [c.video_id for c in found.splits["train"]]
    assert found.splits["validation"][-1].captions == ("a held out clip",)
    assert found.notes == (f"1 clips of {VAL} were taken out of the train split",)


def drop_columns(root: Path) -> None:
    write_list(root / TEST, [["video8", "x"]], ["video", "sentence"])


def cut(root: Path) -> None:
    text = (root / DATA).read_text()
    (root / DATA).write_text(text[: len(text) * 2 // 3])


STRUCTURE = {
    "json cut short": (cut, [DATA, "line 1", "cut short"]),
    "json with a slip in the middle": (
        lambda r: (r / DATA).write_text((r / DATA).read_text().replace('"caption":', '"caption"', 1)),
        [DATA, "line 1, column", "not valid JSON"],
    ),
    "json is a list": (lambda r: (r / DATA).write_text("[1]"), [DATA, "top level", "'sentences'", "list"]),
    "no sentences": (lambda r: edit_data(r, lambda d: d.pop("sentences")), [DATA, "'sentences'", "missing"]),
    "sentence without caption": (
        lambda r: edit_data(r, lambda d: d["sentences"][7].pop("caption")),
        [DATA, "sentences[7]", "'caption'", "missing"],
    ),
    "caption is a number": (
        lambda r: edit_data(r, lambda d: d["sentences"][3].update(caption=7)),
        [DATA, "sentences[3]", "'caption'", "should be a str", "int"],
    ),
    "sentence is a string": (
        lambda r: edit_data(r, lambda d: d["sentences"].__setitem__(2, "a caption")),
        [DATA, "sentences[2]", "expected an object"],
    ),
    "video listed twice in the json": (
        lambda r: edit_data(r, lambda d: d["videos"].append({"video_id": "video3"})),
        [DATA, "videos[11]", "'video3'", "already in", "videos[3]"],
    ),
    "id with dots in the json": (
        lambda r: edit_data(r, lambda d: d["sentences"][5].update(video_id="../../etc/passwd")),
        [DATA, "sentences[5]", "'../../etc/passwd'", "refused"],
    ),
    "missing column": (drop_columns, [TEST, "line 1", "video_id, sentence", "video,sentence"]),
    "row with too many fields": (
        lambda r: append(r / TEST, "ret,msr,video0,a man, a plan\n"),
        [TEST, "line 5", "5 fields", "header has 4", "quote"],
    ),
    "row with too few fields": (
        lambda r: append(r / TEST, "ret,msr,video0\n"),
        [TEST, "line 5", "3 fields", "header has 4"],
    ),
    "quote left open": (lambda r: append(r / TEST, 'ret,msr,video0,"a man\n'), [TEST, "not a valid csv row"]),
    "empty list": (lambda r: (r / TRAIN).write_text("video_id\n"), [TRAIN, "the list is empty"]),
    "empty file": (lambda r: (r / TRAIN).write_text(""), [TRAIN, "line 1", "found: nothing"]),
    "not text": (
        lambda r: (r / TRAIN).write_bytes(b"video_id\nvideo0\n\xff\xfe\n"),
        [TRAIN, "line 3", "not UTF-8"],
    ),
    "row twice": (lambda r: append(r / TRAIN, "video2\n"), [TRAIN, "line 8", "'video2'", f"{TRAIN}, line 4"]),
    "id that leads up": (
        lambda r: append(r / TRAIN, "../videos/video2\n"),
        [TRAIN, "line 8", "'../videos/video2'", "refused"],
    ),
    "id with dots": (lambda r: append(r / TRAIN, "video..2\n"), [TRAIN, "line 8", "refused"]),
    "id with a separator": (lambda r: append(r / TRAIN, "/etc/passwd\n"), [TRAIN, "line 8", "refused"]),
    "id with a backslash": (lambda r: append(r / TRAIN, "a\\b\n"), [TRAIN, "line 8", "refused"]),
    "id that is empty": (
        lambda r: append(r / TEST, "ret,msr,,a man\n"),
        [TEST, "line 5", "the id is empty"],
    ),
    "test clip in the train list": (
        lambda r: append(r / TRAIN, "video9\n"),
        [TRAIN, "line 8", "'video9'", "also a test clip", f"{TEST}, line 3"],
    ),
    "test clip in the validation list": (
        lambda r: append(r / VAL, "ret,msr,video9,x\n"),
        [VAL, "line 4", "'video9'", "also a test clip"],
    ),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_errors_stop(copy, name):
    damage, parts = STRUCTURE[name]
    damage(copy)
    with refused(*parts):
        read(copy)


@pytest.mark.parametrize("name", [TRAIN, TEST, DATA])
def test_missing_files(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read(copy)


def test_missing_folders(copy):
    shutil.rmtree(copy / "videos")
    with pytest.raises(FileNotFoundError, match=r"no videos.*videos, videos/all, MSRVTT_Videos"):
        read(copy)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read(copy / "nowhere")


def problems(root: Path) -> list[tuple[str, str, str, str]]:
    return [(p.kind, p.split, p.file, p.record) for p in read(root).problems]


def test_row_without_a_video(copy):
    (copy / "videos" / "video4.webm").unlink()
    assert problems(copy) == [("missing_video", "train", TRAIN, "line 6, video_id 'video4'")]
    found = read(copy)
    assert "video4.mp4, video4.webm, video4.avi" in found.problems[0].reason
    assert len(found.splits["train"]) == 5 and found.listed["train"] == 6


def test_empty_captions_are_left_out(copy):
    def empty(data):
        data["sentences"][4]["caption"] = " \n "  # the second of video1
        for k in (6, 7, 8):
            data["sentences"][k]["caption"] = ""  # all of video2

    edit_data(copy, empty)
    append(copy / TEST, "ret,msr,video0,   \n")
    write_list(copy / TRAIN, [[f"video{k}"] for k in (1, 2, 3)], ["video_id"])
    assert problems(copy) == [
        ("empty_caption", "", DATA, "sentences[4], video_id 'video1'"),
        *[("empty_caption", "", DATA, f"sentences[{k}], video_id 'video2'") for k in (6, 7, 8)],
        ("no_caption", "train", TRAIN, "line 3, video_id 'video2'"),
        ("empty_caption", "test", TEST, "line 5, video_id 'video0'"),
    ]
    found = read(copy)
    assert found.splits["train"][0].captions == (captions_of(1)[0], captions_of(1)[2])
    assert [c.video_id for c in found.splits["train"]] == ["video1", "video3"]
    assert [c.video_id for c in found.splits["test"]] == ["video8", "video9", "video10"]


def test_long_captions_are_kept_and_noted(copy):
    edit_data(copy, lambda d: d["sentences"][1].update(caption="word " * 500))
    assert problems(copy) == [("long_caption", "train", TRAIN, "line 2, video_id 'video0'")]
    found = read(copy)
    assert "500 words" in found.problems[0].reason
    assert len(found.splits["train"][0].captions) == 3
    assert found.splits["train"][0].captions[1].count("word") == 500


def test_captions_that_are_no_unicode_are_left_out(copy):
    edit_data(copy, lambda d: d["sentences"][1].update(caption="half a pair \ud83d"))
    assert problems(copy) == [("bad_caption", "", DATA, "sentences[1], video_id 'video0'")]
    assert len(read(copy).splits["train"][0].captions) == 2


def test_fingerprint_follows_the_files(copy, tree):
    before = read(copy).fingerprint
    assert before == read(tree).fingerprint  # not the place
    video = copy / "videos" / "video0.mp4"
    size = len(video.read_bytes())
    video.write_bytes(video.read_bytes() + b"\0")
    assert read(copy).fingerprint != before
    video.write_bytes(video.read_bytes()[:size])
    assert read(copy).fingerprint == before
    append(copy / TEST, "\n")
    assert read(copy).fingerprint != before
