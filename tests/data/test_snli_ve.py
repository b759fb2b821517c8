"""The SNLI-VE reader: spellings, labels, real samples, and what it refuses."""

import json
from collections import Counter
from pathlib import Path

import pytest

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.formats.listing import make_listing
from clipdistill_jax.data.formats.snli_ve import LABELS, read, read_pairs
from tests.data.damage import refused

SPELLINGS = {"train": "Flikr30kID", "dev": "Flickr30K_ID", "test": "Flickr30kID"}


def pair(split: str, k: int, **changes) -> dict:
    """The k-th pair of a split; each split spells the image field its own way, the first with .jpg."""
    image = f"{k // 3}{'.jpg' if split == 'train' else ''}"
    return {
        SPELLINGS[split]: image,
        "pairID": f"{split}{k // 3}.jpg#0r{k}",
        "gold_label": LABELS[k % 3],
        "sentence1": "a premise that is not read",
        "sentence2": f"A  hypothesis {k}.",
        "annotator_labels": [],
        "captionID": "c",
    } | changes


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def tree(tmp_path) -> Path:
    (tmp_path / "flickr30k_images").mkdir()
    for k in range(2):
        (tmp_path / f"flickr30k_images/{k}.jpg").write_bytes(b"jpeg")
    for split in SPELLINGS:
        write_lines(tmp_path / f"snli_ve_{split}.jsonl", [pair(split, k) for k in range(6)])
    return tmp_path


def test_records_in_all_three_spellings(tree):
    found = read(tree)
    assert {s: len(r) for s, r in found.splits.items()} == {"train": 6, "validation": 6, "test": 6}
    for split, records in found.splits.items():
        assert [r.image_id for r in records] == ["0"] * 3 + ["1"] * 3
        assert [r.image for r in records] == [tree / f"flickr30k_images/{i // 3}.jpg" for i in range(6)]
        assert [r.label for r in records] == [0, 1, 2, 0, 1, 2]
        assert records[4].hypothesis == "A hypothesis 4."
        spelling = SPELLINGS["dev" if split == "validation" else split]
        assert {r.image_field for r in records} == {spelling}
    assert found.splits["train"][4].example_id == "train1.jpg#0r4"
    assert found.splits["train"][4].record == "snli_ve_train.jsonl, line 5"
    assert LABELS == ("contradiction", "entailment", "neutral")  # UNITER's numbers, 0 to 2


def test_other_folder_of_images(tree):
    (tree / "flickr30k_images").rename(tree / "flickr30k-images")
    assert read(tree).splits["train"][0].image.parent.name == "flickr30k-images"
    (tree / "flickr30k-images").rename(tree / "photos")
    with pytest.raises(FileNotFoundError, match="flickr30k_images or flickr30k-images"):
        read(tree)


DAMAGE = {
    "unknown label": ({"gold_label": "-"}, ["'gold_label'", "unknown label '-'", "contradiction"]),
    "label as a number": ({"gold_label": 1}, ["'gold_label'", "should be a str"]),
    "empty hypothesis": ({"sentence2": " \n"}, ["'sentence2' is empty"]),
    "image id as a number": ({"Flikr30kID": 7}, ["'Flikr30kID'", "should be a str"]),
    "spellings that differ": ({"Flickr30K_ID": "1"}, ["different images", "Flikr30kID", "Flickr30K_ID"]),
    "path": ({"Flikr30kID": "../secret.jpg"}, ["'Flikr30kID'", "refused"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_records(tree, name):
    changes, parts = DAMAGE[name]
    records = [pair("train", k) for k in range(3)]
    records[1] |= changes
    write_lines(tree / "snli_ve_train.jsonl", records)
    with refused("snli_ve_train.jsonl, line 2, pairID 'train0.jpg#0r1'", *parts):
        read(tree)


def test_no_image_field(tree):
    record = pair("train", 0)
    record["image"] = record.pop("Flikr30kID")
    write_lines(tree / "snli_ve_train.jsonl", [record])
    with pytest.raises(FormatError, match="Flikr30kID, Flickr30K_ID, Flickr30kID; it has.*'image'"):
        read(tree)


def test_agreeing_spellings_are_one(tree):
    write_lines(tree / "snli_ve_train.jsonl", [pair("train", 0, Flickr30K_ID="0")])
    assert read(tree).splits["train"][0].image_id == "0"


def test_duplicates_and_missing_images(tree):
    write_lines(tree / "snli_ve_train.jsonl", [pair("train", 0), pair("train", 1), pair("train", 0)])
    with pytest.raises(FormatError, match=r"train\.jsonl, line 3: the pairID .*line 1"):
        read(tree)
    write_lines(tree / "snli_ve_train.jsonl", [pair("train", k) for k in range(6)])
    (tree / "flickr30k_images/1.jpg").unlink()
    with pytest.raises(FormatError, match=r"line 4, id 'train1.jpg#0r3', field 'Flikr30kID'.*9 of 18"):
        read(tree)
    found = read(tree, allow_missing=True)
    assert {s: len(r) for s, r in found.splits.items()} == {"train": 3, "validation": 3, "test": 3}
    assert len(found.problems) == 9


def test_real_pairs(shared_data):
    folder = shared_data / "snli_ve_mini"
    path = folder / "sample_pairs.jsonl"
    records = make_listing({"train": read_pairs(path, folder)}, [path], allow_missing=False).splits["train"]
    assert len(records) == 16 and {r.image_field for r in records} == {"Flickr30K_ID"}
    assert (
        records[0].hypothesis == "A toddler sleeps outside." and LABELS[records[0].label] == "contradiction"
    )
    assert records[-1].image == folder / "402978771.jpg"
    assert Counter(LABELS[r.label] for r in records) == {"neutral": 6, "entailment": 6, "contradiction": 4}
