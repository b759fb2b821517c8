"""Token rows: by hand for each student; words that are the same for student and CLIP, whatever the text."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.index import MANIFEST
from clipdistill_jax.data.questions import index
from clipdistill_jax.data.questions.importance import ensure_importance
from clipdistill_jax.data.questions.items import Question
from clipdistill_jax.data.questions.layout import StudentText
from clipdistill_jax.data.questions.split import QuestionSplit, Reading
from clipdistill_jax.data.words import split_words

OBJECTS = ("person", "traffic light", "person", "car")
NAMES = ("Riley", "traffic light", "Casey", "car")


def question(kind: str, context=(), choices=(("yes",),), **changes) -> Question:
    base = Question(
        example_id=f"r/{kind}",
        record_id="r",
        kind=kind,
        image=0,
        objects=OBJECTS,
        names=NAMES,
        context=tuple(context),
        choices=tuple(choices),
        label=0,
        given=-1,
        category="",
        group="all",
    )
    return dataclasses.replace(base, **changes)


def open_split(folder: Path, items: list[Question], reading: Reading) -> QuestionSplit:
    """The split that these items make, with its importance."""
    (folder / MANIFEST).write_text(json.dumps({"splits": {"train": {}}}))
    index.write_items(folder, "train", iter(items))
    index.write_images(folder, "train", ["a.jpg"], [5])
    kinds = sorted({item.kind for item in items})
    ensure_importance(folder, reading.clip_text, kinds, workers=1, progress=False)
    return QuestionSplit(folder, "train", kinds, reading)


def reading(kind, bert, clip, max_tokens=64, clip_tokens=77, clip_text="both") -> Reading:
    return Reading(StudentText(kind, bert), max_tokens, clip, clip_tokens, clip_text)


def arrays(split: QuestionSplit, item: int = 0, length: int = 32) -> dict[str, np.ndarray]:
    found = split.text(np.array([item]), length, student=True, clip=True)
    return {name: value[0] for name, value in found.items()}


def rows(found: dict[str, np.ndarray], choice: int, bert) -> list[tuple]:
    """(token, segment, word, region) of each real token; padding holds nothing."""
    mask = found["token_mask"][choice]
    count = int(mask.sum())
    assert mask[:count].all()
    for name, empty in (("tokens", 0), ("types", 0), ("word_ids", -1), ("token_regions", 0)):
        assert (found[name][choice][count:] == empty).all()
    ids = found["tokens"][choice][:count].tolist()
    named = [bert.backend.id_to_token(i) or i - bert.vocab_size for i in ids]
    columns = [found[n][choice][:count].tolist() for n in ("types", "word_ids", "token_regions")]
    return list(zip(named, *columns, strict=True))


QA = question("qa", [("Why", "is", (0, 2), "?")], [((2,), "waits"), ("no",), ((3,),), ((1,), "yes")], label=1)
QAR = question("qar", [("Why", "?"), ((2,), "waits")], [("yes",), ("no",), ("blue",), ("hurry",)], given=0)


def test_uniter_by_hand(bert, clip, tmp_path):
    """UNITER data/vcr.py:102-157: [CLS] 0, question 0, [SEP] 2, answer 2, [SEP] 2; a person is one token."""
    split = open_split(tmp_path, [QA, QAR], reading("uniter", bert, clip))
    found = arrays(split, 0)
    # person_i is i behind the tokenizer's entries; `rows` names it by i.
    assert rows(found, 0, bert) == [
        ("[CLS]", 0, -1, 0),
        ("why", 0, 0, 0),
        ("is", 0, 1, 0),
        (0, 0, 2, 1),
        (2, 0, 3, 3),
        ("?", 0, 4, 0),
        ("[SEP]", 2, -1, 0),
        (2, 2, 5, 3),
        ("waits", 2, 6, 0),
        ("[SEP]", 2, -1, 0),
    ]
    light = [row for row in rows(found, 3, bert) if row[3] == 2]  # "traffic light": one object, one word
    assert len(light) > 1 and {row[1:] for row in light} == {(2, 5, 2)}
    assert split.label.tolist() == [1, 0] and split.given.tolist() == [-1, 0]
    found = arrays(split, 1)
    assert [row[:3] for row in rows(found, 2, bert)] == [
        ("[CLS]", 0, -1),
        ("why", 0, 0),
        ("?", 0, 1),
        ("[SEP]", 2, -1),
        (2, 2, 2),
        ("waits", 2, 3),
        ("[SEP]", 3, -1),
        ("blue", 3, 4),
        ("[SEP]", 3, -1),
    ]
    student = StudentText("uniter", bert)
    assert student.vocab_size == bert.vocab_size + 81
    assert dataclasses.replace(student, persons=False).vocab_size == bert.vocab_size


def test_vl_bert_by_hand(bert, clip, tmp_path):
    """Neutral names with "and"; question and answer without [SEP] between them before a rationale."""
    split = open_split(tmp_path, [QA, QAR], reading("vl_bert", bert, clip))
    found = arrays(split, 0)
    assert rows(found, 1, bert) == [
        ("[CLS]", 0, -1, 0),
        ("why", 0, 0, 0),
        ("is", 0, 1, 0),
        ("riley", 0, 2, 1),
        ("and", 0, 3, 0),
        ("casey", 0, 4, 3),
        ("?", 0, 5, 0),
        ("[SEP]", 0, -1, 0),
        ("no", 1, 6, 0),
        ("[SEP]", 1, -1, 0),
    ]
    # CLIP has the same words with "and"; the joiner has no importance, though it has a slot.
    assert found["clip_word_ids"][1].max() == 6 and found["importance"][1][3] == 0
    assert found["importance"][1].sum() == pytest.approx(1, abs=1e-6)
    assert [row[:2] for row in rows(arrays(split, 1), 3, bert)] == [
        ("[CLS]", 0),
        ("why", 0),
        ("?", 0),
        ("casey", 0),
        ("waits", 0),
        ("[SEP]", 0),
        ("hurry", 1),
        ("[SEP]", 1),
    ]


def test_one_text_by_hand(bert, clip, tmp_path):
    """VQA: VL-BERT answers at [MASK]; SNLI-VE and UNITER's VQA have the text alone."""
    items = [question("vqa", objects=(), names=()), question("ve", objects=(), names=())]
    text = [("[CLS]", 0), ("yes", 0), ("[SEP]", 0)]
    for kind, vqa in (("uniter", text), ("vl_bert", [*text, ("[MASK]", 1), ("[SEP]", 1)])):
        folder = tmp_path / kind
        folder.mkdir()
        split = open_split(folder, items, reading(kind, bert, clip))
        assert [row[:2] for row in rows(arrays(split, 0), 0, bert)] == vqa
        assert [row[:2] for row in rows(arrays(split, 1), 0, bert)] == text


