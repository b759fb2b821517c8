"""Compiles a stage's training step ahead, for this machine or for TPUs and GPUs that are not there.

    python -m clipdistill_jax.compile --config=configs/quickstart.py --topology=v5e:4x4

Prints what the step needs: memory, FLOPs, bytes, collectives, and the compiler's own estimate of its time.
A TPU slice such as v5e:4x4 needs the libtpu wheel (pip install 'clipdistill_jax[tpu]') and no TPU; GPUs such
as h100:1 need JAX's CUDA plugin (pip install 'clipdistill_jax[cuda]') and no GPU.
"""

import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from clipdistill_jax import commands
from clipdistill_jax.topology import LOCAL, compiler_options, memory_limit, topology_devices, without_a_device

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def compile_stage(config: Any, name: str, topology: str = LOCAL) -> dict[str, Any]:
    """Compiles the training step of a stage and says what it needs.

    Args:
      config: of the experiment; its `mesh` is laid over the devices.
      name: of the stage.
      topology: see `topology.topology_devices`.

    Returns:
      json-able. Memory in bytes, `flops` and `bytes_accessed` are those of one device; all devices run the
      same program; they are None where the compiler does not count them (for GPUs that are not there). It
      counts the body of a loop once, however often it runs: `loops` says how many loops there are.
      `estimated_seconds` is None where the compiler gives no time; see `estimated_time`.

    Raises:
      ValueError: an unknown stage or topology, a mesh or a batch that does not divide over the devices, a
        step that does not fit into a device's memory.
      ModuleNotFoundError: the compiler is not installed.
    """
    import jax

    from clipdistill_jax.experiment import build_stage, plain
    from clipdistill_jax.train import sharding

    devices = topology_devices(topology)
    mesh = sharding.make_mesh(**plain(config["mesh"]), devices=devices)
    stage = build_stage(config, name, mesh, commands.vocab(config))
    batch = abstract_batch(config, stage, mesh)
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            lowered = stage.step.lower(stage.template, stage.frozen, batch)
            compiled = lowered.compile(compiler_options(topology))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = "\n".join(str(error).splitlines()[:3])
        raise ValueError(f"{_too_large(name, topology)}. The compiler says: {said}") from error
    needs = describe(compiled)
    check_memory(name, topology, needs["memory"]["total"])
    return {
        "stage": name,
        "topology": topology,
        "device": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "chips": len({tuple(getattr(d, "coords", (d.id,))) for d in devices}),
        },
        "mesh": dict(mesh.shape),
        "batch_size": stage.config["batch_size"],
        "unit": stage.system.unit,
        "seconds_to_compile": time.perf_counter() - start,
        **needs,
        "versions": commands.versions(),
        "config": plain(config),
    }


def check_memory(name: str, topology: str, total: int) -> None:
    """Raises ValueError where a step needs more bytes of a device than it has; libtpu sees to that itself."""
    limit = memory_limit(topology)
    if limit is not None and total > limit:
        takes = f"it takes {commands.amount(total, 'B')} of {commands.amount(limit, 'B')}"
        raise ValueError(f"{_too_large(name, topology)}: {takes}")


def _too_large(name: str, topology: str) -> str:
    return (
        f"stage {name!r} does not fit into the memory of {topology}; use more chips, a smaller batch_size, "
        "more chunks, remat or the fsdp axis"
    )


