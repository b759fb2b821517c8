"""Every config of configs/clip_td builds; values are the paper's and the originals'."""

import itertools

import jax
import pytest

from clipdistill_jax import commands
from clipdistill_jax.experiment import build_stage
from clipdistill_jax.models.joint import param_shapes
from clipdistill_jax.report import paper_tables
from clipdistill_jax.report.sizes import count
from clipdistill_jax.run import run_folders, stage_order
from clipdistill_jax.systems import make_system
from clipdistill_jax.tasks.adversarial import PRESETS
from clipdistill_jax.train import sharding
from configs.clip_td import snli_ve, vcr, vqa, world
from configs.clip_td.common import METHODS, STUDENTS, parse
from configs.clip_td.stages import examples

TASKS = dict(vcr=vcr, snli_ve=snli_ve, vqa=vqa)
VOCAB = {"teacher": 60, "mask": 3, "random_low": 5, "random_high": 50, "region_classes": 7, "answers": 9}
DISTILS = {  # method -> what its last stage distils, whether it is gated, its stages
    "baseline": ("", False, 1),
    "naive_v": ("vision", False, 1),
    "naive_l": ("language", False, 1),
    "naive": ("vision language", False, 1),
    "rts": ("vision language tokens", False, 1),
    "ts": ("vision language tokens", False, 1),
    "cw": ("vision language", True, 1),
    "stage2": ("", False, 2),
    "af": ("vision language", False, 2),
    "clip_td": ("vision language tokens", True, 2),
}


def made(task, argument):
    return TASKS[task].get_config(argument).to_dict()


def build(config, name, **vocab):
    """A stage with the same parts, in sizes that trace quickly."""
    small = dict(width=16, layers=1, heads=2, mlp_width=16)
    config["student"] |= small
    if "clip" in config["teacher"]["kind"]:
        config["teacher"] |= dict(small, image_size=16, patch_size=8, projection_dim=16)
        config["teacher"]["text"] |= dict(small, projection_dim=16, context_length=12)
    config["data"] |= dict(max_tokens=8, clip_tokens=8, max_regions=3, region_width=6, image_size=16)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return build_stage(config, name, mesh, {"student": 60, **VOCAB, **vocab})


@pytest.mark.parametrize("task", TASKS)
def test_what_each_method_is(task):
    assert list(DISTILS) == list(METHODS)
    for student, method in itertools.product(STUDENTS, METHODS):
        config = made(task, f"{student},{method},full")
        terms, gated, stages = DISTILS[method]
        assert list(config["stages"]) == ["pretrain", "finetune"][-stages:]
        last = config["stages"]["finetune"]
        assert set(last["terms"]) == set(terms.split()) and bool(last["gate"]) == gated
        assert {term["weight"] for term in last["terms"].values()} <= {0.05}
        for stage in config["stages"].values():
            assert bool(stage["clip"]) == stage["cache"] == bool(stage["terms"])
            assert bool(stage["adversarial"]) == (stage is last and student.startswith("villa"))
            assert stage["adversarial"].get("preset", "vcr_base") in PRESETS
            assert stage["batch_size"] % (16 * stage["chunks"]) == 0  # on 16 chips
        if stages == 2:
            first = config["stages"]["pretrain"]
            assert set(first["terms"]) == ({"vision", "language"} if terms else set()) and not first["gate"]
            assert last["init"]["model"] == "stage:pretrain" and first["init"]["model"] == config["weights"]
            assert ("mrfr" in first["pretraining"]["ratios"]) == (not student.startswith("vl_bert"))
            assert (
                first["protocol"] == "full" and not first["select"] and stage_order(config)[0] == "pretrain"
            )
        else:
            assert last["init"]["model"] == config["weights"]
    for method, selection in (("ts", "scores"), ("rts", "random"), ("clip_td", "scores")):
        tokens = made(task, f"uniter_base,{method},full")["stages"]["finetune"]["terms"]["tokens"]
        assert tokens["count"] == 2 and tokens["selection"] == selection


def test_the_papers_tables_name_methods():
    rows = {row.name for table in paper_tables.TABLES.values() for row in table.rows}
    assert set(METHODS) <= rows and set(world.ROWS) <= set(METHODS)