def test_words_without_a_token(bert, clip, tmp_path):
    """BERT drops control characters; the words that they are have a number all the same."""
    items = [
        question("qa", [("whyisnear" * 9,)], [("\0",), ("yes",)]),  # nothing of the first is left
        question("qa", [()], [("\0", "why", "\1") * 8, ("\0", "yes")]),  # 24 words, 8 tokens
    ]
    for name, teacher in (("alone", None), ("taught", clip)):
        folder = tmp_path / name
        folder.mkdir()
        split = open_split(folder, items, reading("uniter", bert, teacher, 12, 40))
        found = split.text(np.arange(2), 12, student=True, clip=teacher is not None)
        ids, mask = found["word_ids"], found["token_mask"]
        assert mask.sum(2).tolist() == [[3, 4], [11, 4]] and ids.max() < 12
        # The context is gone, so word 0 is the choice's first.
        assert ids[0].max(1).tolist() == [-1, 0]
        # Of 24 words the last 12 are numbered.
        assert ids[1, 0][ids[1, 0] >= 0].tolist() == [1, 4, 7, 10] and ids[1, 1].max() == 1
        assert (split.lengths[:, 0] == 12).all()
        if teacher is not None:
            assert found["clip_word_ids"][1, 0].max() == 11 and found["importance"][1, 0, 12:].max() == 0


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Zs", "Zl", "Zp"]), max_size=8)
TAG = st.lists(st.integers(0, 3), min_size=1, max_size=2).map(tuple)
PLAIN = st.lists(TEXT.filter(lambda t: t.strip()), max_size=8).map(tuple)
TAGGED = st.lists(TEXT.filter(lambda t: t.strip()) | TAG, max_size=8).map(tuple)


