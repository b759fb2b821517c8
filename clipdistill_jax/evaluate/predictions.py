"""From what a model says of a split's questions to files: predictions as json, submissions to leaderboards.

`items` is what the dataset tells of the questions, an entry an item: `example_ids`, each once; `record_ids`,
`kinds`, `categories`, `labels` as `evaluate.choices.QuestionSplit` has them; and `given`, the answer that a
"qar" item's rationales go with, -1 for other items. `arrays` is what `ChoiceEvaluator.answer` returns.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from clipdistill_jax.evaluate.submissions import (
    CHOICES,
    Prediction,
    VcrSubmission,
    check_ids,
    read_vcr,
    read_vqa,
    write_predictions,
    write_vcr,
    write_vqa,
)

Arrays = Mapping[str, np.ndarray]


def join_items(parts: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """The items of several models that answer the same records, such as VL-BERT's two of VCR.

    Raises:
      ValueError: two answer the same kind of question, or questions of other records.
    """
    seen: set[str] = set()
    for part in parts:
        kinds = {str(kind) for kind in part["kinds"]}
        if kinds & seen:
            raise ValueError(f"two stages answer questions of the kind {', '.join(sorted(kinds & seen))}")
        seen |= kinds
        records, first = set(part["record_ids"].tolist()), set(parts[0]["record_ids"].tolist())
        if records != first:
            lost = sorted(records ^ first)
            raise ValueError(f"the stages answer other records: only one has {lost[0]} ({len(lost)} in all)")
    return join_arrays(parts)


def join_arrays(parts: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """What each array has in all parts, one part after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def predictions(arrays: Arrays, items: Arrays, names: Sequence[str] = ()) -> list[Prediction]:
    """One prediction an item.

    Args:
      arrays, items: as this module says.
      names: of the classes (SNLI-VE's labels, VQA's answers); without, choices are told by their index.
    """

    def said(choice: Any) -> str | int:
        return names[int(choice)] if names else int(choice)

    made = []
    for i, example_id in enumerate(items["example_ids"]):
        label, scores = int(items["labels"][i]), arrays["scores"][i] if "scores" in arrays else ()
        made.append(
            Prediction(
                example_id=str(example_id),
                prediction=said(arrays["chosen"][i]),
                label=said(label) if label >= 0 else None,
                outcome=round(float(arrays["outcome"][i]), 6) if arrays["judged"][i] else None,
                category=str(items["categories"][i]),
                scores=tuple(float(f"{x:.6g}") for x in scores),
            )
        )
    return made


def check_submission(items: Arrays, expected: Collection[str]) -> None:
    """Whether a leaderboard's file can be written once the items are answered.

    Args:
      items: as this module says.
      expected: ids of all questions that the dataset lists in the split.

    Raises:
      ValueError: no leaderboard takes such questions; the items lack one of `expected`, or of VCR its answers
        or its rationales given one of the answers.
    """
    kinds = {str(kind) for kind in items["kinds"]}
    if kinds != {"vqa"} and not kinds <= {"qa", "qar"}:
        raise ValueError("there is no leaderboard's file for these questions; write them as predictions")
    check_ids(list(dict.fromkeys(items["record_ids"].tolist())), expected, "the prepared split")
    if kinds != {"vqa"}:
        _vcr_places(items)


def _vcr_places(items: Arrays) -> list[tuple[str, int, list[int]]]:
    """Of each record its id, the place of its answers, and those of its rationales given each answer."""
    asked = zip(items["record_ids"], items["kinds"], items["given"], strict=True)
    place = {(str(record), str(kind), int(answer)): i for i, (record, kind, answer) in enumerate(asked)}
    found = []
    for record in dict.fromkeys(str(record) for record in items["record_ids"]):
        missing = [a for a in range(CHOICES) if (record, "qar", a) not in place]
        if (record, "qa", -1) not in place or missing:
            what = f"rationales given answer {missing[0]}" if missing else "answers"
            raise ValueError(
                f"{record}: there are no scores of its {what}; a submission needs those of the answers and "
                "of the rationales given each of the four answers, from one stage or two"
            )
        given = [place[record, "qar", a] for a in range(CHOICES)]
        found.append((record, place[record, "qa", -1], given))
    return found


def vcr_submission(arrays: Arrays, items: Arrays) -> VcrSubmission:
    """The scores of a VCR split's answers, and of its rationales given each of the four answers.

    Raises:
      ValueError: a question lacks its answers' scores, or the rationales' given one of the answers.
    """
    records, answers, rationales = zip(*_vcr_places(items), strict=True)
    scores = arrays["scores"]
    return VcrSubmission(records, scores[np.array(answers)], scores[np.array(rationales)])


def vqa_result(arrays: Arrays, items: Arrays, names: Sequence[str]) -> dict[int, str]:
    """question_id -> answer."""
    pairs = zip(items["record_ids"], arrays["chosen"], strict=True)
    return {int(str(record)): names[int(chosen)] for record, chosen in pairs}


def write_submission(
    path: str | os.PathLike[str],
    arrays: Arrays,
    items: Arrays,
    expected: Collection[str],
    names: Sequence[str] = (),
) -> str:
    """Writes VCR's csv or VQA's result json, whichever the questions are for, and reads it again.

    Args:
      expected: as for `check_submission`.

    Returns:
      What was written, in words.

    Raises:
      ValueError: as for `check_submission`, `write_vcr`, `write_vqa`.
    """
    check_submission(items, expected)
    if "vqa" in items["kinds"]:
        asked = [int(question) for question in expected]
        write_vqa(path, vqa_result(arrays, items, names), asked)
        return f"{path}: the answers to {len(read_vqa(path, asked)):,} questions of VQA"
    write_vcr(path, vcr_submission(arrays, items), expected)
    return f"{path}: the scores of {len(read_vcr(path, expected).ids):,} questions of VCR"


def write_files(
    arrays: Arrays,
    items: Arrays,
    *,
    expected: Collection[str],
    names: Sequence[str] = (),
    about: Mapping[str, Any],
    predictions_file: str | os.PathLike[str] | None = None,
    submission_file: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Writes the files that are named; a line on each.

    Args:
      arrays, items, names: as for `predictions`.
      expected: as for `check_submission`.
      about: what the predictions are of: stages, steps, split, ...

    Raises:
      ValueError: as for `write_predictions` and `write_submission`.
    """
    lines = []
    if predictions_file is not None:
        made = predictions(arrays, items, names)
        write_predictions(predictions_file, made, about)
        lines.append(f"{predictions_file}: {len(made):,} predictions")
    if submission_file is not None:
        lines.append(write_submission(submission_file, arrays, items, expected, names))
    return lines
