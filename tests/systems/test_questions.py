"""The system of questions: what a step learns from, on tiny students and a tiny CLIP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from clipdistill_jax import defaults
from clipdistill_jax.experiment import build_stage, plain
from clipdistill_jax.systems.adaptive import right_choice, without_hidden
from clipdistill_jax.train import sharding

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


def built(mesh, kind="vcr", student="uniter", **fields):
    """(stage, state, frozen, batch): random weights, the student's the same for all stages of a kind."""
    sgd = dict(name="sgd", learning_rate=0.1, clip_norm=0.0)  # compiles sooner than AdamW
    stage = build_stage(plain(config(kind, student, optimizer=sgd, **fields)), "stage", mesh, VOCAB)
    batch = batch_of(stage, np.random.default_rng(0), kind)

    def random(shapes):
        rng = np.random.default_rng(1)
        return jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes)

    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), stage.template)
    state = zeros.replace(params=random(stage.template.params))
    return stage, state, random(stage.frozen), batch


def floats(metrics):
    return {name: tuple(map(float, pair)) for name, pair in metrics.items()}


def run(mesh, *args, **fields):
    """(metrics of a step, the state after it)."""
    stage, state, frozen, batch = built(mesh, *args, **fields)
    with jax.set_mesh(mesh):
        state, metrics = stage.step(state, frozen, batch)
    return floats(metrics), jax.device_get(state)


def measured(mesh, *args, **fields):
    """The metrics of a step alone: what they do not need, the gradient, is not compiled."""
    stage, *given = built(mesh, *args, **fields)

    @jax.jit
    def forward(state, frozen, batch):
        _, metrics = stage.step(state, frozen, batch)
        return {name: pair for name, pair in metrics.items() if name not in ("grad_norm", "nonfinite")}

    with jax.set_mesh(mesh):
        return floats(forward(*given))


@pytest.fixture(scope="module")
def distilled(mesh):
    """(metrics, state) of a step of CLIP-TD with an open gate."""
    return run(mesh, terms=CLIP_TD, gate=OPEN)


def test_every_question_is_distilled_and_the_labelled_ones_are_learned(distilled):
    metrics, _ = distilled
    assert metrics["task_loss"][1] == metrics["accuracy"][1] == SIZE / 2
    for name in CLIP_TD:
        assert metrics[f"{name}_loss"][1] == metrics[f"{name}_gate"][1] == SIZE
        assert metrics[f"{name}_gate"][0] == SIZE and metrics[f"{name}_loss"][0] > 0
    total = metrics["task_loss"][0] / (SIZE / 2)
    total += sum(0.05 * metrics[f"{name}_loss"][0] / SIZE for name in CLIP_TD)
    assert metrics["loss"][0] == pytest.approx(total, rel=1e-5)


SHUT = {"terms": CLIP_TD, "gate": {"temperature": 1e-6}}


def test_a_gate_that_never_opens_leaves_the_student_as_it_is_alone(mesh):
    shut, taught = run(mesh, "vcr", "vl_bert", **SHUT, object_loss=1.0)
    alone, by_itself = run(mesh, "vcr", "vl_bert", object_loss=1.0)
    assert shut["tokens_gate"] == (0.0, SIZE) and shut["loss"] == pytest.approx(alone["loss"])
    assert alone["object_loss"][0] > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        taught.params["student"],
        by_itself.params["student"],
    )


@pytest.mark.parametrize("kind, student", [("snli_ve", "uniter"), ("vqa", "vl_bert")])
def test_a_shut_gate_leaves_the_task_alone_in_the_loss(mesh, kind, student):
    metrics = measured(mesh, kind, student, **SHUT)
    total, count = metrics["task_loss"]
    assert metrics["tokens_gate"] == (0.0, SIZE) and metrics["tokens_loss"] == (0.0, SIZE)
    assert count == SIZE and metrics["loss"][0] == pytest.approx(total / count)


def test_a_student_starts_the_same_with_and_without_a_teacher(mesh):
    def first(**fields):
        stage = build_stage(plain(config(**fields)), "stage", mesh, VOCAB)
        return jax.jit(lambda key: jax.tree.leaves(stage.init(key)[0]["student"])[-1])(jax.random.key(0))

    taught = first(terms=CLIP_TD)
    assert np.ptp(taught) > 0
    np.testing.assert_array_equal(taught, first())


def test_what_is_distilled_on_the_right_choice_needs_its_label(mesh):
    terms = {"language": {"weight": 1.0, "choices": "correct"}}
    metrics = measured(mesh, terms=terms, gate={"choices": "correct", "temperature": 1e6})
    assert metrics["language_gate"] == (SIZE / 2, SIZE)


@pytest.mark.parametrize("kind, known", [("snli_ve", SIZE), ("vqa", SIZE / 2)])
def test_without_choices_the_gate_alone_asks_for_the_correct_answer(mesh, kind, known):
    terms = {"language": {"weight": 1.0, "choices": "correct"}}
    stage, state, frozen, batch = built(mesh, kind, terms=terms, gate={"choices": "correct", **OPEN})
    if kind == "vqa":  # half of the questions have an answer of the vocabulary
        batch["targets"][::2] = 0
    with jax.set_mesh(mesh):
        metrics = floats(jax.jit(lambda *given: stage.step(*given)[1])(state, frozen, batch))
    assert metrics["language_gate"] == (known, SIZE)
    assert np.isfinite(metrics["language_loss"][0]) and metrics["language_loss"][0] > 0


