"""Compiling ahead: for this machine with its eight devices, and for others in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from clipdistill_jax import commands, compile, topology

CONFIG = Path(__file__).with_name("tiny_config.py")


def config(*overrides):
    return commands.read_config(str(CONFIG), overrides)


@pytest.fixture(scope="module")
def eight():
    return compile.compile_stage(config(), "distilled")


def test_every_number_is_there(eight):
    memory = eight["memory"]
    assert all(memory[part] > 0 for part in ("arguments", "outputs", "aliases", "temporaries", "total"))
    parts = memory["arguments"] + memory["outputs"] + memory["temporaries"] + memory["code"]
    assert memory["total"] == parts - memory["aliases"]
    assert eight["flops"] > 0 and eight["bytes_accessed"] > 0
    assert eight["estimated_seconds"] is None  # the CPU compiler gives none
    assert eight["device"]["count"] == 8 and eight["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert eight["config"]["stages"]["distilled"]["teacher"] == "alone"


def test_the_state_is_donated(eight):
    # Parameters and both moments go out where they came in; only the metrics are new.
    memory = eight["memory"]
    assert 0.9 * memory["outputs"] < memory["aliases"] < memory["outputs"]


def test_numbers_are_those_of_one_device(eight, monkeypatch):
    monkeypatch.setattr(compile, "topology_devices", lambda _: jax.devices()[:1])
    one = compile.compile_stage(config(), "distilled")
    # The encoders' work divides by 8; the optimizer's and the similarity's does not.
    assert 3 < one["flops"] / eight["flops"] <= 8
    assert sum(one["collectives"].values()) == 0
    assert eight["collectives"]["all-reduce"] > 0


def test_the_table(eight):
    said = compile.say(eight)
    assert "8 x cpu" in said and "8 clips, 1 a device" in said and "all-reduce" in said
    assert "none given by this backend's compiler" in said


def test_batch_that_does_not_divide(capsys):
    args = [f"--config={CONFIG}", "--stage=alone", "--config.stages.alone.batch_size=12"]
    assert compile.main(args) == 1
    said = capsys.readouterr().err
    assert "12 does not divide over 8 devices" in said and "--config.stages.alone.batch_size=16" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--stage=nope"], "no stage 'nope'"),
        (["--config.student.widht=8"], 'no such field: widht. Did you mean "width"'),
        (["--config.seed=red"], "--config.seed=red"),
        (["--topolgy=v5e:4x4"], "unexpected argument '--topolgy=v5e:4x4'"),
        (["--config.mesh.data=3"], "needs 3 devices, but there are 8"),
    ],
)
def test_mistakes_are_told(arguments, said, capsys):
    assert compile.main([f"--config={CONFIG}", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_config_file_that_is_not_there(capsys):
    assert compile.main(["--config=no_such_config.py"]) == 1
    assert "no_such_config.py" in capsys.readouterr().err


@pytest.mark.parametrize("name, extra", [("v5e:4x4", "tpu"), ("h100:1", "cuda")])
def test_without_the_compiler(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'clipdistill_jax\[{extra}\]'"):
        topology.topology_devices(name)


@pytest.mark.parametrize("name", ["h100", "h100:0", "h100:2x4"])
def test_unknown_number_of_gpus(name):
    with pytest.raises(ValueError, match=f"'{name}': GPUs of one host are named like h100:8"):
        topology.topology_devices(name)


def test_step_too_large_for_a_gpu():
    compile.check_memory("alone", "h100:1", 80_000_000_000)
    compile.check_memory("alone", "v5e:4x4", 10**12)  # libtpu has seen to it
    with pytest.raises(ValueError, match=r"'alone' does not fit .* h100:1.*: it takes 90 GB of 85.52 GB"):
        compile.check_memory("alone", "h100:1", 90_000_000_000)


def test_collectives_count_once_a_channel():
    hlo = """
  %all-reduce.1 = f32[4]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %all-reduce-start.2 = (f32[4]{0}, f32[4]{0}) all-reduce-start(%x), channel_id=2, to_apply=%add
  %all-reduce-done.2 = f32[4]{0} all-reduce-done(%all-reduce-start.2)
  %all-gather.5 = bf16[8]{0} all-gather(%y), channel_id=3, dimensions={0}
  %all-gather.6 = bf16[8]{0} all-gather(%z), channel_id=3, dimensions={0}
  %collective-permute.1 = f32[4]{0} collective-permute(%all-reduce.1), source_target_pairs={{0,1}}
  ROOT %fusion = f32[4]{0} fusion(%all-gather.5), kind=kLoop
"""
    found = {kind: count for kind, count in compile.count_collectives(hlo).items() if count}
    assert found == {"all-reduce": 2, "all-gather": 1, "collective-permute": 1}


def test_operations_without_an_estimate():
    assert compile.estimated_time({}) == (None, 0)
    assert compile.estimated_time({"optimal_seconds": 0.25}) == (0.25, 0)
    seconds, unknown = compile.estimated_time({"optimal_seconds": -3 + 0.25})
    assert (seconds, unknown) == (0.25, 3)


def compile_for(name, *arguments):
    """The command for a topology, as a process."""
    packages = ("jax_cuda12_plugin", "jax_cuda13_plugin") if topology.is_gpu(name) else ("libtpu",)
    if not any(importlib.util.find_spec(package) for package in packages):
        pytest.skip(f"none of {', '.join(packages)} is installed")
    command = [sys.executable, "-m", "clipdistill_jax.compile", f"--config={CONFIG}", f"--topology={name}"]
    env = {**os.environ, "XLA_FLAGS": ""}  # libtpu refuses flags for a CPU
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=CONFIG.parents[1], env=env
    )


def compiled_for(name, folder):
    """(report, what is printed) of a stage that compiles for a topology of several devices."""
    file = folder / "report.json"
    done = compile_for(name, "--stage=alone", f"--json={file}")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["collectives"]["all-reduce"] > 0 and report["memory"]["total"] > 0
    return report, done.stdout


def test_tpu_slice(tmp_path):
    report, said = compiled_for("v5e:2x2", tmp_path)
    assert report["device"] == {"kind": "TPU v5 lite", "count": 4, "chips": 4}
    assert report["flops"] > 0
    assert 0 < report["estimated_seconds"] < 1 and report["estimated_cycles"] > 0
    assert "2 a chip" in said and "ms a step" in said


def test_gpus(tmp_path):
    report, said = compiled_for("h100:2", tmp_path)
    assert report["device"] == {"kind": "NVIDIA H100 80GB HBM3", "count": 2, "chips": 2}
    assert report["flops"] is None and "not counted" in said


def test_unknown_slice():
    done = compile_for("v5e:5x7", "--stage=alone")
    assert done.returncode == 1
    assert "error: topology 'v5e:5x7'" in done.stderr and "v5e:4x4" in done.stderr
