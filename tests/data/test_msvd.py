"""The MSVD reader: several captions a clip, and a pickle that is not trusted."""

import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.formats.msvd import _PlainUnpickler, read, read_plain_pickle
from clipdistill_jax.data.shapes.world import captions
from clipdistill_jax.evaluate.retrieval import retrieval_metrics
from tests.data.damage import append, refused
from tests.data.small_world import WORLD, check, evaluation_split, touch

SAID = {f"v_{k}": [["a", "man", f"{k}"], ["he", "runs"]] for k in range(6)}


@pytest.fixture
def root(tmp_path) -> Path:
    """v_0 to v_2 train, v_3 validation, v_4 and v_5 test; some videos in a folder of their own."""
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(SAID))
    for name, ids in (("train", (0, 1, 2)), ("val", (3,)), ("test", (4, 5))):
        (tmp_path / f"{name}_list.txt").write_text("".join(f"v_{k}\n" for k in ids))
    touch(tmp_path / "videos", *(f"v_{k}.avi" for k in range(5)), "more/v_5.mp4", "v_1.mp4")
    return tmp_path


def write(root: Path, data: object) -> None:
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(data))


def test_splits_of_a_good_tree(root):
    found = read(root)
    assert {split: [c.video_id for c in clips] for split, clips in found.splits.items()} == {
        "train": ["v_0", "v_1", "v_2"],
        "validation": ["v_3"],
        "test": ["v_4", "v_5"],
    }
    assert found.problems == () and found.notes == ()
    assert found.splits["test"][1].captions == ("a man 5", "he runs")
    assert [c.path.name for c in found.splits["train"]] == ["v_0.avi", "v_1.mp4", "v_2.avi"]
    assert found.splits["test"][1].path == root / "videos" / "more" / "v_5.mp4"
    assert found.splits["test"][1].record == "test_list.txt, line 2"


def test_what_is_left_out(root):
    (root / "videos" / "v_4.avi").unlink()
    data = {**SAID, "v_0": [["a"], [], ["  "]], "v_1": [[]], "v_5": [["word"] * 80]}
    del data["v_2"]
    write(root, data)
    found = read(root)
    assert [(p.kind, p.split, p.file, p.record) for p in found.problems] == [
        ("empty_caption", "", "raw-captions.pkl", "'v_0', caption 1"),
        ("empty_caption", "", "raw-captions.pkl", "'v_0', caption 2"),
        ("empty_caption", "", "raw-captions.pkl", "'v_1', caption 0"),
        ("no_caption", "train", "train_list.txt", "line 2, video_id 'v_1'"),
        ("no_caption", "train", "train_list.txt", "line 3, video_id 'v_2'"),
        ("missing_video", "test", "test_list.txt", "line 1, video_id 'v_4'"),
        ("long_caption", "test", "test_list.txt", "line 2, video_id 'v_5'"),
    ]
    assert [c.captions for c in found.splits["train"]] == [("a",)]
    assert found.listed == {"train": 3, "validation": 1, "test": 2}


def test_a_video_that_is_there_twice_is_noted(root):
    touch(root / "videos", "z/v_0.avi")
    found = read(root)
    assert found.splits["train"][0].path == root / "videos" / "v_0.avi"
    assert "1 videos are there more than once" in found.notes[0] and "z/v_0.avi" in found.notes[0]


