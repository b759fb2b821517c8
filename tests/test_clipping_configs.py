"""Every config of configs/clipping builds; each row trains what its table says."""

import jax
import pytest
from ml_collections import ConfigDict

from clipdistill_jax import commands
from clipdistill_jax.experiment import build_stage, example_batch, plain, stage_module
from clipdistill_jax.report import poster
from clipdistill_jax.report.sizes import count
from clipdistill_jax.train import sharding
from configs.clipping import ablation, activitynet, didemo, lsmdc, msrvtt, msvd

DATASETS = dict(msrvtt=msrvtt, msvd=msvd, didemo=didemo, activitynet=activitynet, lsmdc=lsmdc)
TERMS = {"T": "temporal", "S": "spatial", "SAB": "sab", "OL2OL": "ol2ol", "TAB": "tab"}
FILE = ablation.__file__
OF_A_ROW = ("title", "teacher", "clip", "cache", "terms")  # what rows differ in
WORLD_ROWS = ("teacher", *ablation.SWEEP)


def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def shrink(config: ConfigDict) -> ConfigDict:
    """The same parts with fewer blocks and small images, so that tracing is quick."""
    config.data.update(image_size=64, num_frames=2, max_tokens=8)
    config.teacher.update(layers=3)
    for tower in (config.teacher, config.student):
        tower.text.update(layers=4 if tower.text.kind == "bert" else min(tower.text.get("layers", 12), 4))
        if tower.temporal.kind == "seqTransf":
            tower.temporal.layers = min(tower.temporal.layers, 2)
    return config


@pytest.mark.parametrize("name", DATASETS)
def test_data_sets(name):
    config = DATASETS[name].get_config()
    assert config.data.format == name and config.base == ""
    stages = config.stages
    assert list(stages) == ["teacher", "distilled"]
    # 5 and 36 epochs of the same items, each length rounded to whole steps.
    assert abs(stages.distilled.steps - stages.teacher.steps * 36 / 5) <= 0.5 * (1 + 36 / 5)
    assert abs(stages.teacher.steps - 5 * stages.teacher.eval_every) <= 0.5 * (1 + 5)
    assert set(stages.distilled.terms) == {"temporal", "spatial", "sab", "global", "local"}
    for tower in (config.teacher, config.student):
        assert tower.temporal.get("positions", 77) >= config.data.num_frames
    assert config.data.max_tokens <= 77 and config.data.num_frames <= config.data.max_frames
    parts = 16 * stages.distilled.chunks  # of a batch, on 16 chips
    assert not stages.distilled.batch_size % parts


@pytest.mark.parametrize("name", ["msvd", "lsmdc"])
def test_step_is_that_of_msrvtt(name):
    """What a step takes is the README's row of MSR-VTT for all three."""

    def step(config):
        settings = plain(config)
        data = [settings["data"][field] for field in ("image_size", "num_frames", "max_tokens", "tokenizer")]
        fields = ("model", "batch_size", "chunks", "terms", "cache", "num_frames")
        stages = {name: [stage[field] for field in fields] for name, stage in settings["stages"].items()}
        return settings["teacher"], settings["student"], data, stages

    assert step(DATASETS[name].get_config()) == step(msrvtt.get_config())


def test_epochs_of_msrvtt():
    config = msrvtt.get_config()
    captions = (9000 - 500) * 20
    assert config.stages.teacher.steps == round(5 * captions / 128) == 6641
    assert config.stages.distilled.steps == round(36 * captions / 128) == 47812


@pytest.mark.slow
@pytest.mark.parametrize("name", ["msrvtt", "activitynet"])  # the others are built of the same parts
def test_data_sets_build(name):
    config = plain(shrink(DATASETS[name].get_config()))
    stage = build_stage(config, "distilled", mesh())
    assert set(stage.template.params["terms"]) == {"sab"}  # only maps differ in width


def test_rows_are_the_posters():
    assert {row.name for row in poster.ROWS} == set(ablation.ROWS)
    assert len(poster.ROWS) == len(ablation.ROWS)
    letters = {t.split()[-1]: row.name for row in poster.ROWS for t in row.tables if "Contrib" in t}
    assert letters == ablation.LETTERS
    assert {name for claim in poster.ORDERINGS for name in (claim.lower, claim.higher)} <= set(ablation.ROWS)
    swept = (
        *("alone", "T", "T_S", "T_S_SAB", "T_S_SAB_CMG", "T_S_SAB_CM"),
        *("T_S_OL2OL", "T_S_TAB", "T_S_SAB_unmasked"),
    )
    assert swept == ablation.SWEEP


@pytest.mark.parametrize("row", ablation.ROWS)
def test_a_rows_terms_are_those_of_its_name(row):
    if row in ("teacher", "alone"):
        expected = []
    elif row.startswith("CLIPPING"):
        expected = ["temporal", "spatial", "sab", "global", "local"]
        expected = expected[1:] if row.endswith("without_T") else expected
    else:
        expected = []
        for part in row.removesuffix("_unmasked").split("_"):
            expected += {"CM": ["global", "local"], "CMG": ["global"]}.get(part) or [TERMS[part]]
    assert sorted(ablation.ROWS[row]) == sorted(expected)


