"""Questions answered: metrics by hand, any order and padding of the batches, eight devices and one."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.distill.confidence import choice_logits
from clipdistill_jax.evaluate.choices import ChoiceEvaluator, QuestionSplit, answer_scores, question_metrics
from clipdistill_jax.models.features import Features
from clipdistill_jax.models.joint import JointFeatures
from clipdistill_jax.models.uniter import Uniter, UniterConfig
from clipdistill_jax.train.sharding import make_mesh
from tests.models import joint_cases

# Six items of VCR: the answers of a, b, c, d and the rationales of a, b, d. c's label is not known.
VCR = {
    "kinds": ["qa", "qar", "qa", "qar", "qa", "qa", "qar"],
    "record_ids": ["a", "a", "b", "b", "c", "d", "d"],
    "categories": ["mental", "mental", "role", "role", "role", "role", "role"],
    "labels": [1, 2, 0, 3, -1, 3, 1],
}
CHOSEN = [1, 2, 0, 0, 2, 1, 1]  # right, right | right, wrong | unknown | wrong, right


def split_of(batches=None, **fields):
    arrays = {name: np.array(value) for name, value in fields.items()}
    arrays["labels"] = arrays["labels"].astype(np.int32)
    return QuestionSplit(batches=batches or (lambda: []), **arrays)


def vcr_scores():
    """Scores whose best are CHOSEN."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, (7, 4)).astype(np.float32)
    scores[np.arange(7), CHOSEN] += 1
    return scores


def fed(arrays, order, size, padding):
    """Batches of rows in an order; what fills the last is garbage, with a wrong example_id."""
    order = list(order)
    for start in range(0, len(order), size):
        index = order[start : start + size]
        rows = size if padding else len(index)
        batch = {}
        for name, x in {**arrays, "example_id": np.arange(len(order), dtype=np.int32)}.items():
            filler = np.full((rows - len(index), *x.shape[1:]), 1, x.dtype)
            batch[name] = np.concatenate([x[index], filler])
        batch["mask"] = np.arange(rows) < len(index)
        yield batch


def given(module, variables, batch):
    """A model that says what the batch tells it to."""
    return Features(logits=batch["said"] * variables)


@pytest.fixture(scope="module")
def one():
    return make_mesh(devices=jax.devices()[:1])


def test_vcr_by_hand(one):
    arrays = {"said": vcr_scores()}
    split = split_of(lambda: fed(arrays, [6, 3, 0, 1, 5, 4, 2], 3, True), **VCR)
    metrics, found = ChoiceEvaluator(None, one, kind="vcr", forward=given)(jnp.float32(1), split)
    assert metrics == pytest.approx(
        {
            "accuracy": 400 / 6,
            "accuracy/mental": 100,
            "accuracy/role": 50,
            "Q->A": 200 / 3,
            "Q->A/mental": 100,
            "Q->A/role": 50,
            "QA->R": 200 / 3,
            "QA->R/mental": 100,
            "QA->R/role": 50,
            "Q->AR": 100 / 3,  # of a, b and d only a has both right
            "Q->AR/mental": 100,
            "Q->AR/role": 0,
        }
    )
    np.testing.assert_array_equal(found["chosen"], CHOSEN)
    np.testing.assert_array_equal(found["judged"], [1, 1, 1, 1, 0, 1, 1])
    np.testing.assert_array_equal(found["outcome"], [1, 1, 1, 0, 0, 0, 1])
    np.testing.assert_array_equal(found["scores"], arrays["said"])


def test_both_questions_right_counts_only_where_a_record_has_both():
    outcome, judged = np.ones(3, np.float32), np.ones(3, bool)
    fields = {"kinds": ["qa", "qar", "qa"], "labels": [0, 0, 0], "categories": ["", "", ""]}
    metrics = question_metrics(outcome, judged, split_of(record_ids=["a", "b", "c"], **fields))
    assert metrics == {"accuracy": 100, "Q->A": 100, "QA->R": 100}
    with pytest.raises(ValueError, match="1 records have several Q->A questions"):
        question_metrics(outcome, judged, split_of(record_ids=["a", "b", "a"], **fields))


def test_entailment_by_hand(one):
    said = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    labels = [0, 1, 1, 2]
    names = np.array(["contradiction", "entailment", "entailment", "neutral"])
    fields = {"kinds": ["ve"] * 4, "record_ids": ["p", "q", "r", "s"], "categories": names, "labels": labels}
    split = split_of(lambda: fed({"said": said}, range(4), 4, False), **fields)
    metrics, _ = ChoiceEvaluator(None, one, kind="ve", forward=given)(jnp.float32(1), split)
    assert metrics == {
        "accuracy": 50,
        "accuracy/contradiction": 100,
        "accuracy/entailment": 50,
        "accuracy/neutral": 0,
    }