def test_the_gate_compares_what_ranks_the_answers(mesh):
    found = {}
    for ranking in ("logit", "log_odds"):
        stage, state, frozen, batch = built(mesh, terms=NAIVE, ranking=ranking)
        forward = stage.system.student(stage.module, stage.config)
        features, _ = jax.jit(forward)(state.params["student"], {}, batch, None)
        found[ranking] = features.logits
        wrong, right = np.moveaxis(np.asarray(features.outputs["vcr"]), -1, 0)
    np.testing.assert_array_equal(found["logit"], right)
    np.testing.assert_allclose(found["log_odds"], right - wrong, rtol=1e-6)


def test_hidden_regions_cannot_be_read_off_the_whole_image():
    rng = np.random.default_rng(0)
    regions = jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32)
    mask = jnp.arange(5) < jnp.array([5, 4, 2])[:, None]
    hidden = jnp.zeros((3, 5), bool).at[0, 2].set(True).at[2, 1].set(True)  # all that the last one has
    found = np.asarray(without_hidden(regions, mask, hidden))
    np.testing.assert_allclose(found[0, 0], np.asarray(regions)[0, [1, 3, 4]].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(found[1], regions[1])
    np.testing.assert_array_equal(found[2, 0], 0.0)
    np.testing.assert_array_equal(found[:, 1:], regions[:, 1:])


def test_a_task_of_ratio_0_is_left_out_and_one_without_classes_refused_at_once(mesh):
    made = plain(config(pretraining={"ratios": {"mlm": 1, "mrckl": 1}}))
    vocab = {name: size for name, size in VOCAB.items() if name != "region_classes"}
    with pytest.raises(ValueError, match=r"set stages\.stage\.pretraining\.ratios\.mrckl=0"):
        build_stage(made, "stage", mesh, vocab)
    made["stages"]["stage"]["pretraining"]["ratios"]["mrckl"] = 0
    assert build_stage(made, "stage", mesh, vocab).module.heads == ("mlm",)


def test_one_pass_without_noise_is_the_plain_step(mesh, distilled):
    plain, state = distilled
    noise = dict(word_step=0.01, region_step=0.01, steps=1)
    villa, same = run(mesh, terms=CLIP_TD, gate=OPEN, adversarial=noise)
    assert villa["divergence"] == pytest.approx((0.0, SIZE / 2), abs=1e-6)
    for name, pair in plain.items():
        assert villa[name] == pytest.approx(pair, rel=1e-5, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, same.params)


@pytest.mark.parametrize(
    "kind, noise",
    [
        ("vcr", dict(preset="vcr_base", word_step=0.5)),
        ("snli_ve", dict(preset="ve_base", word_step=0.5)),  # their presets leave the regions alone
        ("vqa", dict(preset="vqa_large", word_step=0.5)),
        ("vcr", dict(region_step=20.0)),
    ],
)
def test_noise_moves_the_answers(mesh, kind, noise):
    terms = {"vision": {"weight": 0.05}}
    metrics = measured(mesh, kind, terms=terms, adversarial=noise)
    passes, labelled = 3, SIZE / 2 if kind == "vcr" else SIZE
    assert metrics["task_loss"][1] == passes * labelled  # each pass is counted
    assert metrics["vision_loss"][1] == passes * SIZE
    assert metrics["divergence"][0] > 1e-4


def test_adaptive_finetuning_learns_the_drawn_task_and_distils(mesh):
    tasks = ("mlm", "mrfr", "mrckl", "itm")
    stage, state, frozen, batch = built(mesh, terms=NAIVE, pretraining={"ratios": dict.fromkeys(tasks, 1)})
    seen = set()
    with jax.set_mesh(mesh):
        for step in range(40):  # what is drawn depends on the step alone
            _, metrics = stage.step(state.replace(step=np.int32(step)), frozen, batch)
            metrics = floats(metrics)
            (task,) = (task for task in tasks if metrics[f"{task}_loss"][1])
            assert metrics[f"{task}_loss"][1] <= SIZE / 2  # the right answer of those that have one
            assert metrics["task_loss"] == pytest.approx(metrics[f"{task}_loss"])
            assert 0 < metrics["vision_loss"][1] <= SIZE / 2 and metrics["vision_loss"][0] > 0
            # Not of another example's image.
            assert metrics["vision_loss"][1] == SIZE / 2 or task == "itm"
            assert not metrics["nonfinite"][0] and metrics["grad_norm"][0] > 0
            seen.add(task)
            if seen == set(tasks):
                return
    pytest.fail(f"only {seen} were drawn")


@pytest.mark.parametrize("task", ["itm", "mrckl"])
def test_a_task_needs_no_head_but_its_own(mesh, task):
    stage, *given = built(mesh, terms=NAIVE, pretraining={"ratios": {task: 1}})
    with jax.set_mesh(mesh):
        metrics = jax.eval_shape(stage.step, *given)[1]
    assert f"{task}_loss" in metrics and "mlm_loss" not in metrics


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
