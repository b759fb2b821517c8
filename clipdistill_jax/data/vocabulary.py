"""VQA's open answers: their normal form, how right each is, and the vocabulary of a classifier.

The normal form is that of the official evaluation (visualqa.org/evaluation.html): lower case, no periods but
decimal ones, number words as digits, no articles, apostrophes in contractions, other punctuation as spaces.
Where the page leaves the order or a corner open, the official program decides, quirks included, for a score
is comparable only so (GT-Vision-Lab/VQA vqaEvaluation/vqaEval.py).
"""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.formats.vqa import VqaRecord

UNKNOWN = "<unk>"  # VL-BERT's file lists it; no answer counts as it
MIN_COUNT = 9  # questions that must share a top answer; gives 3129 answers on train + val

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the official look-behind is misspelt and never holds
_MOST_PERIODS = 32  # the official program passes a flag (re.UNICODE, 32) where the count stands
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
# The contractions that the official evaluation mends, wherever exactly one apostrophe is missing.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't "
    "mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
_MENDED = {
    word[:k] + word[k + 1 :]: word for word in _CONTRACTIONS.split() for k, c in enumerate(word) if c == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it


@lru_cache(2**16)  # the same answers come again and again
def normalize_answer(text: str) -> str:
    """The normal form of an answer."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        found = found.replace(sign, "" if beside_space or _DIGIT_COMMA.search(text) else " ")
    found = _PERIOD.sub("", found, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in found.lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def official_score(answer: str, given: Sequence[str]) -> float:
    """The official accuracy of an answer: min(1, n/3), averaged over all sets that leave one person out.

    n is how many of the others gave the answer. Answers are brought to their normal form, unless all people
    wrote exactly the same; then the answer must be that, letter by letter (official, too).

    Args:
      answer: the model's.
      given: what people said, ten of them in VQA v2.

    Raises:
      ValueError: nobody said anything.
    """
    if not given:
        raise ValueError("an answer is scored against what people said; there is nothing")
    plain = [" ".join(re.split(r"[\n\t]", text)).strip() for text in (answer, *given)]
    if len(set(plain[1:])) > 1:
        plain = [normalize_answer(text) for text in plain]
    same = [text == plain[0] for text in plain[1:]]
    total = sum(same)
    return sum(min(1.0, (total - one) / 3) for one in same) / len(same)


def training_score(count: int) -> float:
    """The target of an answer that `count` of ten people gave: 0, 0.3, 0.6, 0.9, then 1.

    The practice of training code since bottom-up attention (hengyuan-hu/bottom-up-attention-vqa
    tools/compute_softscore.py:80-90). With ten people it equals `official_score`, unless all wrote the same.
    """
    return min(3 * count, 10) / 10


@dataclasses.dataclass(frozen=True)
class AnswerVocabulary:
    """The classes of a VQA classifier, in the order of its outputs.

    UNITER's and LXMERT's files hold the same 3129 answers in different orders: a checkpoint means nothing
    without its own. `fingerprint` goes into a checkpoint, and `check` compares.

    Attributes:
      answers: answers in normal form, each once.
    """

    answers: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the answers and their order."""
        return hashlib.sha256(json.dumps(self.answers).encode()).hexdigest()

    @cached_property
    def index(self) -> dict[str, int]:
        """answer -> class."""
        return {answer: k for k, answer in enumerate(self.answers)}

    @cached_property
    def classes(self) -> dict[str, list[int]]:
        """normal form -> classes."""
        found: dict[str, list[int]] = {}
        for k, answer in enumerate(self.answers):
            found.setdefault(normalize_answer(answer), []).append(k)
        return found

    def __len__(self) -> int:
        return len(self.answers)

    def check(self, fingerprint: str, where: str) -> None:
        """Refuses the vocabulary of another checkpoint.

        Raises:
          ValueError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{where} was trained with another answer vocabulary (fingerprint {fingerprint[:12]}; this "
                f"one is {self.fingerprint[:12]}, {len(self)} answers): give the file it was trained with"
            )

    def targets(self, given: Iterable[str]) -> Float32[np.ndarray, " v"]:
        """Soft scores of all classes: `training_score` of how many people gave each, in normal form.

        One answer alone (Visual Genome's questions) counts as ten. Answers outside the vocabulary count for
        nothing.
        """
        counts = Counter(normalize_answer(text) for text in given)
        if counts.total() == 1:
            counts = Counter(dict.fromkeys(counts, 10))
        scores = np.zeros(len(self), np.float32)
        for answer, count in counts.items():
            if answer in self.index and answer != UNKNOWN:
                scores[self.index[answer]] = training_score(count)
        return scores

    def official(self, given: Sequence[str]) -> Float32[np.ndarray, " v"]:
        """The `official_score` of all classes.

        It differs from `targets` where all people wrote the same: what is not written so is wrong then.
        """
        scores = np.zeros(len(self), np.float32)
        for form in {normalize_answer(text) for text in given}:
            for k in self.classes.get(form, ()):
                scores[k] = official_score(self.answers[k], given)
        return scores

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON list, class by class, that `read_vocabulary` reads."""
        Path(path).write_text(json.dumps(self.answers, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def read_vocabulary(path: str | os.PathLike[str]) -> AnswerVocabulary:
    """Reads a list of answers (label2ans), a map from answer to class (ans2label), or a text file.

    The text file is VL-BERT's answers_vqa.txt: an answer a line, blank lines passed over, lower-cased.

    Raises:
      FileNotFoundError: it is absent.
      FormatError: an answer occurs twice, or the classes are not 0, 1, 2, ...
    """
    path = Path(path)
    if path.suffix != ".json":
        lines = (line.strip().lower() for line in checked.read_text(path).splitlines())
        return _vocabulary([line for line in lines if line], path)
    data = checked.read_json(path, unique=True)
    if isinstance(data, dict):
        if not all(type(k) is int for k in data.values()) or sorted(data.values()) != list(range(len(data))):
            raise FormatError(f"{path}: the classes of a map of {len(data)} answers should be 0, 1, 2, ...")
        data = sorted(data, key=data.__getitem__)
    if not isinstance(data, list) or not all(isinstance(answer, str) for answer in data):
        raise FormatError(f"{path}: expected a list of answers, or a map from answer to class")
    return _vocabulary(data, path)


def build_vocabulary(records: Iterable[VqaRecord], *, min_count: int = MIN_COUNT) -> AnswerVocabulary:
    """The normal forms that are the top answer of at least `min_count` questions, the most frequent first.

    hengyuan-hu/bottom-up-attention-vqa tools/compute_softscore.py:133-151; equal counts go by the alphabet,
    so that the order of the records does not matter.

    Raises:
      FormatError: a record has no top answer.
      ValueError: no answer is that frequent.
    """
    counts: Counter[str] = Counter()
    for record in records:
        if record.top_answer is None:
            raise FormatError(f"{record.record}: no 'multiple_choice_answer' to build a vocabulary from")
        counts[normalize_answer(record.top_answer)] += 1
    kept = sorted((a for a, n in counts.items() if n >= min_count), key=lambda a: (-counts[a], a))
    if not kept:
        raise ValueError(f"no answer is the top answer of {min_count} questions; lower min_count")
    return AnswerVocabulary(tuple(kept))


def _vocabulary(answers: list[str], path: Path) -> AnswerVocabulary:
    if not answers:
        raise FormatError(f"{path}: no answers")
    seen: dict[str, str] = {}
    for k, answer in enumerate(answers):
        checked.check_unique(answer, f"{path}, answer {k}", seen, "answer")
    return AnswerVocabulary(tuple(answers))
