"""Batches of questions as pure functions of the step: contents, order, hosts, protocols, evaluation."""

import itertools
import json

import numpy as np
import pytest

from clipdistill_jax.data.importance import word_importance
from clipdistill_jax.data.protocol import Selection, select
from clipdistill_jax.data.questions.items import KINDS
from clipdistill_jax.data.questions.layout import StudentText
from clipdistill_jax.data.questions.pipeline import QuestionData
from clipdistill_jax.data.questions.prepare import prepare_questions
from clipdistill_jax.data.words import split_words
from tests.data.questions.trees import CLASSES, SIZES, VCR, WIDTH, colour, region_arrays
from tests.data.regions.region_cases import b64

pytest.importorskip("tensorflow", reason="the pipeline runs on tf.data")

EVERYTHING = {"images": True, "clip": True, "class_probs": True}
CHOICES = {"vcr": 4, "snli_ve": 1, "vqa": 1}
FIRST_IMAGE = {"vcr": 0, "snli_ve": 100, "vqa": 10}  # the number that a tree gives its first training image


@pytest.fixture(scope="module")
def opened(prepared, bert, clip):
    student = StudentText("uniter", bert)
    options = {"max_tokens": 64, "clip_tokens": 40, "image_size": 24, "buckets": 3, "num_threads": 2}
    return {name: QuestionData(d, student=student, clip=clip, **options) for name, d in prepared.items()}


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("name", CHOICES)
def test_contract(opened, name):
    data = opened[name]
    (batch,) = take(data.batches(batch_size=6, **EVERYTHING), 1)
    (t, n), k = batch["tokens"].shape[2:] + batch["region_mask"].shape[1:], CHOICES[name]
    assert (t, n) in data.shapes("train") and len(data.shapes("train")) <= 3
    expected = {
        **dict.fromkeys(("tokens", "types", "word_ids", "token_regions"), ((6, k, t), "int32")),
        "token_mask": ((6, k, t), "bool"),
        "regions": ((6, n, WIDTH), "float32"),
        "region_boxes": ((6, n, 4), "float32"),
        "region_mask": ((6, n), "bool"),
        "region_classes": ((6, n), "int32"),
        "class_probs": ((6, n, CLASSES), "float32"),
        "image_size": ((6, 2), "float32"),
        "image": ((6, 24, 24, 3), "uint8"),
        **dict.fromkeys(("clip_tokens", "clip_word_ids"), ((6, k, 40), "int32")),
        "clip_token_mask": ((6, k, 40), "bool"),
        "importance": ((6, k, 40), "float32"),
        **dict.fromkeys(("label", "example_id", "image_id"), ((6,), "int32")),
        **dict.fromkeys(("labelled", "mask"), ((6,), "bool")),
    }
    if name == "vqa":
        expected["targets"] = ((6, 2), "float32")
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == expected
    (plain,) = take(data.batches(batch_size=6), 1)
    on_demand = ("image", "class_probs", "clip_tokens", "clip_word_ids", "clip_token_mask", "importance")
    assert same(plain, {key: v for key, v in batch.items() if key not in on_demand})
    assert batch["mask"].all() and batch["labelled"].all()
    assert data.splits == ("train", "validation", "test")


