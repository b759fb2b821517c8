"""Compiles a stage's training step ahead, for this machine or for a TPU slice that is not there.

    python -m clipdistill_jax.compile --config=configs/quickstart.py --topology=v5e:4x4

Prints what the step needs: memory, FLOPs, bytes, collectives, and the compiler's own estimate of its time.
A TPU slice needs the libtpu wheel (pip install 'clipdistill_jax[tpu]') and no TPU.
"""

import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from clipdistill_jax import commands

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LOCAL = "local"


def without_a_tpu() -> None:
    """Keeps JAX on the CPU and libtpu from looking around for a TPU. Call before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken, so nothing needs the lock
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # or it complains that it cannot find out


def topology_devices(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice such as "v5e:4x4", abstract; or, for "local", this machine's.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: libtpu knows no such slice.
    """
    import jax
    from jax.experimental import topologies

    if topology == LOCAL:
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"compiling for {topology} needs libtpu (and no TPU): pip install 'clipdistill_jax[tpu]'"
        )
    # JAX joins the two cores of a v4 chip into one device; libtpu has to be told.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology {topology!r}: {error}. Slices are named like v5e:4x4, v6e:8x8, v4:2x2x4, v5p:4x4x4"
        ) from error


def compile_stage(config: Any, name: str, topology: str = LOCAL) -> dict[str, Any]:
    """Compiles the training step of a stage and says what it needs.

    Args:
      config: of the experiment; its `mesh` is laid over the devices.
      name: of the stage.
      topology: see `topology_devices`.

    Returns:
      json-able. Memory in bytes, `flops` and `bytes_accessed` are those of one device; all devices run the
      same program. The compiler counts the body of a loop once, however often it runs: `loops` says how many
      loops there are. `estimated_seconds` is None where the compiler gives no time; see `estimated_time`.

    Raises:
      ValueError: an unknown stage or topology, a mesh or a batch that does not divide over the devices, a
        step that does not fit into a device's memory.
      ModuleNotFoundError: libtpu is not installed.
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
            compiled = stage.step.lower(stage.template, stage.frozen, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = "\n".join(str(error).splitlines()[:3])
        raise ValueError(
            f"stage {name!r} does not fit into the memory of {topology}; use more chips, a smaller "
            f"batch_size, more chunks, remat or the fsdp axis. The compiler says: {said}"
        ) from error
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
        "seconds_to_compile": time.perf_counter() - start,
        **describe(compiled),
        "versions": commands.versions(),
        "config": plain(config),
    }


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
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
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
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
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
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    once = f" (each of {report['loops']} loops counted once)" if report["loops"] else ""
    kinds = [f"{kind} {count}" for kind, count in report["collectives"].items() if count]
    estimate = "none given by this backend's compiler"
    if report["estimated_seconds"] is not None:
        estimate = f"{1000 * report['estimated_seconds']:.4g} ms a step, a lower bound"
        if report["not_estimated"]:
            estimate += f"; without {report['not_estimated']} operations that it gives no time for"
    rows = [
        ("devices", f"{device['count']} x {device['kind']} on {device['chips']} chips ({mesh})"),
        ("batch", f"{report['batch_size']} clips, {report['batch_size'] * _share(report):g} {a}"),
        (f"memory {a}", f"{commands.amount(memory['total'], 'B')}"),
        *((f"  {part}", commands.amount(memory[part], "B")) for part in memory if part != "total"),
        (f"FLOPs {a}", commands.amount(report["flops"], "FLOP") + once),
        (f"bytes {a}", commands.amount(report["bytes_accessed"], "B") + once),
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
    parser.add_argument("--topology", default=LOCAL, help="a TPU slice such as v5e:4x4, or local")
    args, overrides = parser.parse_known_args(argv)
    if args.topology != LOCAL:
        without_a_tpu()

    def work() -> str:
        config = commands.read_config(args.config, overrides)
        report = compile_stage(config, commands.stage_name(config, args.stage), args.topology)
        commands.write_json(args.json, report)
        return say(report)

    return commands.run(work)


if __name__ == "__main__":
    sys.exit(main())