STRUCTURE = {
    "id that leads up": (
        lambda r: append(r / "val_list.txt", "../v_9\n"),
        ["val_list.txt, line 2", "refused"],
    ),
    "id twice": (lambda r: append(r / "val_list.txt", "\nv_3\n"), ["line 3", "'v_3'", "already in"]),
    "train and validation share a clip": (
        lambda r: append(r / "train_list.txt", "v_3\n"),
        ["train_list.txt, line 4", "also a validation clip", "val_list.txt, line 1"],
    ),
    "train and test share a clip": (
        lambda r: append(r / "train_list.txt", "v_4\n"),
        ["train_list.txt, line 4", "also a test clip", "test_list.txt, line 1"],
    ),
    "empty list": (lambda r: (r / "val_list.txt").write_text("\n"), ["val_list.txt", "the list is empty"]),
    "list that is not text": (
        lambda r: (r / "val_list.txt").write_bytes(b"v_3\n\xff\n"),
        ["val_list.txt, line 2", "not UTF-8"],
    ),
    "captions are a list": (lambda r: write(r, [1]), ["raw-captions.pkl", "dictionary", "list"]),
    "captions of a clip are a word": (
        lambda r: write(r, {"v_0": "man"}),
        ["'v_0'", "list of captions", "str"],
    ),
    "a word is a number": (
        lambda r: write(r, {"v_0": [["a", 7]]}),
        ["'v_0', caption 0", "expected text", "int"],
    ),
    "cut short": (
        lambda r: (r / "raw-captions.pkl").write_bytes(pickle.dumps(SAID)[:-30]),
        ["raw-captions.pkl", "not a whole pickle", "cut short"],
    ),
    "empty": (
        lambda r: (r / "raw-captions.pkl").write_bytes(b""),
        ["raw-captions.pkl", "not a whole pickle"],
    ),
    "no pickle": (lambda r: (r / "raw-captions.pkl").write_text("{}"), ["raw-captions.pkl", "not a whole"]),
    "an append to nothing": (lambda r: (r / "raw-captions.pkl").write_bytes(b"Na."), ["not a whole pickle"]),
    "a list as a key": (lambda r: (r / "raw-captions.pkl").write_bytes(b"}]Ns."), ["unhashable"]),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure_errors_stop(root, name):
    damage, parts = STRUCTURE[name]
    damage(root)
    with refused(*parts):
        read(root)


@pytest.mark.parametrize("name", ["train_list.txt", "val_list.txt", "test_list.txt", "raw-captions.pkl"])
def test_missing_files(root, name):
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read(root)


class Attack:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.mark),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol):
    path, mark = tmp_path / "x.pkl", tmp_path / "mark"
    for data in ({"v": [Attack(mark)]}, collections.OrderedDict(a=[["b"]]), {"v": np.float64(1)}):
        path.write_bytes(pickle.dumps(data, protocol))
        with pytest.raises(FormatError, match="x.pkl, byte .*refused: it builds objects"):
            read_plain_pickle(path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(Attack(mark), protocol))
    pickle.loads(path.read_bytes())  # the attack is a real one
    assert mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # by name
        b"(S'true'\nios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # the extension registry
        b"Pid\n.",  # a persistent id
        b"\x80\x04]}b.",  # BUILD, which sets attributes
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # room for two thousand million values
    ],
)
def test_other_programs_are_refused(tmp_path, program):
    (tmp_path / "x.pkl").write_bytes(program)
    with pytest.raises(FormatError, match="refused"):
        read_plain_pickle(tmp_path / "x.pkl")


def test_the_second_lock_holds_without_the_first(tmp_path):
    for program in (b"cos\nsystem\n.", b"Pid\n."):
        (tmp_path / "x.pkl").write_bytes(program)
        with (tmp_path / "x.pkl").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="asks for"):
            _PlainUnpickler(file).load()


@pytest.mark.parametrize(
    ("program", "captions"),
    [
        # Protocol 2, whose strings are bytes: in UTF-8, else in Latin-1.
        (b"\x80\x02}U\x02v1]](U\x01aU\x02\xc3\xa9ea](U\x04caf\xe9eas.", ("a é", "café")),
        (
            b"(dp0\nS'v1'\np1\n(lp2\n(lp3\nS'a'\np4\naS'man'\np5\naa(lp6\nVcaf\\u00e9\np7\naas.",
            ("a man", "café"),
        ),
    ],
)
def test_strings_of_python_2(root, program, captions):
    (root / "raw-captions.pkl").write_bytes(program)
    (root / "train_list.txt").write_text("v1\n")
    touch(root / "videos", "v1.avi")
    assert read(root).splits["train"][0].captions == captions


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_back(tmp_path_factory, value, protocol):
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(path) == value


def test_every_test_caption_is_a_query(tmp_path):
    """From the world's files to the evaluator's split and its metrics."""
    pytest.importorskip("tensorflow", reason="the pipeline runs on tf.data")
    dataset = check("msvd", tmp_path, lambda scene, split: captions(scene, 3, split == "train"))
    split = evaluation_split(dataset)
    np.testing.assert_array_equal(split.clip_of_text, np.repeat(np.arange(4), 3))
    rows = [batch["clip_id"][batch["mask"]] for batch in split.texts()]
    own = np.concatenate(rows)
    scores = (own[:, None] == np.arange(4)).astype(np.float32)  # of a model that knows the clip of each text
    metrics = retrieval_metrics(scores, split.clip_of_text)
    assert metrics["t2v_R@1"] == metrics["v2t_R@1"] == 100
    # One of twelve queries fails; its clip is still found by the best of its three captions.
    scores[4] = [0, 0, 0, 0.5]
    metrics = retrieval_metrics(scores, split.clip_of_text)
    assert metrics["t2v_R@1"] == pytest.approx(100 * 11 / 12) and metrics["v2t_R@1"] == 100
    assert WORLD.captions == 3