def test_open_answers_have_soft_scores_and_no_unknown(one):
    said = np.array([[9, 1, 2], [0, 3, 2], [0, 1, 5], [0, 1, 5]], np.float32)
    targets = np.array([[1, 0.25, 0.5], [0, 0, 1], [0, 0, 0], [0, 0, 1]], np.float32)
    labelled = np.array([True, True, True, False])  # none of the third's answers is in the vocabulary
    fields = {
        "kinds": ["vqa"] * 4,
        "record_ids": ["1", "2", "3", "4"],
        "categories": ["number", "other", "other", ""],
        "labels": [-1] * 4,
    }
    batches = {"said": said, "targets": targets, "labelled": labelled}
    split = split_of(lambda: fed(batches, [2, 0, 1, 3], 2, True), **fields)
    evaluator = ChoiceEvaluator(None, one, kind="vqa", forward=given, never=(0,))
    metrics, found = evaluator(jnp.float32(1), split)
    assert metrics == pytest.approx({"accuracy": 50 / 3, "accuracy/number": 50, "accuracy/other": 0})
    np.testing.assert_array_equal(found["chosen"], [2, 1, 2, 2])
    np.testing.assert_array_equal(found["outcome"], [0.5, 0, 0, 0])
    assert "scores" not in found
    plain = ChoiceEvaluator(None, one, kind="vqa", forward=given)
    assert plain(jnp.float32(1), split)[0]["accuracy"] == pytest.approx(100 / 3)


def test_a_test_set_has_scores_and_no_metrics(one):
    arrays = {"said": vcr_scores()}
    split = split_of(lambda: fed(arrays, range(7), 7, False), **{**VCR, "labels": [-1] * 7})
    metrics, found = ChoiceEvaluator(None, one, kind="vcr", forward=given)(jnp.float32(1), split)
    assert metrics == {} and not found["judged"].any() and not found["outcome"].any()
    np.testing.assert_array_equal(found["scores"], arrays["said"])


@pytest.mark.parametrize(
    "order, message",
    [
        ([0, 1, 2, 3, 4, 5], "once: 1 are missing, 0 occur several times, 0 are not"),
        ([0, 1, 2, 3, 4, 5, 5], "once: 1 are missing, 1 occur several times, 0 are not"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "once: 0 are missing, 0 occur several times, 1 are not"),
        ([], "once: 7 are missing"),
    ],
)
def test_batches_that_do_not_bring_every_question_once(one, order, message):
    scores = np.zeros((8, 4), np.float32)

    def batches():
        for i in order:
            yield {"said": scores[:1], "example_id": np.array([i], np.int32), "mask": np.ones(1, bool)}

    with pytest.raises(ValueError, match=message):
        ChoiceEvaluator(None, one, kind="vcr", forward=given)(jnp.float32(1), split_of(batches, **VCR))


def test_scores_that_are_not_finite_and_unknown_kinds_are_refused(one):
    split = split_of(lambda: fed({"said": vcr_scores()}, range(7), 7, False), **VCR)
    with pytest.raises(ValueError, match="scores of 7 of 7 questions are not finite"):
        ChoiceEvaluator(None, one, kind="vcr", forward=given)(jnp.float32(math.nan), split)
    with pytest.raises(ValueError, match="'qa'; it can be vcr, ve, vqa"):
        ChoiceEvaluator(None, one, kind="qa")
    with pytest.raises(ValueError, match="gives no logits"):
        answer_scores(Features(), "vcr")


def test_what_choices_are_ranked_by():
    two = jnp.array([[[0.0, 3.0], [4.0, 5.0]]])
    said = JointFeatures(outputs={"vcr": two, "itm": two}, logits=two[..., 1])
    np.testing.assert_array_equal(answer_scores(said, "vcr"), [[3, 5]])
    np.testing.assert_array_equal(answer_scores(said, "vcr", "log_odds"), [[3, 1]])
    single = JointFeatures(outputs={"vcr": two[..., 1:]}, logits=two[..., 1])
    np.testing.assert_array_equal(answer_scores(single, "vcr", "log_odds"), [[3, 5]])
    with pytest.raises(ValueError, match="ranking"):
        answer_scores(said, "vcr", "odds")


CONFIG = UniterConfig(
    vocab_size=30,
    context_length=9,
    types=4,
    width=16,
    layers=1,
    heads=2,
    mlp_width=24,
    feature_width=joint_cases.FEATURES,
)
MODEL = Uniter(CONFIG, ("vcr", "itm"))
ITEMS = 16


