"""The page of a run of questions: its table, gains, panels and words; and of a run of both kinds."""

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.report import answers
from clipdistill_jax.report.page import write_report
from clipdistill_jax.report.tokens import read_words, write_words
from tests.report import fake_questions, fake_run
from tests.report.test_page import Page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "clip_td"
    settings, results = fake_questions.write(workdir)
    said = write_report(settings, workdir, results)
    return workdir, settings, results, said, (workdir / "report.html").read_text(encoding="utf-8")


def test_the_page_has_the_sections_of_questions_and_no_others(written):
    *_, text = written
    page = Page(text)
    assert page.of("h2") == [
        "Right answers by kind of question",
        "Training",
        "Selected words",
        "How the run was made",
    ]
    captions = page.of("figcaption")
    assert captions[:2] == ["all questions (70)", "activity (10)"] and len(captions[:8]) == 8
    assert captions[8:10] == ["Task loss, student model, pretraining", "Task loss, student model"]
    assert "Validation while training" in captions and captions[-1] == "val-0, the right answer"
    everything = " ".join(data for _, data in page.text)
    assert "on 70 questions of the test split" in everything and "captions and" not in everything
    assert "“telegram” (1.00)" in " ".join(a.get("alt", "") for _, a in page.tags)


def test_every_number_stands_in_the_table(written):
    workdir, settings, results, _, text = written
    columns = answers.columns(settings["stages"], answers.answering(results), {})
    found = {(column.group, column.name): column.cells for column in columns}
    assert found["", "Learned from"] == [
        "-",
        "CLIP: vision, language",
        "CLIP: vision, language, tokens",
        "after Adaptive finetuning; CLIP: vision, tokens, where CLIP is surer",
    ]
    assert found["Parameters", "total"][0] == "1.23M" and found["GFLOPs", "a question"][0] == "0.45"
    tests = [results[name]["test"] for name in fake_questions.STAGES]
    assert found["Right answers, %", "Q→AR"] == [f"{test['Q->AR']:.1f}" for test in tests]
    assert found["By category, Q→A", "role"] == [f"{test['Q->A/role']:.1f}" for test in tests]
    shown = Page(text).of("td")
    assert all(cell in shown for column in columns[1:] for cell in column.cells)
    markdown = (workdir / "report.md").read_text(encoding="utf-8")
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 2 + len(tests)
    assert answers.NOTE in markdown


def test_gains_are_told_over_the_first_that_learned_from_labels_alone(written):
    _, settings, results, said, _ = written
    lines = answers.gain_lines(settings["stages"], answers.answering(results))
    before, after = (results[name]["test"]["Q->A"] for name in ("baseline", "clip_td"))
    by = round(round(after, 1) - round(before, 1), 1)
    assert by > 0 and len(lines) == 3
    assert lines[2].startswith(
        "UNITER, CLIP-TD compared with UNITER, no distillation: "
        f"Q→A gained {by:.1f} points ({before:.1f} to {after:.1f}), QA→R "
    )
    rows = said.splitlines()
    assert max(map(len, rows[:-1])) <= 100 and "explanation" not in said


def test_what_else_two_stages_differ_in_is_told():
    settings = fake_questions.config()
    settings["stages"]["ts"]["steps"] = 300
    results = {name: {"test": {"accuracy": 50.0}} for name in fake_questions.STAGES}
    lines = answers.gain_lines(settings["stages"], results)
    assert lines[1].endswith("accuracy unchanged (50.0 to 50.0). The two also differ in: steps.")
    settings["stages"]["ts"]["shots"] = 100  # it learns other questions
    assert len(answers.gain_lines(settings["stages"], results)) == 2


