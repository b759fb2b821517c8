"""Which training examples a run may learn from: all, a few, or a few with labels and the rest without.

CLIP-TD, section 4: VCR 100 or 1000 questions of each of seven categories; SNLI-VE 1000 or 10,000 pairs of
each label; VQA 100 or 1000 questions in all; semi-supervised VCR as low-shot, with the remaining questions
without their labels.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.formats.snli_ve import LABELS, SnliVeRecord
from clipdistill_jax.data.formats.vcr import VcrRecord, Words
from clipdistill_jax.data.formats.vqa import VqaRecord

PROTOCOLS = ("full", "low_shot", "semi_supervised")

# Category -> words or phrases that mark it. The first category with a mark in the question has it; a question
# without any is "activity". The paper (section 8.3, after Zellers et al.) names the categories and the words
# that come first here, but no rule: the order and the further words are ours. Of VCR it says (this
# rule's shares are not measured): explanation 38%, activity 24%, temporal 13%, mental 8%, role 7%, scene 5%,
# hypothetical 5%.
_MARKS = (
    ("explanation", "why|how come|what caused|what makes|for what reason|what is the reason"),
    ("hypothetical", "if|would|could|should|might|may|possible|possibly|likely|chance"),
    (
        "temporal",
        "happened|before|after|happen|happens|earlier|later|next|previously|recently|soon|about to|going to",
    ),
    (
        "mental",
        "feeling|thinking|feel|feels|felt|think|thinks|thought|emotion|emotions|mood|attitude|want|wants|wanted"
        "|believe|believes|hoping|love|loves|enjoy|enjoying|interested|happy|sad|angry|upset|mad|afraid"
        "|scared|worried|nervous|surprised|excited|bored|confused|concerned|trust|trusts",
    ),
    ("activity", "doing|looking|event"),
    (
        "role",
        "relation|relations|relationship|related|occupation|occupations|job|profession|role|career|who|friends"
        "|for a living|married|couple|family|siblings|boss|know each other|dating|strangers|rich|wealthy",
    ),
    (
        "scene",
        "where|near|place|location|located|room|building|city|country|weather|season|time of day|what time"
        "|setting|indoors|outdoors",
    ),
)
CATEGORIES = tuple(name for name, _ in _MARKS)
GROUPS = {"vcr": CATEGORIES, "snli_ve": LABELS, "vqa": ("all",)}  # that each dataset draws from
_CATEGORY = tuple((name, re.compile(rf"\b(?:{marks})\b")) for name, marks in _MARKS)


def question_category(question: Words) -> str:
    """One of CATEGORIES, by the question's words alone; object tags and case do not matter."""
    text = " ".join(item.lower() if isinstance(item, str) else "@" for item in question)
    return next((name for name, marks in _CATEGORY if marks.search(text)), "activity")


def vcr_groups(records: Iterable[VcrRecord]) -> dict[str, str]:
    """Example id -> question category."""
    return {record.example_id: question_category(record.question) for record in records}


def snli_ve_groups(records: Iterable[SnliVeRecord]) -> dict[str, str]:
    """Example id -> label."""
    return {record.example_id: LABELS[record.label] for record in records}


def vqa_groups(records: Iterable[VqaRecord]) -> dict[str, str]:
    """Example id -> "all"."""
    return {record.example_id: "all" for record in records}


@dataclasses.dataclass(frozen=True)
class Selection:
    """The training examples of a run; written beside it.

    Attributes:
      protocol: one of PROTOCOLS.
      shots: examples drawn of each group; 0 = all.
      seed: what the draw depends on, besides the ids.
      available: group -> examples there are.
      labelled: ids of the examples whose labels may be used, sorted.
      unlabelled: ids of those that may be used without, sorted.
    """

    protocol: str
    shots: int
    seed: int
    available: dict[str, int]
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]


def select(
    groups: Mapping[str, str], *, protocol: str, shots: int = 0, seed: int = 0, among: Iterable[str] = ()
) -> Selection:
    """Draws the examples of a protocol.

    Of each group the `shots` ids with the smallest hash of (seed, id) are taken. So a draw does not depend on
    the order of the records, and with one seed fewer shots are a part of more.

    Args:
      groups: id of each training example -> its group (`vcr_groups`, `snli_ve_groups`, `vqa_groups`).
      protocol: "full"; "low_shot"; "semi_supervised" = low_shot, with all others unlabelled.
      shots: examples of each group; 0 with "full".
      seed: any whole number.
      among: groups that there must be (the dataset's GROUPS), beside those that examples have.

    Raises:
      ValueError: an argument is out of range, or a group has fewer examples than `shots`, or none.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; it can be {', '.join(PROTOCOLS)}")
    if not groups:
        raise ValueError("there are no training examples to select from")
    if (shots == 0) != (protocol == "full") or shots < 0:
        raise ValueError(f"shots={shots} with protocol {protocol!r}: 0 with 'full', else 1 or more")
    counts = Counter(groups.values())
    available = dict(sorted(counts.items()))
    short = {group: counts[group] for group in sorted({*counts, *among}) if counts[group] < shots}
    if short:
        raise ValueError(f"{shots} examples of each group are asked for, but there are only {short}")
    drawn = sorted(groups)
    if shots:
        ranked = sorted(groups, key=lambda i: (hashlib.sha256(f"{seed} {i}".encode()).digest(), i))
        taken: Counter[str] = Counter()
        drawn = []
        for example_id in ranked:
            if taken[groups[example_id]] < shots:
                taken[groups[example_id]] += 1
                drawn.append(example_id)
    rest = sorted(groups.keys() - set(drawn)) if protocol == "semi_supervised" else ()
    return Selection(protocol, shots, seed, available, tuple(sorted(drawn)), tuple(rest))


def write_selection(selection: Selection, path: str | os.PathLike[str]) -> None:
    """Writes the lists as JSON, an id a line; the file appears as a whole.

    Raises:
      ValueError: another selection is there already: a run goes on with the examples that it began with.
    """
    path = Path(path)
    if path.exists():
        if read_selection(path) != selection:
            raise ValueError(
                f"{path} lists other training examples: protocol, shots, seed or the dataset changed since "
                "this run began; take another folder, or the old settings"
            )
        return
    text = json.dumps(dataclasses.asdict(selection), indent=1, ensure_ascii=False)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_selection(path: str | os.PathLike[str]) -> Selection:
    """Reads what `write_selection` wrote.

    Raises:
      FileNotFoundError: it is absent.
      FormatError: it is damaged.
    """
    data = checked.read_json(Path(path))
    where = f"{path}, top level"
    labelled, unlabelled = (checked.field(data, name, list, where) for name in ("labelled", "unlabelled"))
    for name, ids in (("labelled", labelled), ("unlabelled", unlabelled)):
        if not all(isinstance(i, str) for i in ids):
            raise FormatError(f"{where}: the field {name!r} should list ids as texts")
    return Selection(
        protocol=checked.field(data, "protocol", str, where),
        shots=checked.field(data, "shots", int, where),
        seed=checked.field(data, "seed", int, where),
        available=checked.field(data, "available", dict, where),
        labelled=tuple(labelled),
        unlabelled=tuple(unlabelled),
    )