@pytest.mark.parametrize("name", CHOICES)
def test_rows_hold_what_their_ids_say(opened, name):
    """Against the arrays that the trees were written from, by the image's number."""
    data = opened[name]
    told = data.describe("train")
    loaded = data.split("train")
    for batch in take(data.batches(batch_size=6, **EVERYTHING), 4):
        for row, item in enumerate(batch["example_id"].tolist()):
            image = int(batch["image_id"][row])
            number = image + FIRST_IMAGE[name]
            objects = 3 if name == "vcr" else 0
            found = {"vcr": image + 1, "snli_ve": image + 2, "vqa": 3 + 2 * image % 3}[name]
            found = min(found, 5 - objects)
            seed = number % 90 if name == "snli_ve" else number
            detected = region_arrays(seed, {"vcr": image + 1}.get(name, found), False)
            parts = [region_arrays(seed, 3, True)] if objects else []
            parts.append({key: value[:found] for key, value in detected.items()})
            stored = {key: np.concatenate([p[key] for p in parts]).astype(np.float32) for key in parts[0]}
            count = 1 + objects + found
            assert batch["region_mask"][row].tolist() == [k < count for k in range(batch["regions"].shape[1])]
            assert np.array_equal(batch["regions"][row, 1:count], stored["features"])
            # Region 0 is the whole image, with the mean of the features, in half precision.
            mean = stored["features"].mean(0)
            np.testing.assert_allclose(batch["regions"][row, 0], mean, rtol=2**-10)
            assert batch["region_boxes"][row, 0].tolist() == [0, 0, 1, 1]
            assert np.array_equal(batch["region_boxes"][row, 1:count], stored["norm_bb"][:, :4])
            assert np.array_equal(batch["class_probs"][row, 1:count], stored["soft_labels"])
            classes = [-1] + [2, 2, 1] * (objects > 0) + [-1] * found  # car 1, person 2
            rest = batch["regions"].shape[1] - count
            assert batch["region_classes"][row].tolist() == classes + [-1] * rest
            for key in ("regions", "region_boxes", "class_probs"):
                assert not batch[key][row, count:].any()
            assert batch["image_size"][row].tolist() == [1, 1]
            assert np.abs(batch["image"][row].astype(int) - colour(number)).max() <= 6  # of JPEG
            assert batch["label"][row] == told["labels"][item]
            if name == "vqa":
                assert batch["targets"][row].tolist() == pytest.approx([0.9, 1] if item % 2 else [1, 0.9])
            # The importance is that of the text read out, which here has each tag's objects with "and".
            for choice in range(CHOICES[name]):
                text = [*told["contexts"][item], told["choices"][item][choice]]
                (scores,), (words,) = word_importance([" ".join(text)]), split_words([" ".join(text)])
                scores = scores[[w != "and" for w in words]]
                slots = batch["importance"][row, choice]
                np.testing.assert_allclose(slots[: len(scores)], scores, rtol=1e-6)
                assert not slots[len(scores) :].any()
                assert batch["word_ids"][row, choice].max() == len(scores) - 1
                assert batch["clip_word_ids"][row, choice].max() == len(scores) - 1
    assert loaded.lengths.shape == (len(loaded), 2)


def test_starting_at_a_step_is_skipping_to_it(opened):
    options = {"batch_size": 5, "seed": 7, **EVERYTHING}
    from_zero = take(opened["vcr"].batches(0, **options), 12)
    for start in (5, 11):
        again = take(opened["vcr"].batches(start, **options), 12 - start)
        assert all(same(a, b) for a, b in zip(from_zero[start:], again, strict=True))
    (other,) = take(opened["vcr"].batches(0, **(options | {"seed": 8})), 1)
    assert not same(other, from_zero[0])
    (far,) = take(opened["vcr"].batches(2_000_000, **options), 1)
    assert far["mask"].all()
    shapes = {b["tokens"].shape[2:] + b["region_mask"].shape[1:] for b in from_zero}
    assert len(shapes) <= 3


def test_hosts_take_parts_of_the_same_batches(opened):
    data, options = opened["vcr"], {"batch_size": 4, "seed": 3, **EVERYTHING}
    whole = take(data.batches(2, **options), 4)
    parts = [take(data.batches(2, process_index=p, process_count=2, **options), 4) for p in range(2)]
    for step, expected in enumerate(whole):
        assert same({k: np.concatenate([p[step][k] for p in parts]) for k in expected}, expected)


@pytest.mark.parametrize(("name", "split"), [("vcr", "validation"), ("vcr", "test"), ("vqa", "test")])
def test_evaluation_has_every_item_once(opened, name, split):
    data = opened[name]
    batches = list(data.eval_batches(split, batch_size=8, **EVERYTHING))
    ids = np.concatenate([b["example_id"] for b in batches])
    mask = np.concatenate([b["mask"] for b in batches])
    assert sorted(ids[mask].tolist()) == list(range(data.num_items(split)))
    for key in ("example_id", "image_id", "label"):
        assert (np.concatenate([b[key] for b in batches])[~mask] == -1).all()
    labelled = np.concatenate([b["labelled"] for b in batches])
    assert np.array_equal(labelled, mask if split != "test" else np.zeros(len(mask), bool))
    labels = np.concatenate([b["label"] for b in batches])
    assert np.array_equal(labels[mask], data.describe(split)["labels"][ids[mask]])
    if name == "vqa":
        assert not np.concatenate([b["targets"] for b in batches]).any()
    assert all(b["token_mask"].any(-1).all() and b["region_mask"].any(-1).all() for b in batches)
    parts = [
        list(data.eval_batches(split, batch_size=8, process_index=p, process_count=2, **EVERYTHING))
        for p in range(2)
    ]
    assert {len(p) for p in parts} == {len(batches)}
    for step, expected in enumerate(batches):
        assert same({k: np.concatenate([p[step][k] for p in parts]) for k in expected}, expected)
    shapes = {b["tokens"].shape[2:] + b["region_mask"].shape[1:] for b in batches}
    assert shapes <= set(data.shapes(split))


