"""The VCR reader: records, boxes, names for object tags, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.formats.vcr import (
    NEUTRAL_NAMES,
    VcrRecord,
    neutral_names,
    read,
    read_boxes,
    render,
    uniter_names,
)
from tests.data.damage import refused

OBJECTS = ["person", "person", "car"]


def question(split: str, k: int, **changes) -> dict:
    """The k-th question of a split; two questions share an image."""
    record = {
        "annot_id": f"{split}-{k}",
        "movie": "m",
        "objects": OBJECTS,
        "img_fn": f"lsmdc_m/{split}@{k // 2}.jpg",
        "metadata_fn": f"lsmdc_m/{split}@{k // 2}.json",
        "question": ["Why", "is", [0], "near", [1, 2], "?"],
        "answer_choices": [[[1], "waits", str(i), "."] for i in range(4)],
        "answer_label": k % 4,
        "rationale_choices": [[[0, 1], "hurry", str(i)] for i in range(4)],
        "rationale_label": (k + 1) % 4,
    }
    if split == "test":
        del record["answer_label"], record["rationale_label"]
    return record | changes


def metadata(**changes) -> dict:
    boxes = [[0, 0, 10, 20, 0.9], [5.5, 4, 30, 40, 0.8], [1, 2, 64, 48, 1.0]]
    return {"names": OBJECTS, "boxes": boxes, "segms": [[], [], []], "width": 64, "height": 48} | changes


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def tree(tmp_path) -> Path:
    images = tmp_path / "vcr1images" / "lsmdc_m"
    images.mkdir(parents=True)
    for split in ("train", "val", "test"):
        records = [question(split, k) for k in range(4)]
        write_lines(tmp_path / f"{split}.jsonl", records)
        for k in range(2):
            (images / f"{split}@{k}.jpg").write_bytes(b"jpeg")
            (images / f"{split}@{k}.json").write_text(json.dumps(metadata()))
    return tmp_path


def test_records(tree):
    found = read(tree)
    assert {s: len(r) for s, r in found.splits.items()} == {"train": 4, "validation": 4, "test": 4}
    assert found.listed == {"train": 4, "validation": 4, "test": 4} and found.problems == ()
    record = found.splits["train"][3]
    assert record == VcrRecord(
        example_id="train-3",
        image=tree / "vcr1images/lsmdc_m/train@1.jpg",
        metadata=tree / "vcr1images/lsmdc_m/train@1.json",
        objects=("person", "person", "car"),
        question=("Why", "is", (0,), "near", (1, 2), "?"),
        answers=tuple(((1,), "waits", str(i), ".") for i in range(4)),
        rationales=tuple(((0, 1), "hurry", str(i)) for i in range(4)),
        answer_label=3,
        rationale_label=0,
        record="train.jsonl, line 4",
    )
    assert found.splits["validation"][0].example_id == "val-0"
    assert found.splits["test"][0].answer_label is None and found.splits["test"][0].rationale_label is None


def test_some_splits_and_missing_files(tree):
    (tree / "test.jsonl").unlink()
    assert set(read(tree, splits=("validation",)).splits) == {"validation"}
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl is missing"):
        read(tree)
    with pytest.raises(ValueError, match="splits has .'val'."):
        read(tree, splits=("val",))


def test_boxes(tree):
    boxes, size = read_boxes(read(tree).splits["train"][0])
    np.testing.assert_array_equal(boxes, [[0, 0, 10, 20], [5.5, 4, 30, 40], [1, 2, 64, 48]])
    assert size == (64.0, 48.0)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"names": ["person", "car", "person"]}, ["'names'", "'objects'"]),
        ({"boxes": [[0, 0, 1, 1, 1]]}, ["'boxes'", "3 rows"]),
        ({"boxes": [[0, 0, 1, 1]] * 3}, ["'boxes'", "3 rows"]),
        ({"boxes": [[0, 0, 1, "a", 1]] * 3}, ["'boxes'", "numbers", "row 0"]),
        ({"boxes": [["0", "0", "1", "1", 1]] * 3}, ["'boxes'", "numbers", "row 0"]),
        ({"boxes": [[0, 0, 1, 1, 1], [[1], [2], [3], [4], [5]], [0] * 5]}, ["'boxes'", "numbers", "row 1"]),
        ({"boxes": [[0, 0, 1, 10**400, 1]] * 3}, ["'boxes'", "numbers", "row 0"]),
        ({"boxes": [[0, 0, 1, 1, True]] * 3}, ["'boxes'", "numbers", "row 0"]),
        ({"boxes": [[0, 0, 1, 1, 1], [0, 0, 48, 64, 1], [0, 0, 1, 1, 1]]}, ["box 1", "64 x 48", "swapped"]),
        ({"boxes": [[0, 0, 1, 1, 1], [9, 0, 8, 1, 1], [0, 0, 1, 1, 1]]}, ["box 1", "x1 <= x2"]),
        ({"boxes": [[0, 0, float("nan"), 1, 1]] * 3}, ["box 0", "x1 <= x2"]),
        ({"width": 0}, ["0.0 x 48.0"]),
        ({"width": 10**400}, ["'width'", "should be a number from 0"]),
        ({"width": None}, ["'width'", "should be a int"]),
    ],
)
def test_damaged_metadata(tree, changes, parts):
    path = tree / "vcr1images/lsmdc_m/train@0.json"
    path.write_text(json.dumps(metadata(**changes)))
    with refused(str(path), "train.jsonl, line 1", *parts):
        read_boxes(read(tree).splits["train"][0])


THREE = [["a"], ["b"], ["c"]]
DAMAGE = {
    "three answers": ({"answer_choices": THREE}, ["'answer_choices' has 3 choices, expected 4"]),
    "five rationales": ({"rationale_choices": [["a"]] * 5}, ["'rationale_choices' has 5 choices"]),
    "tag out of range": (
        {"question": ["Why", [0, 3]]},
        ["'question', item 1", "tag 3 is out of range", "3 objects"],
    ),
    "negative tag": ({"question": [[-1]]}, ["tag -1 is out of range"]),
    "true as a tag": ({"question": [[True]]}, ["tag True is out of range"]),
    "tag in an answer": (
        {"answer_choices": [*THREE, ["d", [9]]]},
        ["'answer_choices[3]', item 1", "tag 9"],
    ),
    "empty tag": ({"question": ["Why", []]}, ["item 1", "neither a word nor a list"]),
    "number as a word": ({"question": ["Why", 3]}, ["item 1", "neither a word nor a list", "3"]),
    "empty question": ({"question": ["", " "]}, ["'question' is empty"]),
    "answer as text": ({"answer_choices": [*THREE, "d"]}, ["'answer_choices[3]'", "list of words", "str"]),
    "unknown label": ({"answer_label": 4}, ["'answer_label'", "unknown label 4", "0 to 3"]),
    "label as text": ({"rationale_label": "1"}, ["'rationale_label'", "should be a int"]),
    "no label": ({"rationale_label": None}, ["'rationale_label'", "should be a int", "NoneType"]),
    "no objects": ({"objects": []}, ["'objects'", "one class name a box"]),
    "path that leads up": ({"img_fn": "lsmdc_m/../../x.jpg"}, ["'img_fn'", "refused"]),
    "absolute path": ({"metadata_fn": "/etc/passwd"}, ["'metadata_fn'", "refused"]),
}


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"question": ["A", "man \ud83d smiles"]}, "question[1]"),
        ({"answer_choices": [*THREE, ["d", "\udc00"]]}, "answer_choices[3][1]"),
        ({"annot_id": "train-\ud83d"}, "annot_id"),
        ({"objects": ["person", "\udfff", "car"]}, "objects[1]"),
    ],
)
def test_half_a_character(tree, changes, place):
    """JSON can say it, no file of ours could: not written, not divided into words, not hashed."""
    records = [question("train", k, question=["A", "\U0001f600"]) for k in range(2)]
    write_lines(tree / "train.jsonl", records)
    assert read(tree).splits["train"][0].question == ("A", "\U0001f600")  # two halves of a whole
    write_lines(tree / "train.jsonl", [records[0], records[1] | changes])
    with refused("train.jsonl, line 2", f"the field {place!r} has half a character"):
        read(tree)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_records(tree, name):
    changes, parts = DAMAGE[name]
    records = [question("train", k) for k in range(4)]
    records[2] |= changes
    write_lines(tree / "train.jsonl", records)
    with refused("train.jsonl, line 3, annot_id 'train-2'", *parts):
        read(tree)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"annot_id": "train-0"}\n', ["line 1", "'objects' is missing"]),
        ("[1]\n", ["line 1", "expected an object, found list"]),
        ('{"annot_id": \n{}\n', ["line 1", "not valid JSON"]),
        ('{}\n{"annot_id": "tr', ["line 1", "'annot_id' is missing"]),
        ("\n\n", ["'train' has no record"]),
    ],
)
def test_damaged_lines(tree, text, parts):
    (tree / "train.jsonl").write_text(text)
    with refused(*parts):
        read(tree)


def test_file_cut_short_and_not_text(tree):
    path = tree / "train.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(FormatError, match=r"train\.jsonl, line 4, column .*cut short"):
        read(tree)
    path.write_bytes(whole + b"\xff\n")
    with pytest.raises(FormatError, match=r"train\.jsonl, line 5: not UTF-8"):
        read(tree)


def test_duplicated_ids(tree):
    write_lines(tree / "train.jsonl", [question("train", k) for k in (0, 1, 0)])
    with pytest.raises(FormatError, match=r"train\.jsonl, line 3: the annot_id 'train-0'.*jsonl, line 1"):
        read(tree)
    write_lines(tree / "train.jsonl", [question("train", 0), question("train", 1, annot_id="val-2")])
    with pytest.raises(FormatError, match=r"val\.jsonl, line 3: the annot_id 'val-2'.*train\.jsonl, line 2"):
        read(tree)


@pytest.mark.parametrize(("suffix", "field"), [("jpg", "img_fn"), ("json", "metadata_fn")])
def test_missing_images(tree, suffix, field):
    (tree / f"vcr1images/lsmdc_m/train@1.{suffix}").unlink()
    with pytest.raises(FormatError, match=rf"line 3, id 'train-2', field '{field}'.*2 of 12 records"):
        read(tree)
    found = read(tree, allow_missing=True)
    assert [r.example_id for r in found.splits["train"]] == ["train-0", "train-1"]
    assert found.listed["train"] == 4 and found.left_out["train"] == ("train-2", "train-3")
    assert [(p.kind, p.split, p.file) for p in found.problems] == [
        ("missing_image", "train", "train.jsonl")
    ] * 2
    (tree / f"vcr1images/lsmdc_m/train@0.{suffix}").unlink()
    with pytest.raises(FormatError, match="'train' has no record with its files"):
        read(tree, allow_missing=True)


def test_fingerprint_follows_the_files(tree):
    before = read(tree).fingerprint
    assert read(tree).fingerprint == before
    image = tree / "vcr1images/lsmdc_m/train@0.jpg"
    image.write_bytes(b"jpeg, longer")
    assert read(tree).fingerprint != before
    image.write_bytes(b"jpeg")
    assert read(tree).fingerprint == before
    with (tree / "val.jsonl").open("a") as file:
        file.write("\n")
    assert read(tree).fingerprint != before


def a_record(objects, text, example_id="train-7") -> VcrRecord:
    return VcrRecord(
        example_id, Path("i"), Path("m"), tuple(objects), text, (("a",),) * 4, (("r",),) * 4, 0, 0, ""
    )


def test_both_renderings_come_from_one_record():
    text = ("Why", "is", (0,), "near", (2, 1), "?")
    record = a_record(["person", "car", "person"], text)
    rendered = render(text, uniter_names(record.objects))
    assert rendered.words == ("Why", "is", "person_0", "near", "person_2", "car", "?")
    assert rendered.objects == (-1, -1, 0, -1, 2, 1, -1)
    names = neutral_names(record)
    rendered = render(text, names, joiner="and")
    assert rendered.words == ("Why", "is", names[0], "near", names[2], "and", "car", "?")
    assert rendered.objects == (-1, -1, 0, -1, 2, -1, 1, -1)
    assert names[0] in NEUTRAL_NAMES and names[2] in NEUTRAL_NAMES and names[0] != names[2]
    assert render(text, record.objects).words == ("Why", "is", "person", "near", "person", "car", "?")


def test_uniter_has_81_persons():
    names = uniter_names(["person"] * 80 + ["dog"] + ["person"] * 2)
    assert names[79:] == ("person_79", "dog", "person", "person")
    assert uniter_names(["person"] * 82)[80:] == ("person_80", "person")


def test_neutral_names_do_not_depend_on_order(tree):
    forward = {r.example_id: neutral_names(r) for r in read(tree).splits["train"]}
    write_lines(tree / "train.jsonl", [question("train", k) for k in (2, 0, 3)])
    backward = {r.example_id: neutral_names(r) for r in read(tree).splits["train"]}
    assert len(backward) == 3
    assert all(forward[i] == names for i, names in backward.items())


def test_neutral_names_spread_over_all_names():
    starts = {neutral_names(a_record(["person"], ("x",), f"train-{k}"))[0] for k in range(300)}
    assert starts == set(NEUTRAL_NAMES)


tags = st.lists(st.integers(0, 29), min_size=1, max_size=3).map(tuple)
texts = st.lists(st.one_of(st.text("abc", min_size=1), tags), min_size=1, max_size=6).map(tuple)


@settings(max_examples=50, deadline=None)
@given(texts, st.lists(st.sampled_from(["person", "car"]), min_size=30, max_size=30), st.integers(0, 999))
def test_rendering_properties(text, objects, k):
    record = a_record(objects, text, f"val-{k}")
    mentioned = {i for item in text if not isinstance(item, str) for i in item}
    names = neutral_names(record)
    persons = sorted(i for i in mentioned if objects[i] == "person")
    first = {names[i] for i in persons[: len(NEUTRAL_NAMES)]}
    assert len(first) == min(len(persons), len(NEUTRAL_NAMES))  # different people, different names
    assert all(names[i] == "car" for i in range(30) if objects[i] == "car")
    assert neutral_names(dataclasses.replace(record, record="elsewhere")) == names
    for table, joiner in ((names, "and"), (uniter_names(objects), ""), (tuple(objects), "")):
        rendered = render(text, table, joiner=joiner)
        assert [table[i] for i in rendered.objects if i >= 0] == [
            w for w, i in zip(*rendered, strict=True) if i >= 0
        ]
        assert {i for i in rendered.objects if i >= 0} == mentioned
        plain = [w for w, i in zip(*rendered, strict=True) if i < 0 and w != "and"]
        assert plain == [w for w in text if isinstance(w, str)]