def questions():
    """16 items of different lengths and numbers of regions, three choices each, with labels."""
    parts = [joint_cases.make_batch(30, 4, seed) for seed in range(ITEMS // 2)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays["token_mask"] = arrays["token_mask"] & (np.arange(7) < 3 + np.arange(ITEMS)[:, None, None] % 5)
    arrays["label"] = (np.arange(ITEMS) % 3).astype(np.int32)
    fields = {
        "kinds": ["qa", "qar"] * (ITEMS // 2),
        "record_ids": [f"val-{i // 2}" for i in range(ITEMS)],
        "categories": ["a", "a", "b", "b"] * (ITEMS // 4),
        "labels": arrays["label"],
    }
    return arrays, fields


def layouts(arrays):
    """The same items in batches of one shape, and in two shapes, in another order, with wider padding."""
    short = [i for i in range(ITEMS) if arrays["token_mask"][i, ..., 5:].sum() == 0]
    long = [i for i in range(ITEMS) if i not in short]
    assert len(short) > 4 and len(long) > 4

    def cut(batch):
        cut = {name: batch[name][..., :5] for name in ("tokens", "token_mask", "types", "word_ids")}
        return {**batch, **cut}

    def wide(batch):
        made = dict(batch)
        for name in ("regions", "region_boxes", "region_mask"):
            made[name] = np.pad(batch[name], [(0, 0), (0, 2)] + [(0, 0)] * (batch[name].ndim - 2))
        return made

    def ids(batch, index):
        return {**batch, "example_id": np.array(index, np.int32)[batch["example_id"]]}

    def take(index):
        return {name: x[index] for name, x in arrays.items()}

    def bucketed():
        for index, shape in ((long, wide), (short, cut)):
            for batch in fed(take(index), reversed(range(len(index))), 8, True):
                real = np.where(batch["mask"], batch["example_id"], 0)
                yield shape(ids({**batch, "example_id": real}, index))

    return (lambda: fed(arrays, range(ITEMS), 8, True)), bucketed


@pytest.fixture(scope="module")
def answered(one):
    arrays, fields = questions()
    variables = {"params": joint_cases.random_params(MODEL)}
    first, bucketed = layouts(arrays)
    evaluator = ChoiceEvaluator(MODEL, one, kind="vcr")
    return arrays, fields, variables, bucketed, evaluator, evaluator(variables, split_of(first, **fields))


def test_a_model_is_asked_its_answering_head(answered):
    arrays, fields, variables, _, _, (metrics, found) = answered
    outputs = joint_cases.jitted(MODEL, heads=("vcr",))(variables["params"], arrays).outputs["vcr"]
    np.testing.assert_allclose(found["scores"], outputs[..., 1], rtol=0, atol=2e-5)
    right = found["chosen"] == np.asarray(fields["labels"])
    assert metrics["Q->AR"] == pytest.approx(100 * (right[::2] & right[1::2]).mean())
    assert metrics["accuracy/b"] == pytest.approx(100 * right.reshape(-1, 4)[:, 2:].mean())
    assert 0 < metrics["accuracy"] < 100


def test_other_buckets_and_padding_give_the_same_and_compile_once_a_shape(answered):
    _, fields, variables, bucketed, evaluator, (metrics, found) = answered
    shapes = {(batch["tokens"].shape, batch["regions"].shape) for batch in bucketed()}
    assert len(shapes) == 2 and len(list(bucketed())) > 2
    before = evaluator._answers._cache_size()
    again, others = evaluator(variables, split_of(bucketed, **fields))
    assert before == 1 and evaluator._answers._cache_size() == 1 + len(shapes)
    assert again == metrics
    # float32 sums over other paddings: the scores are of size 1 to 10.
    np.testing.assert_allclose(others["scores"], found["scores"], rtol=0, atol=2e-5)


def test_eight_devices_say_what_one_says(answered):
    arrays, fields, variables, _, _, (metrics, found) = answered
    split = split_of(lambda: fed(arrays, range(ITEMS), 8, True), **fields)
    again, others = ChoiceEvaluator(MODEL, make_mesh(data=4, fsdp=2), kind="vcr")(variables, split)
    assert again == metrics
    np.testing.assert_allclose(others["scores"], found["scores"], rtol=0, atol=2e-5)


class Towers(nn.Module):
    """Image and text vectors as a dual encoder gives them."""

    @nn.compact
    def __call__(self, batch):
        dense = nn.Dense(4, use_bias=False)
        return dense(batch["picture"]), dense(batch["texts"])


def test_a_dual_encoder_chooses_by_its_own_scores(one):
    rng = np.random.default_rng(1)
    arrays = {
        "picture": rng.normal(size=(7, 4)).astype(np.float32),
        "texts": rng.normal(size=(7, 4, 4)).astype(np.float32),
    }

    def zero_shot(module, variables, batch):
        image, texts = module.apply(variables, batch)
        return Features(logits=choice_logits(image, texts, 10.0))

    split = split_of(lambda: fed(arrays, range(7), 4, True), **VCR)
    variables = {"params": {"Dense_0": {"kernel": np.eye(4, dtype=np.float32)}}}
    _, found = ChoiceEvaluator(Towers(), one, kind="vcr", forward=zero_shot)(variables, split)
    image, texts = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in arrays.values())
    expected = 10 * np.einsum("bd,bkd->bk", image, texts)
    np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=1e-5)
