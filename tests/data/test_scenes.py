"""Still scenes: what is drawn, what is said of it, and that splits of any two trees share nothing."""

import collections
import dataclasses
import random

import numpy as np
import pytest

from clipdistill_jax.data.shapes import WORLDS, WRITERS
from clipdistill_jax.data.shapes.painting import paint
from clipdistill_jax.data.shapes.sayings import ACTIONS, ATTRIBUTES, captions, predicate
from clipdistill_jax.data.shapes.scenes import (
    DOMAINS,
    SHIRTS,
    SPLITS,
    Item,
    Person,
    SceneConfig,
    Still,
    alternatives,
    draw_still,
)
from clipdistill_jax.data.shapes.stills_tree import draw_stills
from clipdistill_jax.data.shapes.world import COLOURS

CONFIG = SceneConfig(train=150, validation=40, test=40)
COOK = Person("cook", "orange", "hold", "left", Item("red", "ball"))
NOBODY = Person("person", "black", "lift", "right", Item("blue", "box"))
STILL = Still("beach", (COOK, NOBODY), (), 7)


@pytest.fixture(scope="module")
def drawn():
    return draw_stills(CONFIG, "some")


def test_splits_share_no_scene_with_those_of_any_other_tree(drawn):
    other = draw_stills(dataclasses.replace(CONFIG, seed=5), "other")
    keys = {split: {s.key for tree in (drawn, other) for s in tree[split]} for split in SPLITS}
    assert not keys["train"] & keys["validation"] | keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    for split in ("validation", "test"):
        assert len({s.key for s in drawn[split]}) == len(drawn[split]) == 40
    assert len(drawn["train"]) == 150
    assert not {s.seed for s in drawn["train"]} & {s.seed for s in other["train"]}


def test_scenes_are_a_function_of_config_and_format(drawn):
    assert draw_stills(CONFIG, "some") == drawn
    assert draw_stills(CONFIG, "other") != drawn
    assert draw_stills(dataclasses.replace(CONFIG, seed=1), "some") != drawn
    a, b = (paint(drawn["train"][0], CONFIG) for _ in range(2))
    np.testing.assert_array_equal(a[0], b[0])


def test_every_value_occurs_and_objects_number_two_to_four(drawn):
    counts = {name: collections.Counter() for name in DOMAINS}
    for still in drawn["train"]:
        assert 2 <= len(still.objects) <= 4 and 1 <= len(still.people) <= 2
        assert len({(i.colour, i.item) for i in still.items}) == len(still.items)
        assert len({p.shirt for p in still.people}) == len(still.people)
        spots = [p.spot for p in still.people] + [i.spot for i in still.lying]
        assert len(set(spots)) == len(spots)
        for person in still.people:
            for name, value in still.facts(person).items():
                counts[name][value] += 1
    assert all(set(values) <= counts[name].keys() for name, values in DOMAINS.items())
    hatless = counts["role"]["person"] / counts["role"].total()
    assert abs(hatless - 0.25) < 4 * (0.25 * 0.75 / counts["role"].total()) ** 0.5


def test_pixels_show_what_the_scene_says(drawn):
    """Found by colour alone, things and shirts lie in their boxes, which lie as verbs and spots say."""
    config = dataclasses.replace(CONFIG, noise=0)
    for still in drawn["validation"]:
        image, boxes = paint(still, config)
        assert image.shape == (64, 64, 3)
        box = dict(zip(still.objects, boxes, strict=True))
        assert (boxes >= 0).all() and (boxes <= 64).all() and (boxes[:, 2:] - boxes[:, :2] >= 5).all()
        for item in still.items:
            near = np.abs(image.astype(int) - COLOURS[item.colour]).max(-1) <= 14
            x1, y1, x2, y2 = box[item].astype(int)
            # A triangle fills half of its box, a circle pi/4 of it, less soft edges.
            assert near[y1:y2, x1:x2].mean() > (0.3 if item.item == "cone" else 0.5)
            sides = {"ball": (2, 2), "box": (1.7, 1.7), "cone": (1.84, 1.6)}[item.item]  # in radii
            cut = 4 * (x1 == 0 or x2 == 64)  # what the edge of the image takes off
            assert abs(x2 - x1 - sides[0] * 0.08 * 64) <= 2 + cut
            assert abs(y2 - y1 - sides[1] * 0.08 * 64) <= 2
        for person in still.people:
            x1, y1, x2, y2 = box[person]
            own = box[person.own]
            x, y = (own[0] + own[2]) / 2, (own[1] + own[3]) / 2
            if person.verb == "lift":
                assert y < y1 and x1 < x < x2
            else:
                assert (y > 0.8 * 64) == (person.verb == "point")
            shirt = {"left": 0.23, "middle": 0.5, "right": 0.77}[person.spot] * 64
            assert x1 < shirt < x2
            seen = image[int(0.7 * 64), int(shirt)].astype(int)
            nearest = min(SHIRTS, key=lambda name: np.abs(seen - SHIRTS[name]).sum())
            assert nearest == person.shirt