def test_the_recipes_of_the_papers_section_9_2():
    def last(student):
        return made("vcr", f"{student},naive,full")["stages"]["finetune"]

    for student, steps, warmup in (("uniter_base", 8000, 800), ("villa_large", 10_000, 1000)):
        stage = last(student)
        rate = stage["optimizer"]["learning_rate"]
        assert stage["steps"] == steps and rate["warmup_steps"] == warmup
        assert stage["optimizer"]["name"] == "adamw" and stage["optimizer"]["weight_decay"] == 0.01
        assert rate["kind"] == "linear" and rate["value"] == 6e-5
        assert stage["batch_size"] == 512
    stage = last("vl_bert_large")
    rate, epoch = stage["optimizer"]["learning_rate"], 2 * 212_923 / 128
    assert stage["optimizer"]["name"] == "sgd" and stage["batch_size"] == 128
    assert rate["warmup_steps"] == 1000 and rate["value"] == pytest.approx(128 * 7e-5)
    assert rate["kind"] == "steps" and rate["factor"] == 0.1
    assert [*rate["boundaries"], stage["steps"]] == [int(epochs * epoch) for epochs in (14, 18, 26, 30)]
    assert made("vcr", "vl_bert_large,naive,full")["student"]["preset"] == "large"


def test_batches_of_tokens_as_examples():
    # 80,000 tokens a step of both, 500 questions of 160: UNITER 4000 x 5 x 4 GPUs, VILLA 1250 x 8 x 8.
    assert examples(4000 * 5 * 4, 160) == examples(1250 * 8 * 8, 160) == 512
    assert made("vqa", "villa_base,af,100")["stages"]["pretrain"]["batch_size"] == 1024  # 1229 of 80
    assert [examples(tokens, 1) for tokens in (1, 11, 12, 22)] == [1, 8, 16, 16]  # nearest by ratio
    sizes = {
        (task, size): made(task, f"uniter_{size},baseline,full")["stages"]["finetune"]["batch_size"]
        for task in ("snli_ve", "vqa")
        for size in ("base", "large")
    }
    assert set(sizes.values()) == {512, 2048} and sizes["vqa", "base"] == sizes["vqa", "large"] == 2048


@pytest.mark.parametrize(
    "task, student, values",  # steps, warm-up, rate, clipping of the mean gradient
    [
        ("snli_ve", "uniter_base", (4000, 400, 8e-5, 0.5)),
        ("snli_ve", "villa_large", (4000, 400, 3e-5, 1.0)),
        ("vqa", "villa_base", (6000, 600, 8e-5, 0.4)),
        ("vqa", "uniter_large", (5000, 500, 5e-5, 0.5)),
        ("vqa", "vl_bert_base", (8667, 500, 1.6e-4, 1.0)),
    ],
)
def test_the_recipes_of_the_originals(task, student, values):
    stage = made(task, f"{student},baseline,full")["stages"]["finetune"]
    optimizer, rate = stage["optimizer"], stage["optimizer"]["learning_rate"]
    assert (stage["steps"], rate["warmup_steps"], rate["value"], optimizer["clip_norm"]) == values
    heads = [factor for _, factor in optimizer["multipliers"]]
    assert heads == ([10.0] if task == "vqa" and student != "vl_bert_base" else [])


@pytest.mark.parametrize(
    "task, argument, items, protocol, shots",
    [
        ("vcr", "uniter_base,naive,100", 2 * 700, "low_shot", 100),
        ("vcr", "vl_bert_base,naive,1000,questions=qa", 7000, "low_shot", 1000),
        ("vcr", "uniter_base,naive,100,semi", 2 * 700 + 212_923 - 700, "semi_supervised", 100),
        ("vcr", "uniter_base,naive,5000", 2 * 35_000, "low_shot", 5000),
        ("snli_ve", "uniter_base,naive,1000", 3000, "low_shot", 1000),
        ("vqa", "vl_bert_base,naive,100", 100, "low_shot", 100),
        ("vqa", "uniter_large,naive,full", 443_757, "full", 0),
    ],
)
def test_shots(task, argument, items, protocol, shots):
    config = made(task, argument)
    stage = config["stages"]["finetune"]
    assert (stage["protocol"], stage["shots"]) == (protocol, shots)
    assert stage["batch_size"] % 16 == 0  # devices of a slice
    assert stage["batch_size"] == 16 or 8 * stage["batch_size"] <= items  # steps an epoch
    epochs = stage["steps"] * stage["batch_size"] / items
    if protocol == "low_shot":
        most = 30 if "vl_bert" in argument and task == "vcr" else 100
        assert most - 1 < epochs <= most or stage["steps"] == 8000
    rate = stage["optimizer"]["learning_rate"]
    assert rate["warmup_steps"] <= stage["steps"] / 10
    if rate["kind"] == "steps":  # SGD's rate is that of one image
        assert rate["value"] == pytest.approx(7e-5 * stage["batch_size"])
    assert stage["eval_every"] * 8 >= stage["steps"] > stage["eval_every"] * 7


