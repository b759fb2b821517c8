"""The VQA v2 reader, the normal form of answers, their scores, and answer vocabularies."""

import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.formats.listing import make_listing
from clipdistill_jax.data.formats.vqa import read, read_questions
from clipdistill_jax.data.vocabulary import (
    AnswerVocabulary,
    build_vocabulary,
    normalize_answer,
    official_score,
    read_vocabulary,
    training_score,
)
from tests.data.damage import edit, refused

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


def questions(numbers: list[int]) -> dict:
    return {
        "data_subtype": "x",
        "questions": [{"image_id": n // 10, "question": f"What is  {n}?", "question_id": n} for n in numbers],
    }


def annotations(numbers: list[int]) -> dict:
    notes = []
    for n in numbers:
        answers = [
            {"answer": "yes" if k < 7 else "No.", "answer_confidence": "yes", "answer_id": k + 1}
            for k in range(10)
        ]
        notes.append(
            {
                "question_id": n,
                "image_id": n // 10,
                "question_type": "what is",
                "answer_type": "yes/no",
                "multiple_choice_answer": "yes",
                "answers": answers,
            }
        )
    return {"annotations": notes}


SUBSETS = {"train2014": [100, 101, 110], "val2014": [200], "test2015": [300, 301]}


@pytest.fixture
def tree(tmp_path) -> Path:
    for subset, numbers in SUBSETS.items():
        (tmp_path / subset).mkdir()
        (tmp_path / QUESTIONS.format(subset)).write_text(json.dumps(questions(numbers)))
        if not subset.startswith("test"):
            (tmp_path / ANNOTATIONS.format(subset)).write_text(json.dumps(annotations(numbers)))
        for n in numbers:
            (tmp_path / subset / f"COCO_{subset}_{n // 10:012}.jpg").write_bytes(b"jpeg")
    return tmp_path


def test_records(tree):
    found = read(tree)
    assert {s: len(r) for s, r in found.splits.items()} == {"train": 3, "validation": 1, "test": 2}
    record = found.splits["train"][2]
    assert (record.example_id, record.image_id, record.question) == ("110", 11, "What is 110?")
    assert record.image == tree / "train2014/COCO_train2014_000000000011.jpg"
    assert record.answers == ("yes",) * 7 + ("No.",) * 3
    assert (record.top_answer, record.answer_type) == ("yes", "yes/no")
    assert record.record == "v2_OpenEnded_mscoco_train2014_questions.json, questions[2]"
    test = found.splits["test"][0]
    assert test.answers == () and test.top_answer is None


def test_test_dev_has_the_images_of_test(tree):
    (tree / QUESTIONS.format("test-dev2015")).write_text(json.dumps(questions([301])))
    (record,) = read(tree, subsets={"test": "test-dev2015"}).splits["test"]
    assert record.image == tree / "test2015/COCO_test2015_000000000030.jpg"
    with pytest.raises(ValueError, match="subsets has .'test2014'."):
        read(tree, subsets={"test": "test2014"})


Q, A = QUESTIONS.format("train2014"), ANNOTATIONS.format("train2014")
DAMAGE = {
    "nine answers": (
        A,
        lambda d: d["annotations"][1]["answers"].pop(),
        ["annotations[1], question_id 101", "'answers' has 9 answers, expected 10"],
    ),
    "answer as a number": (
        A,
        lambda d: d["annotations"][1]["answers"][3].update(answer=2),
        ["annotations[1], question_id 101, answers[3]", "'answer' should be a str"],
    ),
    "annotation twice": (
        A,
        lambda d: d["annotations"].append(d["annotations"][0]),
        ["annotations[3], question_id 100", "the question_id was already in", "annotations[0]"],
    ),
    "no annotation": (
        A,
        lambda d: d["annotations"].pop(1),
        ["questions[1], question_id 101", A, "has no annotation"],
    ),
    "no question": (Q, lambda d: d["questions"].pop(1), ["annotations[1], question_id 101", Q]),
    "question twice": (
        Q,
        lambda d: d["questions"].append(d["questions"][0]),
        ["questions[3]", "the question_id '100'", "questions[0]"],
    ),
    "another image": (
        A,
        lambda d: d["annotations"][2].update(image_id=99),
        ["annotations[2], question_id 110", "'image_id' is 99, the question's is 11"],
    ),
    "id as text": (
        Q,
        lambda d: d["questions"][0].update(question_id="100"),
        ["questions[0]", "should be a int"],
    ),
    "negative image": (Q, lambda d: d["questions"][0].update(image_id=-1), ["'image_id'", "from 0", "-1"]),
    "empty question": (
        Q,
        lambda d: d["questions"][0].update(question=" "),
        ["questions[0], question_id 100", "'question' is empty"],
    ),
    "half a character": (
        Q,
        lambda d: d["questions"][1].update(question="A man \ud83d smiles"),
        [Q, "'questions[1].question' has half a character"],
    ),
    "half a character in an answer": (
        A,
        lambda d: d["annotations"][0]["answers"][3].update(answer="\udc80"),
        [A, "'annotations[0].answers[3].answer' has half a character"],
    ),
    "no list": (Q, lambda d: d.pop("questions"), ["top level", "'questions' is missing"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(tree, name):
    file, change, parts = DAMAGE[name]
    edit(tree / file, change)
    with refused(*parts):
        read(tree)


def test_missing_files_and_images(tree):
    (tree / "train2014/COCO_train2014_000000000011.jpg").unlink()
    with pytest.raises(FormatError, match=r"questions\[2\], id '110', field 'image_id'.*1 of 6"):
        read(tree)
    assert len(read(tree, allow_missing=True).splits["train"]) == 2
    (tree / A).unlink()
    with pytest.raises(FileNotFoundError, match=A):
        read(tree)


def test_real_questions(shared_data):
    folder = shared_data / "vqa_v2_mini"
    paths = [folder / "questions.json", folder / "annotations.json"]
    records = list(read_questions(*paths, folder, "COCO_train2014"))
    found = make_listing({"train": records}, paths, allow_missing=False).splits["train"]
    assert [r.example_id for r in found] == ["458752000", "458752001", "458752002"]
    assert found[1].question == "What position is this man playing?"
    assert found[1].answers.count("pitcher") == 9
    vocabulary = read_vocabulary(shared_data / "vocab/vqa_trainval_label2ans.json")
    scores = vocabulary.targets(found[0].answers)  # net 6 times; netting, mesh, pitcher, orange once each
    assert scores[vocabulary.index["net"]] == 1.0
    assert scores[vocabulary.index["orange"]] == np.float32(0.3)
    assert {a: s for a, s in zip(vocabulary.answers, scores, strict=True) if s} == {
        a: np.float32(official_score(a, found[0].answers))
        for a in ("net", "netting", "mesh", "pitcher", "orange")
        if a in vocabulary.index
    }
    with pytest.raises(FormatError, match="no 'multiple_choice_answer'"):
        build_vocabulary(found)


# Worked by hand from the published rules; the last ones are corners of the official program.
NORMAL = {
    "Yes": "yes",
    "The man's hat.": "man's hat",
    "a  dog": "dog",
    "an\tapple\n": "apple",
    "Ten": "10",
    "none": "0",
    "two dogs and a cat": "2 dogs and cat",
    "dont know": "don't know",
    "couldntve": "couldntve",  # two apostrophes missing: not in the table
    "couldn'tve": "couldn't've",
    "2:50 pm": "2:50 pm",
    "2.50": "2.50",
    "u.s.": "us",
    "ab-cd": "ab cd",  # no space beside the sign: it becomes one
    "ab - cd": "ab cd",
    "yes!": "yes",
    "red, white": "red white",
    "red,white": "red white",
    "100,978": "100978",
    "100,978-a": "100978a",  # a comma between digits: every sign goes without a space
    "at&t": "at&t",
    "it's": "it's",
    "its": "its",
    "Im": "im",  # the table has "Im", which no lower-cased word is
    "somebody'd": "somebodyd",
    "": "",
    "the": "",
    "." * 40: "." * 8,  # 32 periods at most are taken out
}


@pytest.mark.parametrize("text", NORMAL)
def test_normal_form(text):
    assert normalize_answer(text) == NORMAL[text]


def test_the_published_vocabulary_is_in_normal_form(shared_data):
    """3129 answers, which another program of the same rules made: none may change."""
    vocabulary = read_vocabulary(shared_data / "vocab/vqa_trainval_label2ans.json")
    assert [a for a in vocabulary.answers if normalize_answer(a) != a] == []


def slow_official(answer: str, given: list[str]) -> Fraction:
    """10 choose 9, written out."""
    sets = list(itertools.combinations(given, len(given) - 1))
    return sum((min(Fraction(1), Fraction(s.count(answer), 3)) for s in sets), Fraction(0)) / len(sets)


@pytest.mark.parametrize("count", range(11))
def test_scores_of_ten_people(count):
    given = ["cat"] * count + ["dog"] * (10 - count)
    assert official_score("cat", given) == pytest.approx(float(slow_official("cat", given)), abs=1e-12)
    assert training_score(count) == pytest.approx(float(slow_official("cat", given)), abs=1e-12)
    assert training_score(count) == [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1][count]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["cat", "dog", "red bird"]), min_size=2, max_size=12))
def test_official_score_of_any_number_of_people(given):
    assert official_score("cat", given) == pytest.approx(float(slow_official("cat", given)), abs=1e-12)


def test_official_score_normalises_unless_all_agree():
    assert official_score("The cats.", ["cats"] * 4 + ["a dog"] * 6) == 1.0
    assert official_score("two", ["2"] * 9 + ["3"]) == 1.0
    assert official_score("two", ["2"] * 10) == 0.0  # official: compared as written where all wrote the same
    assert official_score(" 2\n", ["2"] * 10) == 1.0
    with pytest.raises(ValueError, match="nothing"):
        official_score("x", [])


def test_targets():
    vocabulary = AnswerVocabulary(("no", "<unk>", "2", "yes"))
    given = ["Yes", "yes.", "two", "2", "no"] + ["maybe", "<unk>"] + ["nobody"] * 3
    np.testing.assert_array_equal(vocabulary.targets(given), np.array([0.3, 0, 0.6, 0.6], np.float32))
    np.testing.assert_array_equal(vocabulary.targets(["two"]), np.array([0, 0, 1, 0], np.float32))
    np.testing.assert_array_equal(vocabulary.targets([]), np.zeros(4, np.float32))


@pytest.mark.parametrize(
    "given", [["two"] * 10, ["2"] * 10, ["The cat"] * 9 + ["2"], ["dog"] * 4 + ["2"] * 6]
)
def test_official_scores_of_all_classes(given):
    vocabulary = AnswerVocabulary(("two", "2", "cat", "the cat", "dog"))
    expected = np.float32([official_score(answer, given) for answer in vocabulary.answers])
    np.testing.assert_array_equal(vocabulary.official(given), expected)
    assert expected.any()


def test_fingerprint_binds_the_order():
    vocabulary, other = AnswerVocabulary(("a", "b")), AnswerVocabulary(("b", "a"))
    assert vocabulary.fingerprint != other.fingerprint
    vocabulary.check(vocabulary.fingerprint, "checkpoint")
    with pytest.raises(ValueError, match="checkpoint was trained with another answer vocabulary.*2 answers"):
        vocabulary.check(other.fingerprint, "checkpoint")


def test_vocabulary_files(tmp_path):
    vocabulary = AnswerVocabulary(("", "café", "2"))
    vocabulary.save(tmp_path / "list.json")
    (tmp_path / "map.json").write_text('{"2": 2, "": 0, "café": 1}', encoding="utf-8")
    for name in ("list.json", "map.json"):
        found = read_vocabulary(tmp_path / name)
        assert found == vocabulary and found.fingerprint == vocabulary.fingerprint
    (tmp_path / "answers.txt").write_text("<unk>\nYES\n\nno \n")
    assert read_vocabulary(tmp_path / "answers.txt").answers == ("<unk>", "yes", "no")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('["a", "b", "a"]', "answer 2: the answer 'a' was already in"),
        ('{"a": 2, "b": 1, "a": 0}', "'a' occurs twice"),
        ('{"a": 0, "b": 2}', "should be 0, 1, 2"),
        ('{"a": 0, "b": true}', "should be 0, 1, 2"),
        ('["a", 3]', "expected a list of answers"),
        ("[]", "no answers"),
        ('["a', "cut short"),
    ],
)
def test_damaged_vocabularies(tmp_path, text, part):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(FormatError, match=r"v\.json") as caught:
        read_vocabulary(tmp_path / "v.json")
    assert part in str(caught.value)


def test_real_vocabularies_agree(shared_data):
    by_list = read_vocabulary(shared_data / "vocab/vqa_trainval_label2ans.json")
    by_map = read_vocabulary(shared_data / "vocab/vqa_trainval_ans2label.json")
    assert by_list == by_map and len(by_list) == 3129 and "" in by_list.index


def test_built_vocabulary(tree):
    tops = ["yes"] * 3 + ["No."] * 3 + ["two"] * 4 + ["2"] + ["rare"]
    numbers = list(range(400, 400 + len(tops)))

    def change(data):
        data["annotations"] = annotations(numbers)["annotations"]
        for note, top in zip(data["annotations"], tops, strict=True):
            note["multiple_choice_answer"] = top

    edit(tree / Q, lambda d: d.update(questions(numbers)))
    edit(tree / A, change)
    records = list(read_questions(tree / Q, tree / A, tree, "x"))
    vocabulary = build_vocabulary(records, min_count=3)
    assert vocabulary.answers == ("2", "no", "yes")  # 5, then 3 each by the alphabet
    random.Random(0).shuffle(records)
    assert build_vocabulary(records, min_count=3) == vocabulary
    with pytest.raises(ValueError, match="top answer of 9 questions"):
        build_vocabulary(records)
