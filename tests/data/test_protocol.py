"""Low-shot and semi-supervised draws, and the categories of VCR questions."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.formats.snli_ve import SnliVeRecord
from clipdistill_jax.data.formats.vcr import VcrRecord
from clipdistill_jax.data.formats.vqa import VqaRecord
from clipdistill_jax.data.protocol import (
    CATEGORIES,
    GROUPS,
    question_category,
    read_selection,
    select,
    snli_ve_groups,
    vcr_groups,
    vqa_groups,
    write_selection,
)

# Questions in VCR's manner; a number stands for an object. Labelled by hand with the paper's seven names.
QUESTIONS = {
    "explanation": [
        "Why is 4 pointing at 1 ?",
        "How come 1 is looking at 2 ?",
        "Why would 0 leave before 1 ?",
        "What makes 1 so angry ?",
    ],
    "activity": [
        "What is 1 doing ?",
        "What are 0 and 2 looking at ?",
        "Who is 0 looking at ?",
        "What event is this ?",
        "What is 1 doing near 2 ?",
        "Is it raining ?",
    ],
    "temporal": [
        "What happened before 1 sat down ?",
        "What will 0 do next ?",
        "What is 2 going to do with the 3 ?",
        "What did 0 do after 1 left ?",
    ],
    "mental": ["How is 1 feeling ?", "What is 0 thinking about ?", "Does 0 love 1 ?", "Is 2 HAPPY ?"],
    "role": [
        "What is the relation between 1 and 2 ?",
        "What are their occupations ?",
        "What is 0 ' s job ?",
        "Who is 3 ?",
        "Do 0 and 1 know each other ?",
    ],
    "scene": ["Where are they ?", "What is near 1 ?", "What place is this ?", "What time of day is it ?"],
    "hypothetical": [
        "What would happen if 1 fell ?",
        "What could 0 use to get up ?",
        "If 1 turns around , who sees him ?",
        "What might 1 say ?",
    ],
}
LABELLED = [(category, text) for category, texts in QUESTIONS.items() for text in texts]


def as_words(text: str) -> tuple:
    return tuple((int(w),) if w.isdigit() else w for w in text.split())


@pytest.mark.parametrize(("category", "text"), LABELLED)
def test_categories(category, text):
    assert question_category(as_words(text)) == category
    assert question_category(as_words(text.upper())) == category


def test_there_are_seven_categories():
    assert sorted(CATEGORIES) == sorted(QUESTIONS)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), st.tuples(st.integers(0, 9))), max_size=8).map(tuple))
def test_every_question_has_one_category_whatever_its_tags(question):
    category = question_category(question)
    assert category in CATEGORIES
    other = tuple((0, 1) if not isinstance(w, str) else w for w in question)
    assert question_category(other) == category


def test_a_mark_does_not_reach_over_a_tag():
    assert question_category(("Is", "0", "about", "to")) == "temporal"
    assert question_category(("What", "about", (1,), "to")) == "activity"
    assert question_category(("A", "wherewithal", "whyever")) == "activity"


def test_groups():
    texts = [("a", as_words("Why is 1 here ?")), ("b", as_words("Where is 1 ?"))]
    vcr = [VcrRecord(i, Path("i"), Path("m"), ("person",) * 5, t, (), (), 0, 0, "") for i, t in texts]
    assert vcr_groups(vcr) == {"a": "explanation", "b": "scene"}
    pairs = [SnliVeRecord(f"p{k}", "1", Path("i"), "h", k, "Flikr30kID", "") for k in range(3)]
    assert snli_ve_groups(pairs) == {"p0": "contradiction", "p1": "entailment", "p2": "neutral"}
    questions = [VqaRecord("7", 1, Path("i"), "q", (), None, None, "")]
    assert vqa_groups(questions) == {"7": "all"}
    assert set(snli_ve_groups(pairs).values()) == {*GROUPS["snli_ve"]} and GROUPS["vqa"] == ("all",)


def dataset(sizes: dict[str, int]) -> dict[str, str]:
    return {f"train-{g}-{k}": g for g, n in sizes.items() for k in range(n)}


def test_full():
    groups = dataset({"a": 3, "b": 2})
    found = select(groups, protocol="full", seed=5)
    assert found.labelled == tuple(sorted(groups)) and found.unlabelled == ()
    assert found.available == {"a": 3, "b": 2}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(6, 30), min_size=1),
    st.integers(1, 6),
    st.integers(-5, 5),
    st.randoms(use_true_random=False),
)
def test_draws(sizes, shots, seed, rng):
    groups = dataset(sizes)
    found = select(groups, protocol="low_shot", shots=shots, seed=seed)
    drawn = [groups[i] for i in found.labelled]
    assert {g: drawn.count(g) for g in sizes} == dict.fromkeys(sizes, shots)
    assert len(set(found.labelled)) == len(found.labelled) and found.unlabelled == ()
    assert found.available == sizes
    # The order of the records does not matter.
    shuffled = list(groups.items())
    rng.shuffle(shuffled)
    assert select(dict(shuffled), protocol="low_shot", shots=shots, seed=seed) == found
    # Fewer shots are a part of more.
    fewer = select(groups, protocol="low_shot", shots=max(1, shots - 1), seed=seed)
    assert set(fewer.labelled) <= set(found.labelled)
    # Semi-supervised has the same labels, and everything else without.
    semi = select(groups, protocol="semi_supervised", shots=shots, seed=seed)
    assert semi.labelled == found.labelled
    assert set(semi.unlabelled) == groups.keys() - set(semi.labelled)


def test_records_of_other_groups_do_not_change_a_draw():
    small = select(dataset({"a": 50}), protocol="low_shot", shots=5)
    large = select(dataset({"a": 50, "b": 9}), protocol="low_shot", shots=5)
    assert set(small.labelled) <= set(large.labelled)


def test_seeds_draw_differently_and_evenly():
    groups = dataset({"a": 100})
    draws = [set(select(groups, protocol="low_shot", shots=20, seed=s).labelled) for s in range(200)]
    assert len({frozenset(d) for d in draws}) == 200
    # Each id is drawn 40 times of 200 on average, binomially (deviation 5.7): none strays by five of those.
    counts = [sum(i in d for d in draws) for i in groups]
    assert min(counts) > 40 - 5 * 5.7 and max(counts) < 40 + 5 * 5.7


def test_the_draw_stays_what_it_was():
    """A run that goes on after an update must get the same examples; these by sha256sum in a shell."""
    found = select(dataset({"a": 10, "b": 10}), protocol="low_shot", shots=2, seed=1)
    assert found.labelled == ("train-a-0", "train-a-9", "train-b-4", "train-b-9")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"protocol": "few_shot", "shots": 1}, "it can be full, low_shot, semi_supervised"),
        ({"protocol": "low_shot"}, "shots=0 with protocol 'low_shot'"),
        ({"protocol": "low_shot", "shots": -1}, "shots=-1"),
        ({"protocol": "full", "shots": 3}, "shots=3 with protocol 'full'"),
        ({"protocol": "low_shot", "shots": 4}, r"only \{'b': 3\}"),
    ],
)
def test_bad_arguments(arguments, part):
    with pytest.raises(ValueError, match=part):
        select(dataset({"a": 5, "b": 3}), **arguments)


@pytest.mark.parametrize("protocol", ["low_shot", "semi_supervised"])
def test_a_group_without_examples(protocol):
    groups = dataset({"role": 5, "scene": 2})
    with pytest.raises(ValueError, match=r"only \{.*'explanation': 0, .*'temporal': 0\}"):
        select(groups, protocol=protocol, shots=2, among=GROUPS["vcr"])
    whole = groups | dataset(dict.fromkeys(CATEGORIES, 2))
    assert len(select(whole, protocol=protocol, shots=2, among=GROUPS["vcr"]).labelled) == 14
    assert len(select(groups, protocol="full", among=GROUPS["vcr"]).labelled) == 7


def test_no_examples():
    with pytest.raises(ValueError, match="no training examples"):
        select({}, protocol="full")


def test_lists_beside_a_run(tmp_path):
    path = tmp_path / "training_examples.json"
    groups = dataset({"a": 9, "b": 9})
    found = select(groups, protocol="semi_supervised", shots=3, seed=2)
    write_selection(found, path)
    assert read_selection(path) == found
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing partial stays
    before = path.read_bytes()
    shuffled = list(groups.items())
    random.Random(0).shuffle(shuffled)
    write_selection(select(dict(shuffled), protocol="semi_supervised", shots=3, seed=2), path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="lists other training examples"):
        write_selection(dataclasses.replace(found, seed=3), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"labelled": None}, "'labelled'"),
        ({"unlabelled": [1]}, "'unlabelled' should list ids as texts"),
        ({"seed": "1"}, "'seed' should be a int"),
    ],
)
def test_damaged_lists(tmp_path, change, part):
    path = tmp_path / "x.json"
    write_selection(select(dataset({"a": 2}), protocol="full"), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=part):
        read_selection(path)