def test_where_weights_and_clip_come_from():
    file = f"{vcr.__file__}:villa_base,clip_td,100,clip=16"
    config = commands.read_config(file, ["--config.weights=villa.pt", "--config.clip=DIR"])
    first, last = config["stages"]["pretrain"], config["stages"]["finetune"]
    assert first["init"]["model"] == "villa.pt" and last["init"]["model"] == "stage:pretrain"
    assert first["clip"] == last["clip"] == "DIR" and config["teacher"]["preset"] == "ViT-B/16"
    config = commands.read_config(f"{vcr.__file__}:uniter_base,naive,100", [])
    assert (
        config["stages"]["finetune"]["clip"] == config["data"]["tokenizer"] == "openai/clip-vit-base-patch32"
    )
    assert config["stages"]["finetune"]["init"]["missing"] == ("vcr_output.",)
    assert config["stages"]["finetune"]["init"]["model"] == config["data"]["student_tokenizer"]
    assert not config["stages"]["finetune"]["init"]["pooler"]  # UNITER's files have one
    config = commands.read_config(f"{vcr.__file__}:vl_bert_base,af,100", ["--config.weights=vl.model"])
    init = config["stages"]["pretrain"]["init"]
    assert init["pooler"] == config["data"]["student_tokenizer"] == "google-bert/bert-base-uncased"


@pytest.mark.parametrize(
    "argument, said",
    [
        (
            "uniter_tiny,naive,full",
            "no student 'uniter_tiny'; there are uniter_base, uniter_large, villa_base",
        ),
        ("uniter_base,naiv,full", "no method 'naiv'; there are baseline, naive_v"),
        ("uniter_base,naive,some", "shots is 'some'"),
        ("uniter_base,naive,0", "shots is '0'"),
        ("uniter_base,naive", "STUDENT,METHOD,SHOTS"),
        ("uniter_base,naive,100,clip=14", "'clip=14' is not one of semi, clip=32, clip=16, questions=both"),
        ("uniter_base,naive,100,semi=1", "'semi=1' is not one of"),
        ("uniter_base,naive,full,semi", "only a number of shots"),
        ("uniter_base,stage2,100,semi", "only distillation"),
        ("uniter_base,naive,100,semi,questions=qar", "shows the right answer"),
    ],
)
def test_mistakes(argument, said):
    with pytest.raises(ValueError, match=said):
        vcr.get_config(argument)
    with pytest.raises(ValueError, match=said) as told:  # in a line, without the traceback that absl quotes
        commands.read_config(f"{vcr.__file__}:{argument}", [])
    assert "Traceback" not in str(told.value)


def test_options_are_the_tasks():
    assert parse("uniter_base,naive,10").options == {}
    with pytest.raises(ValueError, match="'questions=qa' is not one of semi, clip=32, clip=16$"):
        snli_ve.get_config("uniter_base,naive,10,questions=qa")


@pytest.mark.parametrize(
    "student, parameters",
    [
        # The first number is the model's without heads, see tests/models. For VCR UNITER has 81 words and 2
        # types more, and a head; VL-BERT has an answer and the classes of its objects.
        ("uniter_base", 109_898_752 + 83 * 768 + (768 + 1) * 1536 + 2 * 1536 + 1537 * 2),
        ("villa_large", 335_695_872 + 83 * 1024 + (1024 + 1) * 2048 + 2 * 2048 + 2049 * 2),
        ("vl_bert_base", 112_634_112 + 769 + 769 * 768 + 769 * 81),
        ("vl_bert_large", 339_344_384 + 1025 + 1025 * 1024 + 1025 * 81),
    ],
)
def test_parameters_of_vcrs_students(student, parameters):
    words = 30_522 if student.startswith("vl_bert") else 28_996 + 81
    system = make_system(made("vcr", f"{student},baseline,full"), {"student": words})
    assert count(param_shapes(system.module("finetune"))) == parameters


