"""The system of questions: what a step learns from, on tiny students and a tiny CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipdistill_jax import defaults
from clipdistill_jax.experiment import build_stage, plain
from clipdistill_jax.systems.adaptive import right_choice
from clipdistill_jax.train import sharding
from clipdistill_jax.train import state as states

VOCAB = {
    "teacher": 50,
    "student": 60,
    "answers": 5,
    "mask": 3,
    "random_low": 5,
    "random_high": 50,
    "region_classes": 7,
}
NAIVE = {"vision": {"weight": 0.05}, "language": {"weight": 0.05}}
CLIP_TD = {**NAIVE, "tokens": {"weight": 0.05}}
OPEN = {"temperature": 1e6}
SIZE = 8


def config(kind="vcr", student="uniter", **stage):
    made = ConfigDict(sort_keys=False)
    made.seed = 0
    made.data = defaults.data(
        format=kind,
        image_size=16,
        num_frames=1,
        max_tokens=12,
        clip_tokens=14,
        region_width=6,
        max_regions=4,
    )
    text = dict(kind="clip", context_length=20, width=16, layers=1, heads=2, mlp_width=32, projection_dim=16)
    made.teacher = dict(
        kind="clip",
        image_size=16,
        patch_size=8,
        width=16,
        layers=1,
        heads=2,
        mlp_width=32,
        projection_dim=16,
        text=text,
    )
    made.student = dict(kind=student, width=24, layers=1, heads=2, mlp_width=32, dropout=0.0)
    made.student.attention_dropout = 0.0
    shared = dict(model="student", steps=3, batch_size=SIZE, clip="some clip")
    made.stages = ConfigDict(dict(stage=defaults.stage(**{**shared, **stage})))
    return made


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def batch_of(stage, rng, kind):
    """Random questions; those of VCR with an even number have no label."""

    def fill(name, x):
        if name.endswith("tokens"):
            return rng.integers(5, 50, x.shape).astype(np.int32)
        if name.endswith("word_ids"):
            return np.broadcast_to(np.arange(x.shape[-1], dtype=np.int32) - 1, x.shape)
        if name == "label":
            label = rng.integers(0, 4 if kind == "vcr" else 3, x.shape)
            return np.where(np.arange(len(x)) % 2 + (kind != "vcr"), label, -1).astype(np.int32)
        if name == "image_id":
            return np.arange(len(x), dtype=np.int32)
        if name == "image":
            return rng.integers(0, 256, x.shape).astype(np.uint8)
        if x.dtype == np.float32 and name != "image_size":
            return rng.random(x.shape).astype(np.float32)
        return np.asarray(x)

    return {name: fill(name, x) for name, x in stage.system.example("stage", SIZE).items()}


def run(mesh, kind="vcr", student="uniter", steps=1, **fields):
    """(metrics of the last step, the state after it, the batch)."""
    stage = build_stage(plain(config(kind, student, **fields)), "stage", mesh, VOCAB)
    rng = np.random.default_rng(0)
    batch = batch_of(stage, rng, kind)
    frozen = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), stage.frozen)
    state = states.create(stage.init, stage.optimizer, mesh, jax.random.key(0), **stage.placement)
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, metrics = stage.step(state, frozen, batch)
    return {name: tuple(map(float, pair)) for name, pair in metrics.items()}, state, batch


def test_every_question_is_distilled_and_the_labelled_ones_are_learned(mesh):
    metrics, _, _ = run(mesh, terms=CLIP_TD, gate=OPEN)
    assert metrics["task_loss"][1] == metrics["accuracy"][1] == SIZE / 2
    for name in CLIP_TD:
        assert metrics[f"{name}_loss"][1] == metrics[f"{name}_gate"][1] == SIZE
        assert metrics[f"{name}_gate"][0] == SIZE and metrics[f"{name}_loss"][0] > 0
    total = metrics["task_loss"][0] / (SIZE / 2)
    total += sum(0.05 * metrics[f"{name}_loss"][0] / SIZE for name in CLIP_TD)
    assert metrics["loss"][0] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind, student", [("snli_ve", "uniter"), ("vqa", "vl_bert"), ("vcr", "vl_bert")])
def test_a_gate_that_never_opens_leaves_the_student_as_it_is_alone(mesh, kind, student):
    fields = {"object_loss": 1.0} if (kind, student) == ("vcr", "vl_bert") else {}
    shut, taught, _ = run(mesh, kind, student, terms=CLIP_TD, gate={"temperature": 1e-6}, **fields)
    alone, by_itself, _ = run(mesh, kind, student, **fields)
    assert shut["tokens_gate"] == (0.0, SIZE) and shut["loss"] == pytest.approx(alone["loss"])
    assert ("object_loss" in alone) == bool(fields)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        taught.params["student"],
        by_itself.params["student"],
    )


def test_what_is_distilled_on_the_right_choice_needs_its_label(mesh):
    terms = {"language": {"weight": 1.0, "choices": "correct"}}
    metrics, _, _ = run(mesh, terms=terms, gate={"choices": "correct", "temperature": 1e6})
    assert metrics["language_gate"] == (SIZE / 2, SIZE)


def test_one_pass_without_noise_is_the_plain_step(mesh):
    fields = dict(terms=CLIP_TD, gate=OPEN)
    plain, state, _ = run(mesh, **fields)
    noise = dict(word_step=0.01, region_step=0.01, steps=1)
    villa, same, _ = run(mesh, **fields, adversarial=noise)
    assert villa["divergence"] == pytest.approx((0.0, SIZE / 2), abs=1e-6)
    for name, pair in plain.items():
        assert villa[name] == pytest.approx(pair, rel=1e-5, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, same.params)


def test_noise_moves_the_answers(mesh):
    metrics, _, _ = run(mesh, terms=NAIVE, adversarial=dict(preset="vcr_base", word_step=0.5))
    passes = 3
    assert metrics["task_loss"][1] == passes * SIZE / 2  # each pass is counted
    assert metrics["divergence"][0] > 1e-3


@pytest.mark.parametrize("task", ["mlm", "mrfr", "mrckl", "itm"])
def test_adaptive_finetuning_learns_the_drawn_task_and_distils(mesh, task):
    metrics, _, _ = run(mesh, terms=NAIVE, pretraining={"ratios": {task: 1}})
    assert 0 < metrics[f"{task}_loss"][1] <= SIZE / 2  # the right answer of those that have one
    assert metrics["task_loss"] == pytest.approx(metrics[f"{task}_loss"])
    assert 0 < metrics["vision_loss"][1] <= SIZE / 2 and metrics["vision_loss"][0] > 0
    assert metrics["vision_loss"][1] == SIZE / 2 or task == "itm"  # not of another example's image


def test_the_right_choice_alone():
    rng = np.random.default_rng(0)
    tokens, vectors = rng.integers(0, 9, (3, 4, 5)), rng.random((3, 4, 2))
    label = np.array([2, -1, 0])
    batch = {name: jnp.asarray(x) for name, x in dict(tokens=tokens, label=label).items()}
    picked = right_choice({**batch, "clip/text": jnp.asarray(vectors)})
    for row, place in enumerate((2, 0, 0)):
        assert picked["tokens"][row, 0].tolist() == tokens[row, place].tolist()
        np.testing.assert_allclose(picked["clip/text"][row, 0], vectors[row, place], rtol=1e-6)
    assert picked["label"].tolist() == [0, -1, 0] and picked["known"].tolist() == [True, False, True]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(terms={"temporal": {"weight": 1.0}}), "compares with `teacher`"),
        (dict(terms=CLIP_TD, clip=""), "compares with `clip`"),
        (dict(gate={"temperatur": 1.0}, terms=CLIP_TD), "temperatur"),
        (dict(adversarial={"preset": "vcr_huge"}), "no preset 'vcr_huge'"),
        (dict(adversarial={"word_steps": 1.0}), "word_steps"),
        (dict(pretraining={"ratios": {"mlm": 1}, "rate": 0.1}), "rate"),
        (dict(pretraining={"ratios": {"mlm": 1}}, adversarial={"preset": "vcr_base"}), "leave one out"),
        (dict(model="teacher"), "only the student trains"),
    ],
)
def test_what_does_not_fit_is_named(mesh, fields, message):
    with pytest.raises(ValueError, match=message):
        run(mesh, **fields)
