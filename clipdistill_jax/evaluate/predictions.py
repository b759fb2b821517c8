"""From what a model says of a split's questions to files: predictions as json, submissions to leaderboards.

`items` is what the dataset tells of the questions, an entry an item: `example_ids`, each once; `record_ids`,
`kinds`, `categories`, `labels` as `evaluate.choices.QuestionSplit` has them; and `given`, the answer that a
"qar" item's rationales go with, -1 for other items. `arrays` is what `ChoiceEvaluator.answer` returns.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipdistill_jax.evaluate.submissions import (
    CHOICES,
    Prediction,
    VcrSubmission,
    read_vcr,
    read_vqa,
    write_predictions,
    write_vcr,
    write_vqa,
)

Arrays = Mapping[str, np.ndarray]


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


def vcr_submission(arrays: Arrays, items: Arrays) -> VcrSubmission:
    """The scores of a VCR split's answers, and of its rationales given each of the four answers.

    Raises:
      ValueError: a question lacks its answers' scores, or the rationales' given one of the answers.
    """
    asked = zip(items["record_ids"], items["kinds"], items["given"], strict=True)
    place = {(str(record), str(kind), int(answer)): i for i, (record, kind, answer) in enumerate(asked)}
    records = list(dict.fromkeys(str(record) for record in items["record_ids"]))
    for record in records:
        missing = [a for a in range(CHOICES) if (record, "qar", a) not in place]
        if (record, "qa", -1) not in place or missing:
            what = f"rationales given answer {missing[0]}" if missing else "answers"
            raise ValueError(
                f"{record}: there are no scores of its {what}; a submission needs those of the answers and "
                "of the rationales given each of the four answers"
            )
    answers = np.stack([arrays["scores"][place[record, "qa", -1]] for record in records])
    rationales = np.stack(
        [[arrays["scores"][place[record, "qar", a]] for a in range(CHOICES)] for record in records]
    )
    return VcrSubmission(tuple(records), answers, rationales)


def vqa_result(arrays: Arrays, items: Arrays, names: Sequence[str]) -> dict[int, str]:
    """question_id -> answer."""
    pairs = zip(items["record_ids"], arrays["chosen"], strict=True)
    return {int(str(record)): names[int(chosen)] for record, chosen in pairs}


def write_submission(
    path: str | os.PathLike[str], arrays: Arrays, items: Arrays, names: Sequence[str] = ()
) -> str:
    """Writes VCR's csv or VQA's result json, whichever the questions are for, and reads it again.

    Returns:
      What was written, in words.

    Raises:
      ValueError: no leaderboard takes such questions, or as for `vcr_submission`, `write_vcr`, `write_vqa`.
    """
    kinds = {str(kind) for kind in items["kinds"]}
    if kinds == {"vqa"}:
        asked = [int(str(record)) for record in items["record_ids"]]
        write_vqa(path, vqa_result(arrays, items, names), asked)
        return f"{path}: the answers to {len(read_vqa(path, asked)):,} questions of VQA"
    if kinds <= {"qa", "qar"}:
        expected = {str(record) for record in items["record_ids"]}
        write_vcr(path, vcr_submission(arrays, items), expected)
        return f"{path}: the scores of {len(read_vcr(path, expected).ids):,} questions of VCR"
    raise ValueError("there is no leaderboard's file for these questions; write them as predictions")


def write_files(
    arrays: Arrays,
    items: Arrays,
    *,
    names: Sequence[str] = (),
    about: Mapping[str, Any],
    predictions_file: str | os.PathLike[str] | None = None,
    submission_file: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Writes the files that are named; a line on each.

    Args:
      arrays, items, names: as for `predictions`.
      about: what the predictions are of: stage, step, split, ...

    Raises:
      ValueError: as for `write_predictions` and `write_submission`.
    """
    lines = []
    if predictions_file is not None:
        made = predictions(arrays, items, names)
        write_predictions(predictions_file, made, about)
        lines.append(f"{predictions_file}: {len(made):,} predictions")
    if submission_file is not None:
        lines.append(write_submission(submission_file, arrays, items, names))
    return lines