def test_claims_by_hand():
    true = [
        {"verb": "hold", "colour": "red"},
        {"role": "cook", "shirt": "orange"},
        {"place": "beach", "spot": "right"},
        {"shirt": "orange", "colour": "blue", "item": "box"},  # without a verb: near it
    ]
    false = [
        {"verb": "hold", "item": "box"},
        {"verb": "hold", "colour": "blue", "item": "box", "shirt": "orange"},
        {"role": "cook", "shirt": "black"},
        {"role": "guard"},
        {"place": "beach", "spot": "middle"},
        {"shirt": "orange", "colour": "red", "item": "box"},
    ]
    assert [STILL.is_true(c) for c in true] == [True] * 4
    assert [STILL.is_true(c) for c in false] == [False] * 6


def test_alternatives_are_false_and_their_words_say_nothing(drawn):
    rng = random.Random(0)
    for still in drawn["train"]:
        facts = still.facts(still.people[0])
        claim = {name: facts[name] for name in ("verb", "colour", "item")}
        four = alternatives(still, claim, (("verb", "colour"), ("colour", "item")), rng)
        assert four[0] == claim and [still.is_true(c) for c in four] == [True, False, False, False]
        for name in claim:
            assert sorted(collections.Counter(c[name] for c in four).values()) in ([2, 2], [4])
    with pytest.raises(ValueError, match="each change is true"):
        taken = [
            Person("cook", "orange", "hold", spot, Item("red", "ball"))
            for spot in ("left", "middle", "right")
        ]
        alternatives(
            Still("beach", tuple(taken), (), 0), {"shirt": "orange", "spot": "left"}, (("spot", "spot"),), rng
        )


def test_sentences(drawn):
    facts, rng = STILL.facts(COOK), random.Random(0)
    said = {form: predicate(form, facts, rng) for form in ATTRIBUTES}
    assert said["does"] in ("holds a red ball", "carries a red ball")
    assert said["will"] == "will throw a red ball" and said["looks"] == "is a cook in orange"
    assert said["where"] == "stands on the left at the beach"
    assert said["hat"] == "wears a tall white hat near a red ball"
    assert said["ground"] == "stands on yellow sand in orange"
    assert predicate("feels", STILL.facts(NOBODY), rng) == "is proud of a blue box"
    told = [captions(s, 1, partial=False)[0] for s in drawn["test"]]
    assert len(set(told)) == len(told)
    assert captions(STILL, 3, True) == captions(STILL, 3, True)
    words = {w for s in drawn["train"] for c in captions(s, 3, True) for w in c.split()}
    phrases = {w for form in ACTIONS.values() for said in form.values() for p in said for w in p.split()}
    assert phrases <= words and set(COLOURS) | set(SHIRTS) <= words and len(words) < 110


@pytest.mark.parametrize(
    "bad",
    [
        {"train": 0},
        {"questions": 0},
        {"shortcut_rate": 1.5},
        {"annotator_noise": -0.1},
        {"size": 16},
        {"region_width": 50},
        {"region_width": 0},
        {"region_width": -3},
    ],
)
def test_sizes_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SceneConfig(**bad)


def test_no_scene_fits():
    with pytest.raises(ValueError, match="no further scene of the test split"):
        draw_still(random.Random(0), "test", set(), lambda still: False)


def test_each_format_has_a_writer_and_its_config():
    assert WORLDS.keys() == WRITERS.keys()
    assert {name for name, world in WORLDS.items() if world is SceneConfig} == {
        "karpathy",
        "vcr",
        "snli_ve",
        "vqa",
    }
