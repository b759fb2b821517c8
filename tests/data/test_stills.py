"""Trees of stills, read back by the readers of real data: questions, shortcuts, boxes and region features."""

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.data.formats import snli_ve, vcr, vqa
from clipdistill_jax.data.protocol import CATEGORIES, question_category
from clipdistill_jax.data.regions.uniter import NpzFolder, coco_name, flickr_name, vcr_names
from clipdistill_jax.data.shapes import WRITERS, SceneConfig
from clipdistill_jax.data.shapes.sayings import ACTIONS, PLACE, SPOT
from clipdistill_jax.data.shapes.scenes import COLOURS, ITEMS, ROLES, SHIRTS
from clipdistill_jax.data.shapes.snli_ve import ENDINGS, write_snli_ve
from clipdistill_jax.data.shapes.stills_tree import draw_stills
from clipdistill_jax.data.shapes.vcr import write_vcr
from clipdistill_jax.data.shapes.vqa import write_vqa
from clipdistill_jax.data.vocabulary import normalize_answer

SIZES = dict(train=70, validation=14, test=7, size=32, region_width=27, shortcut_rate=0.7)
VCR = SceneConfig(**SIZES, questions=6)
SNLI_VE = SceneConfig(**SIZES, questions=3)
VQA = SceneConfig(**SIZES, questions=3, annotator_noise=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stills")


@pytest.fixture(scope="module")
def vcr_tree(folder):
    return write_vcr(folder / "vcr", VCR, workers=1)


@pytest.fixture(scope="module")
def snli_ve_tree(folder):
    return write_snli_ve(folder / "snli_ve", SNLI_VE, workers=1)


@pytest.fixture(scope="module")
def vqa_tree(folder):
    return write_vqa(folder / "vqa", VQA, workers=1)


def check_rate(hits, rate):
    """Within four standard deviations of a binomial: wrong once in 16,000."""
    hits = np.asarray(hits)
    assert abs(hits.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(hits)), (hits.mean(), len(hits))


def image_hashes(paths):
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("tree,reader", [("vcr_tree", vcr), ("snli_ve_tree", snli_ve), ("vqa_tree", vqa)])
def test_splits(request, tree, reader):
    found = reader.read(request.getfixturevalue(tree))
    questions = {"vcr_tree": 6}.get(tree, 3)
    counts = {split: len(records) for split, records in found.splits.items()}
    assert counts == {split: SIZES[split] * questions for split in counts} and found.problems == ()
    hashes = {split: image_hashes({r.image for r in records}) for split, records in found.splits.items()}
    assert {split: len(h) for split, h in hashes.items()} == {split: SIZES[split] for split in counts}
    assert len(set.union(*hashes.values())) == sum(SIZES[split] for split in counts)


def test_the_seven_categories_take_turns(vcr_tree):
    for records in vcr.read(vcr_tree).splits.values():
        counts = Counter(question_category(record.question) for record in records)
        assert counts == dict.fromkeys(CATEGORIES, len(records) // 7)


def test_vcr_labels(vcr_tree):
    splits = vcr.read(vcr_tree).splits
    for name in ("answer_label", "rationale_label"):
        labels = [getattr(record, name) for record in splits["train"]]
        for label in range(4):
            check_rate([found == label for found in labels], 0.25)
        assert all(getattr(record, name) is None for record in splits["test"])
    assert "label" not in (vcr_tree / "test.jsonl").read_text()


def said(words):
    return " ".join(word for word in words if isinstance(word, str))


def test_vcr_words_tell_nothing_but_the_shortcut(vcr_tree):
    right, wrong = [], []
    for record in vcr.read(vcr_tree).splits["train"]:
        tags = {i for item in record.question if not isinstance(item, str) for i in item}
        assert tags and all(record.objects[i] == "person" for i in tags)
        for choices, label in (
            (record.answers, record.answer_label),
            (record.rationales, record.rationale_label),
        ):
            # Every word of meaning beside the subject stands in all four choices or in two of them.
            small = {"in", "on", "at"}  # "in the middle at the beach", "in the middle in the snow"
            counts = Counter(word for words in choices for word in set(words[1:]) - small)
            assert set(counts.values()) <= {2, 4}
            assert len({said(words[1:]) for words in choices}) == 4
            for k, words in enumerate(choices):
                shared = not isinstance(words[0], str)
                assert shared and set(words[0]) <= tags or words[0] == "someone"
                (right if k == label else wrong).append(shared)
    check_rate(right, 0.7)
    check_rate(wrong, 0.3)


def test_vcr_answers_are_true_of_somebody_and_the_others_of_nobody(vcr_tree):
    """Read from the words, by other means than those that chose them."""
    drawn = draw_stills(VCR, "vcr", lambda still: any(p.role != "person" for p in still.people))
    verbs = {
        phrase: verb for form in ACTIONS.values() for verb, phrases in form.items() for phrase in phrases
    }

    def seen(still, text):
        words = text.split()
        verb = next((verb for phrase, verb in verbs.items() if text.startswith(phrase)), None)
        return [
            person
            for person in still.people
            if (verb is None or person.verb == verb)
            and (verb is None or {person.own.colour, person.own.item} <= set(words))
            and all(word == person.shirt for word in words if word in SHIRTS and verb is None)
            and all(word == person.role for word in words if word in ROLES)
            and all(still.place == place for place, phrase in PLACE.items() if phrase in text)
            and all(person.spot == spot for spot, phrase in SPOT.items() if phrase in text)
        ]

    records = vcr.read(vcr_tree).splits["train"]
    for k, record in enumerate(records):
        still = drawn["train"][k // VCR.questions]
        for choice, words in enumerate(record.answers):
            found = seen(still, said(words[1:]))
            assert bool(found) == (choice == record.answer_label), (record, still)
        (asked,) = [item for item in record.question if not isinstance(item, str)]
        right = record.answers[record.answer_label]
        found = seen(still, said(right[1:]))
        assert any(still.objects.index(person) in asked for person in found)
        if right[0] != "someone":
            assert any((still.objects.index(person),) == right[0] for person in found)


def test_vcr_rationales_go_with_the_answer(vcr_tree):
    """Of the four, two name what the right answer names."""
    for record in vcr.read(vcr_tree).splits["train"]:
        answer = said(record.answers[record.answer_label]).split()
        things = {word for word in answer if word in COLOURS or word in ITEMS}
        if things:
            right = set(said(record.rationales[record.rationale_label]).split())
            assert things <= right
            assert sum(things <= set(said(words).split()) for words in record.rationales) == 2


def test_vcr_boxes_and_regions(vcr_tree):
    regions = NpzFolder(vcr_tree / "regions", width=27)
    expected, agree, counts = set(), [], set()
    for split, records in vcr.read(vcr_tree).splits.items():
        for record in records[:: VCR.questions]:
            truth, found = vcr_names(split, record.image)
            expected |= {truth, found}
            boxes, size = vcr.read_boxes(record)
            given = regions[truth].scaled(size)
            # Half precision keeps 11 bits: 32 pixels to 1/64.
            np.testing.assert_allclose(given.boxes, boxes, atol=32 / 2**11)
            pixels = np.asarray(Image.open(record.image), np.float32)
            means = [pixels[int(y1) : int(y2), int(x1) : int(x2)].mean((0, 1)) for x1, y1, x2, y2 in boxes]
            features = given.features.reshape(-1, 3, 3, 3).mean((1, 2))
            # Noise of 0.1 over 9 cells: 0.033; the file's JPEG and cells of unequal pixels add little.
            assert np.abs(features - (np.array(means) / 127.5 - 1)).max() < 0.2
            classes = ["person", *ITEMS]
            guess = given.class_probs.argmax(1) - 1
            agree += [k >= 0 and classes[k] == name for k, name in zip(guess, record.objects, strict=True)]
            np.testing.assert_allclose(given.class_probs.sum(1), 1, atol=5e-3)
            detected = regions[found]
            assert (np.diff(detected.conf) <= 0).all()
            counts.add(len(detected) - len(boxes))
    assert set(regions) == expected
    assert 0.8 < np.mean(agree) < 1 and min(counts) < 1 < max(counts)


def test_snli_ve(snli_ve_tree):
    splits = snli_ve.read(snli_ve_tree).splits
    regions = NpzFolder(snli_ve_tree / "regions", width=27)
    shortcut, without = [], []
    for records in splits.values():
        assert Counter(r.label for r in records) == dict.fromkeys(range(3), len(records) // 3)
        assert {flickr_name(r.image_id) for r in records} <= set(regions)
        for record in records:
            text = record.hypothesis.removesuffix(" .")
            (ending,) = [label for label, words in ENDINGS.items() if text.endswith(words)]
            shortcut.append(ending == snli_ve.LABELS[record.label])
            without.append((record.label, text.removesuffix(ENDINGS[ending]).split()))
    check_rate(shortcut, 0.7)
    # The rest of the words leaves the label open: no word is far more frequent with one of the labels.
    for word in (*ROLES, *COLOURS, *ITEMS):
        labels = [label for label, words in without if word in words]
        for label in range(3):
            check_rate([found == label for found in labels], 1 / 3)


def test_snli_ve_labels_by_hand(snli_ve_tree):
    drawn = draw_stills(
        SNLI_VE, "snli_ve", lambda s: sorted(p.role == "person" for p in s.people) == [False, True]
    )
    verbs = {phrase: verb for verb, phrases in ACTIONS["does"].items() for phrase in phrases}
    for k, record in enumerate(snli_ve.read(snli_ve_tree).splits["train"]):
        still, text = drawn["train"][k // 3], record.hypothesis
        (verb,) = [verb for phrase, verb in verbs.items() if phrase in text]
        fitting = [
            p.role
            for p in still.people
            if p.verb == verb
            and f"a {p.own.colour} {p.own.item} " in text
            and not any(f"in {shirt} " in text for shirt in SHIRTS if shirt != p.shirt)
            and not any(phrase in text for spot, phrase in SPOT.items() if spot != p.spot)
        ]
        role = text.split()[1]
        expected = "entailment" if role in fitting else "neutral" if "person" in fitting else "contradiction"
        assert snli_ve.LABELS[record.label] == expected, (text, still)


def test_vqa(vqa_tree):
    splits = vqa.read(vqa_tree).splits
    regions = NpzFolder(vqa_tree / "regions", width=27)
    subsets = {"train": "train2014", "validation": "val2014", "test": "test2015"}
    for split, records in splits.items():
        assert {coco_name(subsets[split], r.image_id) for r in records} <= set(regions)
    assert all(record.answers == () for record in splits["test"])
    assert not list(vqa_tree.glob("*test*annotations*"))
    records = splits["train"]
    assert Counter(r.answer_type for r in records) == dict.fromkeys(("yes/no", "number", "other"), 70)
    agree = [normalize_answer(a) == r.top_answer for r in records for a in r.answers]
    check_rate(agree, 0.9)
    assert len({a for r in records for a in r.answers}) > len({r.top_answer for r in records})  # spellings
    check_rate([r.top_answer == "yes" for r in records if r.answer_type == "yes/no"], 0.7)
    favourites = {
        "how many people are there ?": "1",
        "how many things are there ?": "2",
        "where is this ?": "beach",
    }
    favourites |= {f"what color is the {item} ?": list(COLOURS)[k] for k, item in enumerate(ITEMS)}
    favourites |= {f"who is in {shirt} ?": ROLES[k % 3] for k, shirt in enumerate(SHIRTS)}
    favourites |= {
        f"what does someone {verb} ?": i for verb, i in zip(("hold", "point at", "lift"), ITEMS, strict=True)
    }
    opened = [r for r in records if r.answer_type != "yes/no"]
    assert {r.question for r in opened} == favourites.keys()
    check_rate([r.top_answer == favourites[r.question] for r in opened], 0.7)


def test_a_vqa_image_has_at_most_three_questions(tmp_path):
    with pytest.raises(ValueError, match="questions=4"):
        write_vqa(tmp_path, SceneConfig(questions=4))


@pytest.mark.parametrize("name", ["vcr", "snli_ve", "vqa", "karpathy"])
def test_written_once_and_always_the_same(tmp_path, name):
    config = SceneConfig(train=3, validation=2, test=2, size=32, region_width=12)
    first, again = (WRITERS[name](tmp_path / part, config, 1) for part in ("first", "again"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for path in files:
        assert (first / path).read_bytes() == (again / path).read_bytes(), path
    settings = json.loads((first / "world.json").read_text())
    assert settings == {"format": name, **dataclasses.asdict(config)}
    before = {path: (first / path).stat().st_mtime_ns for path in files}
    assert WRITERS[name](first, config) == first
    assert before == {path: (first / path).stat().st_mtime_ns for path in files}
    with pytest.raises(ValueError, match="world of other settings"):
        WRITERS[name](first, dataclasses.replace(config, seed=1))
