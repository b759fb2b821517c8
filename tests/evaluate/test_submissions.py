"""Submission files: what is written is what was meant, and what a leaderboard would refuse is refused."""

import csv
import json

import numpy as np
import pytest

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.evaluate.submissions import (
    Prediction,
    VcrSubmission,
    read_predictions,
    read_vcr,
    read_vqa,
    write_predictions,
    write_vcr,
    write_vqa,
)

IDS = ("test-10", "test-2", "test-0")


def submission(**changes):
    rng = np.random.default_rng(0)
    made = VcrSubmission(
        IDS, rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(3, 4, 4)).astype(np.float32)
    )
    return made._replace(**changes)


def test_the_vcr_csv_has_the_leaderboard_s_columns_and_order(tmp_path):
    path, made = tmp_path / "out" / "vcr.csv", submission()
    write_vcr(path, made, set(IDS))
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert len(header) == 21
    assert header[:6] == [
        "annot_id",
        "answer_0",
        "answer_1",
        "answer_2",
        "answer_3",
        "rationale_conditioned_on_a0_0",
    ]
    assert header[-1] == "rationale_conditioned_on_a3_3" and header[9] == "rationale_conditioned_on_a1_0"
    assert [row[0] for row in rows] == ["test-0", "test-2", "test-10"]
    first = np.array(rows[0][1:], np.float32)
    np.testing.assert_array_equal(first[:4], made.answers[2])
    np.testing.assert_array_equal(first[4 + 4 * 1 + 2], made.rationales[2, 1, 2])
    assert list(path.parent.iterdir()) == [path]


def test_a_vcr_csv_is_read_as_it_was_written(tmp_path):
    path, made = tmp_path / "vcr.csv", submission()
    write_vcr(path, made, IDS)
    found = read_vcr(path, IDS)
    assert found.ids == ("test-0", "test-2", "test-10")
    np.testing.assert_array_equal(found.answers.astype(np.float32), made.answers[[2, 1, 0]])
    np.testing.assert_array_equal(found.rationales.astype(np.float32), made.rationales[[2, 1, 0]])


@pytest.mark.parametrize(
    "changes,expected,message",
    [
        ({}, (*IDS, "test-3"), r"misses test-3 \(1 in all; the split has 4\)"),
        ({}, IDS[:2], "has ids that are not of the split: test-0"),
        ({"ids": ("test-10", "test-2", "test-2")}, IDS, "'test-2' occurs twice"),
        ({"ids": ("test-10", "test-2", "test")}, IDS, "'test' is not of the form 'test-17'"),
        ({"ids": IDS[:2]}, IDS[:2], "not as many ids as rows"),
        (
            {"answers": np.array([[0, 0, 0, 0], [0, np.nan, 0, 0], [0, 0, 0, 0]])},
            IDS,
            "of test-2 is not finite",
        ),
        ({"rationales": np.full((3, 4, 4), np.inf)}, IDS, r"of test-10 is not finite \(3 questions\)"),
    ],
)
def test_a_vcr_submission_that_would_be_refused_is_not_written(tmp_path, changes, expected, message):
    with pytest.raises(ValueError, match=message):
        write_vcr(tmp_path / "vcr.csv", submission(**changes), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda text: text.replace("answer_0,answer_1", "answer_1,answer_0"), "line 1: expected exactly"),
        (lambda text: text.replace(",", ";"), "line 1: expected exactly"),
        (lambda text: text.replace("test-2,", "test-2,x", 1), "line 3: 'answer_0' is no number"),
        (lambda text: text.replace("test-2", "test-0"), "'test-0' occurs twice"),
        (lambda text: "\n".join(text.split("\n")[:3]), "misses test-10"),
        (lambda text: text[:-20].rpartition(",")[0], "line 4"),
    ],
)
def test_a_damaged_vcr_csv_is_refused(tmp_path, change, message):
    path = tmp_path / "vcr.csv"
    write_vcr(path, submission(), IDS)
    path.write_text(change(path.read_text()))
    with pytest.raises(FormatError, match=message):
        read_vcr(path, IDS)


def test_the_vqa_json_is_a_list_of_all_questions(tmp_path):
    path, answers = tmp_path / "vqa.json", {30: "zwölf", 4: "no", 21: ""}
    write_vqa(path, answers, [4, 21, 30])
    assert json.loads(path.read_text("utf-8")) == [
        {"question_id": 4, "answer": "no"},
        {"question_id": 21, "answer": ""},
        {"question_id": 30, "answer": "zwölf"},
    ]
    assert read_vqa(path, [30, 21, 4]) == answers


@pytest.mark.parametrize(
    "answers,message",
    [
        ({1: "a"}, "misses 2"),
        ({1: "a", 2: "b", 3: "c"}, "not of the split: 3"),
        ({1: "a", 2: 7}, "the answer to question 2 is no text: 7"),
    ],
)
def test_vqa_answers_that_would_be_refused_are_not_written(tmp_path, answers, message):
    with pytest.raises(ValueError, match=message):
        write_vqa(tmp_path / "vqa.json", answers, [1, 2])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data,message",
    [
        ({"1": "a"}, "expected a list of answers, found dict"),
        (
            [{"question_id": 1, "answer": "a"}, {"question_id": "2", "answer": "b"}],
            "item 1: .*'question_id'.* int",
        ),
        ([{"question_id": True, "answer": "a"}], "item 0: the field 'question_id' should be a number"),
        ([{"question_id": 1, "answer": None}], "item 0: the field 'answer' should be a str"),
        ([{"question_id": 1, "answer": "a"}] * 2, "the id 1 occurs twice"),
        ([{"question_id": 1, "answer": "a"}], "misses 2"),
    ],
)
def test_a_damaged_vqa_json_is_refused(tmp_path, data, message):
    path = tmp_path / "vqa.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        read_vqa(path, [1, 2])


def test_predictions_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "predictions.json"
    made = [
        Prediction("val-0", 2, 1, 0.0, "temporal", (0.25, -1.0, 3.5, 0.0)),
        Prediction("17", "grün", "green", 0.3),
        Prediction("18", "no"),
    ]
    about = {"task": "vcr", "split": "validation", "step": 100}
    write_predictions(path, made, about)
    assert read_predictions(path) == (about, made)
    assert len(path.read_text().splitlines()) == 6  # an example a line


def test_predictions_that_say_nothing_sure_are_refused(tmp_path):
    path = tmp_path / "predictions.json"
    with pytest.raises(ValueError, match="'a' occurs twice"):
        write_predictions(path, [Prediction("a", 0), Prediction("a", 1)], {})
    with pytest.raises(ValueError, match="cannot be written"):
        write_predictions(path, [Prediction("a", 0, scores=(float("nan"),))], {})
    with pytest.raises(ValueError, match="cannot be written"):
        write_predictions(path, [], {"path": path})
    assert not path.exists()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text.replace('"outcome"', '"right"'), r"predictions\[0\]: expected the fields"),
        (lambda text: text.replace('"about"', '"head"'), "'about' is missing"),
        (lambda text: text.replace("[]", "0"), "'scores' should be a list"),
    ],
)
def test_damaged_predictions_are_refused(tmp_path, change, message):
    path = tmp_path / "predictions.json"
    write_predictions(path, [Prediction("a", 0)], {"task": "vcr"})
    path.write_text(change(path.read_text()))
    with pytest.raises(FormatError, match=message):
        read_predictions(path)
