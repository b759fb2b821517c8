"""Files of predictions and submissions, from arrays as the evaluator leaves them."""

import json

import numpy as np
import pytest

from clipdistill_jax.evaluate.predictions import (
    check_submission,
    join_arrays,
    join_items,
    predictions,
    vcr_submission,
    write_files,
    write_submission,
)
from clipdistill_jax.evaluate.submissions import Prediction, read_predictions, read_vcr, read_vqa


def vcr(records=("val-3", "val-1"), givens=(0, 1, 2, 3)):
    """Items in an order of their own; the score of (record r, given g, choice c) is 100 r + 10 g + c."""
    rows = [(r, "qar", g) for g in givens for r in range(len(records))]
    rows += [(r, "qa", -1) for r in range(len(records))]
    items = {
        "example_ids": np.array([f"{records[r]}/{kind}{g if g >= 0 else ''}" for r, kind, g in rows]),
        "record_ids": np.array([records[r] for r, *_ in rows]),
        "kinds": np.array([kind for _, kind, _ in rows]),
        "given": np.array([g for *_, g in rows]),
        "categories": np.array(["role"] * len(rows)),
        "labels": np.array([2 if kind == "qa" else 1 if g == 2 else -1 for _, kind, g in rows]),
    }
    scores = np.array([[100 * r + 10 * g + c for c in range(4)] for r, _, g in rows], np.float32)
    judged = items["labels"] >= 0
    chosen = scores.argmax(-1).astype(np.int32)
    outcome = (judged & (chosen == items["labels"])).astype(np.float32)
    return {"scores": scores, "chosen": chosen, "outcome": outcome, "judged": judged}, items


def vqa():
    items = {
        "example_ids": np.array(["30", "4"]),
        "record_ids": np.array(["30", "4"]),
        "kinds": np.array(["vqa", "vqa"]),
        "categories": np.array(["other", "yes/no"]),
        "labels": np.array([2, -1]),
    }
    outcome, judged = np.array([0.3, 0], np.float32), np.array([True, False])
    return {"chosen": np.array([1, 2], np.int32), "outcome": outcome, "judged": judged}, items


NAMES = ("<unk>", "grün", "no")


def test_the_rationales_of_each_answer_lie_where_they_belong(tmp_path):
    arrays, items = vcr()
    submission = vcr_submission(arrays, items)
    assert submission.ids == ("val-3", "val-1")
    for r in range(2):
        np.testing.assert_array_equal(submission.answers[r], 100 * r - 10 + np.arange(4))
        expected = 100 * r + 10 * np.arange(4)[:, None] + np.arange(4)
        np.testing.assert_array_equal(submission.rationales[r], expected)
    said = write_submission(tmp_path / "vcr.csv", arrays, items, {"val-1", "val-3"})
    assert said.endswith("vcr.csv: the scores of 2 questions of VCR")
    found = read_vcr(tmp_path / "vcr.csv", {"val-1", "val-3"})
    assert found.ids == ("val-1", "val-3")
    np.testing.assert_array_equal(found.rationales, submission.rationales[::-1])


@pytest.mark.parametrize("givens, lacking", [((0, 1, 3), 2), ((), 0)])
def test_a_submission_needs_the_rationales_of_all_answers(tmp_path, givens, lacking):
    with pytest.raises(
        ValueError, match=f"val-3: there are no scores of its rationales given answer {lacking}"
    ):
        write_submission(tmp_path / "vcr.csv", *vcr(givens=givens), {"val-1", "val-3"})
    assert not list(tmp_path.iterdir())


def test_a_submission_has_all_questions_that_the_dataset_lists(tmp_path):
    for (arrays, items), listed, lost in ((vcr(), ("val-1", "val-2", "val-3"), "val-2"), (vqa(), "45", "5")):
        with pytest.raises(ValueError, match=rf"the prepared split misses {lost} \(1 in all"):
            write_submission(tmp_path / "x", arrays, items, {*items["record_ids"].tolist(), *listed}, NAMES)
    assert not list(tmp_path.iterdir())


def part(kind, records=("val-3", "val-1")):
    """What a model of the answers alone says, or one of the rationales."""
    arrays, items = vcr(records)
    return tuple({name: x[items["kinds"] == kind] for name, x in made.items()} for made in (arrays, items))


def test_a_model_of_the_answers_and_one_of_the_rationales_are_as_one():
    parts = [part("qa"), part("qar")]
    joined = [join_arrays([arrays for arrays, _ in parts]), join_items([items for _, items in parts])]
    for found, expected in zip(vcr_submission(*joined), vcr_submission(*vcr()), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="val-3: there are no scores of its answers"):
        check_submission(parts[1][1], {"val-1", "val-3"})
    with pytest.raises(ValueError, match="two stages answer questions of the kind qa"):
        join_items([parts[0][1], vcr()[1]])
    with pytest.raises(ValueError, match=r"other records: only one has val-1 \(2 in all\)"):
        join_items([parts[0][1], part("qar", ("val-3", "val-5"))[1]])


def test_predictions_of_vcr_by_item():
    arrays, items = vcr(("val-0",), (2, 0))
    assert predictions(arrays, items) == [
        Prediction("val-0/qar2", 3, 1, 0.0, "role", (20.0, 21.0, 22.0, 23.0)),
        Prediction("val-0/qar0", 3, None, None, "role", (0.0, 1.0, 2.0, 3.0)),
        Prediction("val-0/qa", 3, 2, 0.0, "role", (-10.0, -9.0, -8.0, -7.0)),
    ]


def test_open_answers_in_both_files(tmp_path):
    arrays, items = vqa()
    files = {"predictions_file": tmp_path / "p.json", "submission_file": tmp_path / "out" / "vqa.json"}
    lines = write_files(arrays, items, names=NAMES, expected=["4", "30"], about={"split": "test"}, **files)
    assert [line.rpartition(": ")[2] for line in lines] == [
        "2 predictions",
        "the answers to 2 questions of VQA",
    ]
    assert read_predictions(tmp_path / "p.json") == (
        {"split": "test"},
        [Prediction("30", "grün", "no", 0.3, "other"), Prediction("4", "no", None, None, "yes/no")],
    )
    assert read_vqa(tmp_path / "out" / "vqa.json", [4, 30]) == {4: "no", 30: "grün"}
    assert json.loads((tmp_path / "out" / "vqa.json").read_text("utf-8"))[0]["question_id"] == 4


def test_entailment_has_labels_and_no_leaderboard(tmp_path):
    items = {
        "example_ids": np.array(["1.jpg#0"]),
        "record_ids": np.array(["1.jpg#0"]),
        "kinds": np.array(["ve"]),
        "categories": np.array(["neutral"]),
        "labels": np.array([2]),
    }
    arrays = {
        "scores": np.array([[0.1, 2, -1]], np.float32),
        "chosen": np.array([1], np.int32),
        "outcome": np.zeros(1, np.float32),
        "judged": np.ones(1, bool),
    }
    names = ("contradiction", "entailment", "neutral")
    (said,) = predictions(arrays, items, names)
    assert said == Prediction("1.jpg#0", "entailment", "neutral", 0.0, "neutral", (0.1, 2.0, -1.0))
    with pytest.raises(ValueError, match="no leaderboard's file"):
        write_submission(tmp_path / "x", arrays, items, {"1.jpg#0"}, names)
