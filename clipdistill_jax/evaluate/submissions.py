"""Files of predictions: VCR's leaderboard csv, VQA's result json, and our own json of any task.

Each is checked before it is written, appears as a whole, and can be read and checked again.
Sources: rowanz/r2c models/README.md and eval_for_leaderboard.py; GT-Vision-Lab/VQA vqa.py:145-166.
"""

import csv
import dataclasses
import io
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from clipdistill_jax.data.formats import FormatError, checked

CHOICES = 4
VCR_COLUMNS = (
    "annot_id",
    *(f"answer_{i}" for i in range(CHOICES)),
    *(f"rationale_conditioned_on_a{a}_{i}" for a in range(CHOICES) for i in range(CHOICES)),
)
_ANNOT_ID = re.compile(r"[^\s,]+-(\d+)")


class VcrSubmission(NamedTuple):
    """Scores (or probabilities) of a split's questions; of the rationales, given each of the answers."""

    ids: tuple[str, ...]
    answers: Float[np.ndarray, "n 4"]
    rationales: Float[np.ndarray, "n 4 4"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one example.

    Attributes:
      example_id: the dataset's.
      prediction: the answer, or the index of the choice.
      label: the right one; None where unknown.
      outcome: how right the prediction is, 0 to 1; None where unknown.
      category: that accuracy is split by, or "".
      scores: of the choices; empty where there are too many to keep.
    """

    example_id: str
    prediction: str | int
    label: str | int | None = None
    outcome: float | None = None
    category: str = ""
    scores: tuple[float, ...] = ()


def write_vcr(path: str | os.PathLike[str], submission: VcrSubmission, expected: Collection[str]) -> None:
    """Writes the csv of VCR's leaderboard: 21 columns, the questions by the number in their id.

    Args:
      expected: ids of all questions of the split.

    Raises:
      ValueError: an id is malformed, occurs twice, is missing or is none of the split's, or a score is not
        finite.
    """
    _check_vcr(submission, expected, "the submission")
    order = sorted(range(len(submission.ids)), key=lambda k: _number(submission.ids[k]))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(VCR_COLUMNS)
    for k in order:
        scores = np.concatenate([submission.answers[k], submission.rationales[k].ravel()])
        writer.writerow([submission.ids[k], *(f"{score:.9g}" for score in scores)])
    _write(path, text.getvalue())


def read_vcr(path: str | os.PathLike[str], expected: Collection[str]) -> VcrSubmission:
    """Reads and checks a csv of VCR's leaderboard.

    Raises:
      FileNotFoundError: it is absent.
      FormatError: columns are missing, others or in another order, or as for `write_vcr`.
    """
    path = Path(path)
    if checked.read_text(path).partition("\n")[0].strip() != ",".join(VCR_COLUMNS):
        raise FormatError(f"{path}, line 1: expected exactly the columns {','.join(VCR_COLUMNS)}")
    rows = checked.read_csv(path, VCR_COLUMNS)
    scores = np.empty((len(rows), len(VCR_COLUMNS) - 1), np.float64)
    for k, (line, row) in enumerate(rows):
        for i, name in enumerate(VCR_COLUMNS[1:]):
            try:
                scores[k, i] = float(row[name])
            except ValueError as error:
                raise FormatError(f"{path}, line {line}: {name!r} is no number: {row[name]!r}") from error
    ids = tuple(row["annot_id"] for _, row in rows)
    rationales = scores[:, CHOICES:].reshape(-1, CHOICES, CHOICES)
    submission = VcrSubmission(ids, scores[:, :CHOICES], rationales)
    try:
        _check_vcr(submission, expected, str(path))
    except ValueError as error:
        raise FormatError(str(error)) from error
    return submission


def write_vqa(path: str | os.PathLike[str], answers: Mapping[int, Any], expected: Collection[int]) -> None:
    """Writes VQA's result json: [{"question_id", "answer"}], by question_id.

    Args:
      answers: texts, by question_id.
      expected: all question_ids of the split.

    Raises:
      ValueError: a question is missing, or none of the split's, or its answer is no text.
    """
    check_ids(list(answers), expected, "the answers")
    wrong = [question for question, answer in answers.items() if not isinstance(answer, str)]
    if wrong:
        raise ValueError(f"the answer to question {wrong[0]} is no text: {answers[wrong[0]]!r}")
    rows = [{"question_id": int(question), "answer": answers[question]} for question in sorted(answers)]
    _write(path, json.dumps(rows, ensure_ascii=False, separators=(", ", ": ")) + "\n")


def read_vqa(path: str | os.PathLike[str], expected: Collection[int]) -> dict[int, str]:
    """Reads and checks a result json of VQA.

    Raises:
      FileNotFoundError: it is absent.
      FormatError: it is no list of {"question_id", "answer"}, or the questions are not those of the split.
    """
    path = Path(path)
    rows = checked.read_json(path)
    if not isinstance(rows, list):
        raise FormatError(f"{path}: expected a list of answers, found {type(rows).__name__}")
    found: list[tuple[int, str]] = []
    for k, row in enumerate(rows):
        where = f"{path}, item {k}"
        question = checked.field(row, "question_id", int, where)
        if isinstance(question, bool):
            raise FormatError(f"{where}: the field 'question_id' should be a number, found {question}")
        found.append((question, checked.field(row, "answer", str, where)))
    try:
        check_ids([question for question, _ in found], expected, str(path))
    except ValueError as error:
        raise FormatError(str(error)) from error
    return dict(found)


def write_predictions(
    path: str | os.PathLike[str], predictions: Iterable[Prediction], about: Mapping[str, Any]
) -> None:
    """Writes {"about": ..., "predictions": [...]}, an example a line.

    Args:
      about: what they are of: task, split, checkpoint, ...

    Raises:
      ValueError: an id occurs twice, a number is not finite, or `about` is nothing that json can hold.
    """
    predictions = list(predictions)
    _check_unique([item.example_id for item in predictions], "the predictions")
    try:
        lines = [
            json.dumps(dataclasses.asdict(item), ensure_ascii=False, allow_nan=False) for item in predictions
        ]
        head = json.dumps(dict(about), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the predictions cannot be written: {error}") from error
    _write(path, f'{{"about": {head},\n"predictions": [\n' + ",\n".join(lines) + "\n]}\n")


def read_predictions(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Prediction]]:
    """(about, predictions) of a file that `write_predictions` wrote.

    Raises:
      FileNotFoundError: it is absent.
      FormatError: it is damaged, or an id occurs twice.
    """
    path = Path(path)
    data = checked.read_json(path)
    about = checked.field(data, "about", dict, f"{path}, top level")
    rows = checked.field(data, "predictions", list, f"{path}, top level")
    names = {field.name for field in dataclasses.fields(Prediction)}
    found = []
    for k, row in enumerate(rows):
        where = f"{path}, predictions[{k}]"
        checked.field(row, "example_id", str, where)
        if row.keys() != names:
            raise FormatError(f"{where}: expected the fields {sorted(names)}, found {sorted(row)}")
        found.append(Prediction(**{**row, "scores": tuple(checked.field(row, "scores", list, where))}))
    try:
        _check_unique([item.example_id for item in found], str(path))
    except ValueError as error:
        raise FormatError(str(error)) from error
    return about, found


def _check_vcr(submission: VcrSubmission, expected: Collection[str], where: str) -> None:
    for annot_id in submission.ids:
        _number(annot_id)
    if not len(submission.ids) == len(submission.answers) == len(submission.rationales):
        raise ValueError(f"{where}: there are not as many ids as rows of scores")
    check_ids(submission.ids, expected, where)
    scores = np.concatenate([submission.answers, submission.rationales.reshape(len(submission.ids), -1)], 1)
    wrong = np.flatnonzero(~np.isfinite(scores).all(-1))
    if len(wrong):
        raise ValueError(
            f"{where}: a score of {submission.ids[wrong[0]]} is not finite ({len(wrong)} questions)"
        )


def _number(annot_id: str) -> int:
    match = _ANNOT_ID.fullmatch(annot_id)
    if match is None:
        raise ValueError(f"the annot_id {annot_id!r} is not of the form 'test-17'")
    return int(match[1])


def check_ids(ids: Sequence[Any], expected: Collection[Any], where: str) -> None:
    """Raises ValueError where an id occurs twice, is missing or is none of the split's."""
    _check_unique(ids, where)
    wanted = set(expected)
    for what, wrong in (
        ("misses", wanted - set(ids)),
        ("has ids that are not of the split:", set(ids) - wanted),
    ):
        if wrong:
            shown = ", ".join(sorted(map(str, wrong))[:3])
            raise ValueError(f"{where} {what} {shown} ({len(wrong)} in all; the split has {len(wanted)})")


def _check_unique(ids: Sequence[Any], where: str) -> None:
    twice = [i for i, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{where}: the id {twice[0]!r} occurs twice ({len(twice)} such ids)")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Makes the file's folder. Raises OSError where the file cannot be written there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file shall be written")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _write(path: str | os.PathLike[str], text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