def test_an_evaluation_counts_open_answers_as_the_official_program(opened):
    soft = np.array([[1, 0.9], [0.9, 1], [1, 0.9], [0, 1]], np.float32)
    assert np.array_equal(opened["vqa"].split("validation").targets(np.arange(4), 2), soft)
    (batch,) = opened["vqa"].eval_batches("validation", batch_size=4)
    official = batch["targets"][np.argsort(batch["example_id"])]
    assert np.array_equal(official, [*soft[:3], [0, 0]]) and batch["labelled"].all()


def test_low_shot_feeds_only_what_was_drawn(opened):
    data = opened["vcr"]
    groups = data.groups("train")
    assert len(groups) == VCR["train"] and set(groups.values()) == {"explanation", "scene"}
    selection = select(groups, protocol="low_shot", shots=2, seed=1)
    batches = take(data.batches(batch_size=4, selection=selection), 6)
    seen = np.concatenate([b["example_id"] for b in batches])
    records = np.array(data.split("train").record_ids)
    drawn = np.flatnonzero(np.isin(records, selection.labelled))
    assert len(drawn) == 2 * 2 * 2 and sorted(seen.tolist()) == sorted([*drawn.tolist()] * 3)
    assert all(b["labelled"].all() and (b["label"] >= 0).all() for b in batches)


@pytest.mark.parametrize("name", CHOICES)
def test_semi_supervised_hides_the_other_labels(opened, name):
    """And feeds no rationales of an unlabelled question: their text has its right answer."""
    data = opened[name]
    shots = {"vcr": 2, "snli_ve": 1, "vqa": 3}[name]
    selection = select(data.groups("train"), protocol="semi_supervised", shots=shots, seed=1)
    loaded = data.split("train")
    known = np.isin(loaded.record_ids, selection.labelled)
    fed = np.flatnonzero(known | (np.array(KINDS)[loaded.kind] != "qar"))
    batches = take(data.batches(batch_size=4, selection=selection), len(fed))
    seen = np.concatenate([b["example_id"] for b in batches])
    assert sorted(seen.tolist()) == sorted([*fed.tolist()] * 4)
    labelled, label = (np.concatenate([b[k] for b in batches]) for k in ("labelled", "label"))
    assert np.array_equal(labelled, known[seen]) and 0 < labelled.mean() < 1
    assert np.array_equal(label, np.where(labelled, loaded.label[seen], -1))
    if name == "vqa":
        targets = np.concatenate([b["targets"] for b in batches])
        assert np.array_equal(targets.any(1), labelled)


def test_a_selection_of_another_dataset(opened):
    other = Selection("low_shot", 1, 0, {"all": 1}, ("train-99",), ())
    with pytest.raises(ValueError, match="1 selected records are not in the split 'train', .*'train-99'"):
        opened["vcr"].batches(batch_size=1, selection=other)


def test_parts_for_a_cache(opened):
    """The same rows as the batches have, by image and by item."""
    data = opened["vcr"]
    batches = take(data.batches(batch_size=6, **EVERYTHING), 2)
    ids = np.stack([b["image_id"] for b in batches])
    ids[1, 5] = -1
    pictures = list(data.image_batches("train", ids))
    assert np.array_equal(pictures[0]["image"], batches[0]["image"])
    assert np.array_equal(pictures[1]["image"][:5], batches[1]["image"][:5])
    assert pictures[1]["image_id"].tolist() == ids[1].tolist() and not pictures[1]["mask"][5]
    items = np.stack([b["example_id"] for b in batches])
    for texts, batch in zip(data.text_batches("train", items), batches, strict=True):
        for key in ("clip_tokens", "clip_token_mask", "clip_word_ids", "importance", "label", "example_id"):
            assert np.array_equal(texts[key], batch[key])
    with pytest.raises(ValueError, match="image ids"):
        data.image_batches("train", np.array([[99]]))