@pytest.mark.parametrize("world", ["msrvtt", "shapes"])
def test_rows_differ_in_their_student_alone(world):
    rows = [row for row in WORLD_ROWS if row != "teacher"]
    configs = {row: ablation.get_config(f"{row},world={world}") for row in rows}
    first = configs["alone"].to_dict()
    for row, config in configs.items():
        student = config.stages.student
        assert bool(student.teacher) == bool(student.clip or student.terms) == (row != "alone")
        assert bool(student.clip) == ("local" in student.terms)
        other = config.to_dict()
        for same in ("teacher", "student", "data", "world", "seed"):
            assert other[same] == first[same]
        for stage in set(other["stages"]) - {"student"}:
            assert other["stages"][stage] == first["stages"][stage]
        ours = {k: v for k, v in other["stages"]["student"].items() if k not in OF_A_ROW}
        assert ours == {k: v for k, v in first["stages"]["student"].items() if k not in OF_A_ROW}
    masks = {row: configs[row].stages.student.terms.sab.mask for row in rows if "SAB" in row}
    assert masks.pop("T_S_SAB_unmasked") == "none" and set(masks.values()) == {"depth"}


def test_the_world_is_the_quickstarts():
    from configs import quickstart

    ours, theirs = ablation.get_config("T_S_SAB_CM,world=shapes"), quickstart.get_config()
    for field in ("world", "data", "teacher", "student", "seed"):
        assert plain(ours[field]) == plain(theirs[field])
    assert list(ours.stages) == ["clip", "teacher", "student"]
    assert ours.stages.student.clip == "stage:clip"
    for name in ("clip", "teacher"):
        assert plain(ours.stages[name]) == plain(theirs.stages[name])
    assert list(ablation.get_config("teacher,world=shapes").stages) == ["clip", "teacher"]
    assert list(ablation.get_config("teacher").stages) == ["teacher"]


def test_letters_and_the_default():
    assert ablation.get_config("F").stages.student.title == "T_S_SAB"
    assert ablation.get_config().stages.student.title == "T_S_SAB_CM"


@pytest.mark.parametrize(
    "argument, said",
    [
        ("H", "no row 'H'"),
        ("A,world=shape", "option 'world=shape'"),
        ("A,seed=1", "option 'seed=1'"),
        ("CLIPPING_tiny,world=shapes", "embedded world has one student"),
        ("A,world=shapes,reading=printed", "embedded world has one student"),
    ],
)
def test_mistakes(argument, said):
    with pytest.raises(ValueError, match=said):
        ablation.get_config(argument)
    with pytest.raises(ValueError, match=said):
        commands.read_config(f"{FILE}:{argument}", [])


def test_a_row_by_the_command_line():
    argument = "--config.stages.student.terms.sab.weight=2.0"
    config = commands.read_config(f"{FILE}:T_S_SAB,world=shapes", [argument])
    assert config["stages"]["student"]["terms"]["sab"]["weight"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("row", ["alone", "T_S_SAB_CM", "T_S_OL2OL", "T_S_TAB"])  # every term once
def test_the_worlds_rows_build(row):
    config = ablation.get_config(f"{row},world=shapes").to_dict()
    stage = build_stage(config, "student", mesh(), {"teacher": 700, "student": 700})
    clip, teacher = "local" in ablation.ROWS[row], row != "alone"
    assert list(stage.teachers) == ["teacher"] * teacher + ["clip"] * clip
    assert set(stage.template.params["terms"]) == {"sab", "tab", "ol2ol"} & set(ablation.ROWS[row])


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, reading, text, temporal",
    [
        ("CLIPPING", "swapped", 12, 4),
        ("CLIPPING", "printed", 4, 12),
        ("CLIPPING_without_T", "swapped", 12, 0),
        ("CLIPPING_tiny", "printed", 0, 12),
        ("CLIPPING_tiny_without_T", "swapped", 0, 0),
    ],
)
def test_the_students_of_table_1(row, reading, text, temporal):
    config = ablation.get_config(f"{row},reading={reading}").to_dict()
    module = stage_module(config, "student")
    batch = example_batch(config, "student", 1)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, method="complete"))["params"]
    block = 12 * 512**2 + 13 * 512
    assert count(params.get("temporal", {}).get("transformer", {})) == temporal * block
    if text:
        assert count(params["text"]["transformer"]) == text * block
    else:  # TinyBERT's encoder: 4,568,736
        assert count(params["text"]["encoder"]) == 4_568_736
        assert config["data"]["student_tokenizer"] == config["stages"]["student"]["init"]["text"]
    started = "" if not temporal or (not text and temporal > 4) else "text" if text else "stage:teacher"
    assert config["stages"]["student"]["init"]["temporal"] == started
