"""Sizes of modules against counts by hand and CLIPPING's Table 2."""

import json
from pathlib import Path

import pytest

from clipdistill_jax import commands
from clipdistill_jax.experiment import stage_module
from clipdistill_jax.report import poster
from clipdistill_jax.report.__main__ import main
from clipdistill_jax.report.sizes import model_sizes, module_sizes, stage_sizes

TINY = str(Path(__file__).parents[1] / "tiny_config.py")
VOCAB = {"teacher": 600, "student": 600}
SEQ = "--config.student.temporal.kind=seqTransf"


def block(width):
    """Parameters of a transformer block: four square matrices, two of four times the width, biases, norms."""
    return 12 * width**2 + 13 * width


@pytest.fixture(scope="module")
def tiny():
    config = commands.read_config(TINY, [SEQ])
    return config, stage_module(config, "distilled", VOCAB)


def test_modules_add_up_to_the_model(tiny):
    config, module = tiny
    sizes = {size.name: size for size in module_sizes(module, config, "distilled")}
    whole = model_sizes(module, config, "distilled")
    assert {name: size.parameters for name, size in sizes.items()} == whole["parameters"]
    # The rest is the pooling of two frames of 16 numbers: well under 500 operations.
    rest = whole["flops_clip"] - sizes["vision"].flops - sizes["temporal"].flops
    assert 0 <= rest < 500
    assert 0 < sizes["text"].flops <= whole["flops_caption"]


def test_counts_by_hand(tiny):
    config, module = tiny
    sizes = {size.name: size for size in module_sizes(module, config, "distilled")}
    assert sizes["temporal"].counted == 4 * block(16)
    assert sizes["temporal"].parameters == 4 * block(16) + 77 * 16
    # Two matrices of 16 x 32 in place of 16 x 64, their biases likewise.
    assert sizes["text"].counted == block(16) - 2 * 16 * 32 - 32
    norm, tables, projection = 2 * 16, (600 + 8) * 16, 16 * 16
    assert sizes["text"].parameters == sizes["text"].counted + norm + tables + projection
    assert sizes["logit_scale"].parameters == 1 and sizes["logit_scale"].flops == 0


def test_a_head_without_parameters_costs_nothing():
    config = commands.read_config(TINY, [])
    sizes = {s.name: s for s in module_sizes(stage_module(config, "distilled", VOCAB), config, "distilled")}
    assert sizes["temporal"].parameters == 0 and sizes["temporal"].flops == 0


def test_the_command(tmp_path, capsys):
    file = tmp_path / "sizes.json"
    assert main(["sizes", f"--config={TINY}", f"--json={file}", SEQ]) == 0
    said = capsys.readouterr().out
    assert "stage distilled" in said
    modules = {m["name"]: m for m in json.loads(file.read_text())["modules"]}
    assert f"{modules['vision']['parameters']:,}" in said and f"{modules['text']['counted']:,}" in said
    assert main(["sizes", f"--config={TINY}", "--stage=nothing"]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_clippings_student_is_that_of_table_2_with_two_labels_swapped():
    from configs.clipping import msrvtt

    table, numbers = stage_sizes(msrvtt.get_config().to_dict(), "distilled")
    sizes = {m["name"]: m for m in numbers["modules"]}
    assert numbers["frames"] == poster.FRAMES
    assert sizes["vision"]["parameters"] == 4_388_841 + 512 * 512 + 512
    assert sizes["temporal"]["counted"] == 12_609_536 and sizes["text"]["counted"] == 37_828_608
    swapped = poster.READINGS["labels swapped"]
    for name, part in (("vision", "vision"), ("temporal", "temporal"), ("text", "clip")):
        # Three digits of the poster's: 4.5M against 4.65M with the projection, 16.8G against 16.9G.
        assert sizes[name]["counted"] == pytest.approx(swapped[part].parameters, rel=0.04)
        assert sizes[name]["flops"] / 2 == pytest.approx(swapped[part].flops, rel=0.06)
    assert len(table.columns) == 7