@settings(max_examples=60, deadline=None)
@given(PLAIN)
@example(("İstanbul", "ΣΑΣ", "don't", "2nd-hand", "½²", "हिन्दी", "猫が走る", "👨‍👩‍👧"))
@example(())
@example(("word",) * 200)
def test_one_text_is_encoded_as_the_tokenizers_do(bert, clip, text):
    """Against `Tokenizer.encode` of the whole text, truncation included."""
    said = " ".join(text)
    with tempfile.TemporaryDirectory() as folder:
        items = [question("ve", choices=[text], objects=(), names=())]
        split = open_split(Path(folder), items, reading("uniter", bert, clip))
        found = arrays(split, 0, 64)
    for prefix, tokenizer, length in (("", bert, 64), ("clip_", clip, 77)):
        expected = tokenizer.encode([said], length)
        for ours, theirs in (("tokens", "tokens"), ("token_mask", "token_mask"), ("word_ids", "word_ids")):
            # Of more than 77 words the first ones have no number, so that the last ones have a slot.
            whole = getattr(expected, theirs)[0]
            if theirs == "word_ids":
                whole = np.maximum(whole - max(len(split_words([said])[0]) - 77, 0), -1)
            assert np.array_equal(found[f"{prefix}{ours}"][0], whole)


def slow_words(texts, names, joiner) -> list[str]:
    """Every word of a text, an object being one."""
    found = []
    for text in texts:
        for item in text:
            if isinstance(item, str):
                found += split_words([item])[0]
            else:
                for k, i in enumerate(item):
                    found += [joiner] * bool(k and joiner) + [names[i]]
    return found


def slow_row(words, tokenizer, special, context: int, room: int) -> dict[int, list[int]]:
    """word -> its tokens, once whole words are taken from the front of the first `context` words."""
    ids = []
    for word in words:
        found = tokenizer.encode([word], 200)
        text = found.tokens[0][found.token_mask[0]][1:-1].tolist()
        ids.append([special[word]] if word in special else text)
    dropped = 0
    while sum(map(len, ids)) > room and dropped < context:
        ids[dropped] = []
        dropped += 1
    left = room
    for i in range(dropped, len(words)):
        ids[i] = ids[i][: max(left, 0)]
        left -= len(ids[i])
    return {i: found for i, found in enumerate(ids) if found}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["uniter", "vl_bert"]), TAGGED, TAGGED, TAGGED, st.sampled_from(["both", "choice"]))
@example("vl_bert", ((0, 2), "x" * 40), ("it's", (1,)), ("1999", (3, 3), "é" * 30), "both")
@example("uniter", (), (), (), "both")
@example("uniter", ("a", "b") * 60, ((0,),) * 50, ((1, 2),) * 40, "choice")
def test_word_i_is_the_same_word_for_both(bert, clip, kind, q, a, r, clip_text):
    """Against a slow reading of the parts, word by word, with room for 24 and 20 tokens."""
    item = question("qar", [q, a], [r, ("yes",)])
    with tempfile.TemporaryDirectory() as folder:
        split = open_split(Path(folder), [item], reading(kind, bert, clip, 24, 20, clip_text))
        found = arrays(split, 0, 24)
    student = StudentText(kind, bert)
    assert (split.lengths <= [24, 5]).all() and split.lengths[0, 1] == 5
    for choice, text in enumerate([r, ("yes",)]):
        names = slow_words([q, a, text], student.names(item), student.joiner)
        classes = slow_words([q, a, text], OBJECTS, student.joiner)
        assert len(names) == len(classes)
        context = len(slow_words([q, a], OBJECTS, student.joiner))
        room = 24 - {"uniter": 4, "vl_bert": 3}[kind]
        theirs = slow_row(names, bert, student.special_words, context, room)
        spoken = classes if clip_text == "both" else classes[context:]
        clips = slow_row(spoken, clip, {}, context if clip_text == "both" else 0, 18)
        if clip_text == "choice":
            clips = {i + context: ids for i, ids in clips.items()}
        # Words are counted from the first that the student keeps, if it drops any, or from the 20th last.
        whole = slow_row(names, bert, student.special_words, 0, 10**6)
        first = min(theirs, default=context) if sum(map(len, whole.values())) > room else 0
        shift = max(first, len(names) - 20)
        for name, expected in (("", theirs), ("clip_", clips)):
            tokens, words = found[f"{name}tokens"][choice], found[f"{name}word_ids"][choice]
            mask = found[f"{name}token_mask"][choice]
            got: dict[int, list[int]] = {}
            for token, word in zip(tokens[mask].tolist(), words[mask].tolist(), strict=True):
                got.setdefault(word, []).append(token)
            got.pop(-1)
            assert got == {i - shift: ids for i, ids in expected.items() if i >= shift}
        assert found["clip_token_mask"].sum(1).max() <= 20
        assert found["importance"].shape == (2, 20)