# The other methods have the terms of these, and other students the same heads.
@pytest.mark.parametrize(
    "student, method",
    [
        *itertools.product(["uniter_base"], ["baseline", "cw", "rts", "stage2", "clip_td"]),
        ("villa_base", "baseline"),
        ("vl_bert_base", "stage2"),
    ],
)
def test_methods_build(student, method):
    config = made("vcr", f"{student},{method},100")
    pretrained = {"mlm", "mrc", "itm"} | ({"mrfr"} if student != "vl_bert_base" else set())
    for name in config["stages"]:
        stage = build(config, name)
        assert list(stage.teachers) == (["clip"] if stage.config["terms"] else [])
        heads = set(stage.template.params["student"]) & {"vcr", "mlm", "mrfr", "mrc", "itm"}
        assert heads == ({"vcr"} if name == "finetune" else pretrained)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("student", ["villa_large", "vl_bert_base"])
def test_students_build(task, student):
    config = made(task, f"{student},clip_td,100")
    for name in config["stages"]:
        stage = build(config, name)
        heads = set(stage.template.params["student"])
        assert ("objects" in heads) == (task == "vcr" and "vl_bert" in student and name == "finetune")
        assert bool({"vcr", "ve", "vqa"} & heads) == (name == "finetune")


def test_the_world():
    config = world.get_config("teacher").to_dict()
    assert list(config["stages"]) == ["clip"] and config["data"]["format"] == "karpathy"
    assert list(config["rows"]) == list(world.ROWS)
    config = commands.read_config(f"{world.__file__}:all", ["--config.clip=DIR"])
    assert list(config["stages"]) == ["pretrain", *world.ROWS]
    assert all(stage["clip"] == ("DIR" if stage["terms"] else "") for stage in config["stages"].values())
    assert config["data"]["tokenizer"] == "DIR"
    assert config["teacher"] == world.get_config("teacher").to_dict()["teacher"]
    for name in ("af", "clip_td"):
        assert config["stages"][name]["init"]["model"] == "stage:pretrain"
    assert {config["stages"][name]["shots"] for name in world.ROWS} == {100}
    assert list(world.get_config("stage2,50").stages) == ["pretrain_alone", "stage2"]
    assert world.get_config("stage2,50").stages.stage2.shots == 50
    for argument, said in (
        ("clip_tb", "no row 'clip_tb'"),
        ("ts,0", "option '0'"),
        ("ts,world=", "'world='"),
    ):
        with pytest.raises(ValueError, match=said):
            world.get_config(argument)


def test_the_worlds_rows_share_what_a_sweep_trains_first(tmp_path):
    first = world.get_config(f"teacher,world={tmp_path}").to_dict()
    assert list(first["stages"]) == ["pretrain"] and first["clip"] == f"{tmp_path}/clip"
    for row in world.ROWS:
        config = commands.read_config(
            f"{world.__file__}:{row},world={tmp_path}", [f"--config.base={tmp_path}"]
        )
        assert list(config["stages"]) == (["pretrain", row] if row in ("af", "clip_td") else [row])
        for same in ("data", "world", "student", "teacher", "clip"):
            assert config[same] == first[same]
        assert config["stages"].get("pretrain", first["stages"]["pretrain"]) == first["stages"]["pretrain"]
        assert run_folders(config, tmp_path / row)[-1] == tmp_path


@pytest.mark.parametrize("name", ["pretrain", "clip_td"])
def test_the_worlds_stages_build(name):
    config = world.get_config("clip_td").to_dict() | {"clip": "DIR"}
    for stage in config["stages"].values():
        stage["clip"] = "DIR"
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stage = build_stage(config, name, mesh, {"student": 300, **VOCAB, "region_classes": 5})
    assert list(stage.teachers) == ["clip"] and "embeddings" in stage.template.params["student"]


def test_the_worlds_clip_builds():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stage = build_stage(world.get_config("teacher").to_dict(), "clip", mesh, {"teacher": 500})
    assert set(stage.template.params["student"]) == {"vision", "text", "logit_scale"}