def abstract_batch(config: Any, stage: Any, mesh: Any) -> dict[str, Any]:
    """The global batch of a built stage, as shapes with shardings.

    Raises:
      ValueError: it does not divide over the mesh.
    """
    import jax

    from clipdistill_jax.experiment import cached_example, example_batch
    from clipdistill_jax.train import sharding

    name, size = stage.name, stage.config["batch_size"]
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % ways:
        data, fsdp, fits = mesh.shape["data"], mesh.shape["fsdp"], -(-size // ways) * ways
        raise ValueError(
            f"stage {name!r}: batch_size {size} does not divide over {ways} devices "
            f"(data {data} x fsdp {fsdp}); try --config.stages.{name}.batch_size={fits}"
        )
    shapes = jax.eval_shape(lambda: {**example_batch(config, name, size), **cached_example(stage, size)})
    return sharding.shape_structs(shapes, dict.fromkeys(shapes, sharding.batch_sharding(mesh)))


def describe(compiled: Any) -> dict[str, Any]:
    """Memory, cost and collectives of a compiled program; of one device, as XLA divided it."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    cost = compiled.cost_analysis() or {}
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliases": memory.alias_size_in_bytes,  # outputs that lie where arguments were: donated
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    cycles = [int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    seconds, unknown = estimated_time(cost)
    return {
        "memory": {**parts, "total": sum(parts.values()) - 2 * parts["aliases"]},
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "loops": len(re.findall(r"\swhile\(", text)),
        "collectives": count_collectives(text),
        "estimated_seconds": seconds,
        "not_estimated": unknown,
        "estimated_cycles": sum(cycles) or None,
    }


def count_collectives(text: str) -> dict[str, int]:
    """How many collectives of each kind a program (HLO text) has.

    Pieces of one collective (its start, clones that run beside other work) share a channel and count once.
    """
    kinds = "|".join(COLLECTIVES)
    found: dict[str, set[str]] = {kind: set() for kind in COLLECTIVES}
    for line in text.splitlines():
        if match := re.search(rf"(%?[\w.-]+) = .*?[\s)]({kinds})(?:-start)?\(", line):
            channel = re.search(r"channel_id=(\d+)", line)
            found[match[2]].add(channel[1] if channel else match[1])
    return {kind: len(channels) for kind, channels in found.items()}


def estimated_time(cost: Mapping[str, float]) -> tuple[float | None, int]:
    """(seconds, how many operations they leave out) from the compiler's cost analysis, or (None, 0).

    XLA's roofline, `optimal_seconds`: every operation at the peak of the FLOPs or the memory that it needs,
    so a lower bound. An operation that it cannot judge enters as -1 s (xla/service/hlo_cost_analysis.cc,
    HandleCustomCall), which makes the sum negative: the whole seconds below zero are taken off again.
    """
    seconds = cost.get("optimal_seconds")
    if seconds is None:
        return None, 0
    unknown = max(math.ceil(-seconds), 0)
    return seconds + unknown, unknown


def say(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    device, memory = report["device"], report["memory"]
    a = "a chip" if device["chips"] == device["count"] and report["topology"] != LOCAL else "a device"
    chips = f"{device['chips']} chip{'s' * (device['chips'] != 1)}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    once = f" (each of {report['loops']} loops counted once)" if report["loops"] else ""
    kinds = [f"{kind} {count}" for kind, count in report["collectives"].items() if count]

    def counted(name: str, unit: str) -> str:
        return "not counted" if report[name] is None else commands.amount(report[name], unit) + once

    estimate = "none given by this backend's compiler"
    if report["estimated_seconds"] is not None:
        estimate = f"{1000 * report['estimated_seconds']:.4g} ms a step, a lower bound"
        if report["not_estimated"]:
            estimate += f"; without {report['not_estimated']} operations that it gives no time for"
    rows = [
        ("devices", f"{device['count']} x {device['kind']} on {chips} ({mesh})"),
        ("batch", f"{report['batch_size']} {report['unit']}, {report['batch_size'] * _share(report):g} {a}"),
        (f"memory {a}", f"{commands.amount(memory['total'], 'B')}"),
        *((f"  {part}", commands.amount(memory[part], "B")) for part in memory if part != "total"),
        (f"FLOPs {a}", counted("flops", "FLOP")),
        (f"bytes {a}", counted("bytes_accessed", "B")),
        ("collectives", ", ".join(kinds) or "none"),
        ("compiler's estimate", estimate),
    ]
    if report["estimated_cycles"]:
        cycles = commands.amount(report["estimated_cycles"], "cycles")
        rows.append(("", f"{cycles} of its fusions, without collectives{once}"))
    rows.append(("compiled in", f"{report['seconds_to_compile']:.1f} s"))
    return commands.table(f"stage {report['stage']}, training step for {report['topology']}", rows)


def _share(report: Mapping[str, Any]) -> float:
    return 1 / (report["mesh"]["data"] * report["mesh"]["fsdp"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = commands.parser("clipdistill_jax.compile", __doc__)
    parser.add_argument("--topology", default=LOCAL, help="v5e:4x4, h100:1 or such, or local")
    args, overrides = parser.parse_known_args(argv)
    if args.topology != LOCAL:
        without_a_device()

    def work() -> str:
        config = commands.read_config(args.config, overrides)
        report = compile_stage(config, commands.stage_name(config, args.stage), args.topology)
        commands.write_json(args.json, report)
        return say(report)

    return commands.run(work)


if __name__ == "__main__":
    sys.exit(main())