@pytest.mark.parametrize(("kind", "inset"), [("uniter", 0), ("vl_bert", 1)])
def test_box_of_the_whole_image(opened, trees, bert, tmp_path, kind, inset):
    """VL-BERT's is a pixel short, where the files say of how many; in others it ends at (1, 1)."""
    regions = tmp_path / "regions"
    regions.mkdir()
    for number in range(100, 107):
        boxes, features = np.full((2, 4), 3.0, np.float32), np.ones((2, WIDTH), np.float32)
        data = {"image_id": number, "image_w": 40, "image_h": 30, "num_boxes": 2}
        data |= {"boxes": b64(boxes), "features": b64(features)}
        (regions / f"{number}.json").write_text(json.dumps(data))
    sizes = {**SIZES, "class_probs": False, "clip_text": ""}
    folder = tmp_path / "prepared"
    prepare_questions("snli_ve", trees["snli_ve"], folder, regions=regions, region_format="vl_bert", **sizes)
    student = StudentText(kind, bert)
    (batch,) = take(QuestionData(folder, student=student).batches(batch_size=3), 1)
    assert batch["image_size"].tolist() == [[40, 30]] * 3
    assert batch["region_boxes"][0, :3].tolist() == [[0, 0, 40 - inset, 30 - inset], [3] * 4, [3] * 4]
    (batch,) = take(QuestionData(opened["snli_ve"].directory, student=student).batches(batch_size=3), 1)
    assert batch["region_boxes"][:, 0].tolist() == [[0, 0, 1, 1]] * 3


def test_kinds_lengths_and_fill(prepared, opened, bert, clip):
    only = QuestionData(prepared["vcr"], student=StudentText("vl_bert", bert), questions=("qa",), buckets=2)
    assert only.num_items("train") == 12 and set(only.describe("train")["kinds"]) == {"qa"}
    told = opened["vcr"].describe("train")
    assert told["contexts"][0] == ["Why is person near person and car ?"]
    assert told["choices"][1][2] == "person and person hurry 2" and told["images"][2] == "train@0.jpg"
    data = opened["vcr"]
    lengths, shapes = data.lengths("train"), data.shapes("train")
    real = padded = 0
    for batch in data.eval_batches("train", batch_size=1):  # every item in its own shape
        real += batch["token_mask"].sum() + 4 * batch["region_mask"].sum()
        padded += 4 * (batch["token_mask"].shape[2] + batch["region_mask"].shape[1])
        item = int(batch["example_id"][0])
        longest = [batch["token_mask"].sum(2).max(), batch["region_mask"].sum()]
        assert lengths[item].tolist() == longest
    assert data.fill("train") == pytest.approx(real / padded) and shapes[-1] == tuple(lengths.max(0))
    assert data.cut("train") == {"student": 0, "student_choice": 0, "clip": 0, "clip_choice": 0}
    short = QuestionData(
        prepared["vcr"], student=StudentText("uniter", bert), clip=clip, max_tokens=16, clip_tokens=12
    )
    assert short.cut("train")["student"] > 0 and short.cut("train")["clip"] > 0
    assert short.lengths("train")[:, 0].max() == 16
    assert short.fingerprint("train") != data.fingerprint("train")
    assert data.fingerprint("train") != data.fingerprint("test")


def test_what_was_not_prepared(prepared, opened, bert, clip, tmp_path):
    student = StudentText("uniter", bert)
    with pytest.raises(KeyError, match="train, validation, test, not 'val'"):
        opened["vcr"].batches(split="val", batch_size=4)
    with pytest.raises(FileNotFoundError, match="prepare it first"):
        QuestionData(tmp_path, student=student)
    choice = QuestionData(prepared["vcr"], student=student, clip=clip, clip_text="choice")
    with pytest.raises(FileNotFoundError, match="no importance of words"):
        choice.batches(batch_size=4, clip=True)
    with pytest.raises(ValueError, match="without CLIP's tokenizer"):
        QuestionData(prepared["vcr"], student=student).batches(batch_size=4, clip=True)
    with pytest.raises(ValueError, match="must be some of qa, qar, ve, vqa"):
        QuestionData(prepared["vcr"], student=student, questions=("qra",))
    with pytest.raises(ValueError, match="no items of the kinds ve"):
        QuestionData(prepared["vcr"], student=student, questions=("ve",)).num_items("train")
    with pytest.raises(ValueError, match="'roberta' is not known: choose one of uniter, vl_bert"):
        StudentText("roberta", bert)
    with pytest.raises(ValueError, match="batch_size=25 is more than the 24 items"):
        opened["vcr"].batches(batch_size=25)
    with pytest.raises(ValueError, match="batch_size=5 must divide over the 2 processes"):
        opened["vcr"].batches(batch_size=5, process_count=2)