def test_counts_are_of_the_questions_that_a_metric_is_of(tmp_path):
    np.savez(
        tmp_path / "scores.npz",
        judged=np.array([True, True, True, False]),
        kinds=np.array(["qa", "qar", "qa", "qa"]),
        categories=np.array(["role", "role", "", "role"]),
    )
    assert answers.read_counts(tmp_path / "scores.npz", "Q->A") == {"": 2, "role": 1}
    assert answers.read_counts(tmp_path / "scores.npz", "accuracy") == {"": 3, "role": 2}
    assert answers.read_counts(tmp_path / "none.npz", "accuracy") == {}


def test_standard_errors():
    assert answers.standard_error(50.0, 100) == 5
    assert answers.standard_error(20.0, 64) == pytest.approx(100 * math.sqrt(0.2 * 0.8 / 64))
    assert answers.standard_error(100.0, 10) == 0


def test_categories_may_have_a_slash():
    results = {"a": {"test": {"accuracy": 1.0, "accuracy/yes/no": 2.0, "Q->A/role": 3.0}}}
    assert answers.categories(results, "accuracy") == ["yes/no"]


def test_bars_differ_with_what_they_show():
    bars = [answers.Bar("a $ label that is long enough to need two lines", 0, 40.0, 4.0)]
    picture = answers.share_bars(bars, 25.0, "role (10)")
    assert picture.alt == f"Right answers, role (10): {bars[0].label} 40.0%."
    for image in (picture.light, picture.dark):
        assert Image.open(io.BytesIO(base64.b64decode(image))).size == (picture.width, picture.height)
    without = [answers.Bar(bars[0].label, 0, 40.0, None)]
    others = [answers.share_bars(without, 25.0, "role (10)"), answers.share_bars(bars, 0.0, "role (10)")]
    assert len({picture.light, *(other.light for other in others)}) == 3


def test_words_read_back(tmp_path):
    examples = fake_questions.words()
    one = next(iter(examples.values()))
    cut = type(one)(one.words[:2], one.relevance[:2], one.importance[:2], one.chosen[:2])
    none = type(one)((), one.relevance[:0], one.importance[:0], one.chosen[:0])
    for given in ({**examples, "of nothing": none, "second": cut}, {}):
        write_words(tmp_path / "words.npz", given)
        found = read_words(tmp_path / "words.npz")
        assert list(found) == list(given)
        for heading, scores in given.items():
            assert found[heading].words == scores.words
            for name in ("relevance", "importance", "chosen"):
                np.testing.assert_array_equal(getattr(found[heading], name), getattr(scores, name))
    assert read_words(tmp_path / "other.npz") == {}


def test_a_run_of_which_only_the_results_are_left(tmp_path):
    settings, results = fake_questions.config(), {}
    for name in fake_questions.STAGES:
        test = {"accuracy": 40.0}
        results[name] = {"test": test, "step": 1, "seconds": 1.0, "fingerprint": "x", "split": "validation"}
    write_report(settings, tmp_path, results)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.of("h2") == ["Right answers by kind of question", "How the run was made"]
    assert page.of("figcaption") == ["all questions"]


def test_a_run_of_both_kinds_has_both_tables(tmp_path):
    settings, results = fake_questions.write(tmp_path)
    for name in ("naive", "ts", "clip_td"):
        del settings["stages"][name], results[name]
    (tmp_path / "adapt/metrics.jsonl").unlink()
    retrieval, more = fake_run.write(tmp_path / "teacher_run", clips=12, pairs=0)
    settings["stages"] = {"teacher": retrieval["stages"]["teacher"], **settings["stages"]}
    results = {"teacher": {**more["teacher"], "folder": str(tmp_path / "teacher_run/teacher")}, **results}
    said = write_report(settings, tmp_path, results)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    headings = page.of("h2")
    assert headings[:3] == ["Accuracy and cost", "Right answers by kind of question", "Training"]
    heads = page.of("th")
    assert heads.count("Stage") == 3 and "text to video" in heads and "Q→AR" in heads
    assert "t2v" not in said and "MdR" in said and "Q→AR" in said
