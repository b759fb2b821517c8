"""Devices to compile for that are not there: TPU slices, by libtpu, and NVIDIA GPUs, by JAX's CUDA plugin."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

LOCAL = "local"
# What the driver says of a GPU, by the name that a topology begins with. Figures: NVIDIA's H100 data sheet
# and CUDA's table of compute capabilities (9.0).
GPUS: dict[str, dict[str, Any]] = {
    "h100": {
        "device_description_str": "NVIDIA H100 80GB HBM3",
        "gpu_device_info": {
            "cuda_compute_capability": {"major": 9},
            "device_memory_size": 85_520_809_984,
            "memory_bandwidth": 3_352_320_000_000,
            "l2_cache_size": 52_428_800,
            "clock_rate_ghz": 1.98,
            "core_count": 132,
            "fpus_per_core": 128,
            "threads_per_core_limit": 2048,
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_core": 233_472,
            "shared_memory_per_block": 49_152,
            "shared_memory_per_block_optin": 232_448,
            "registers_per_core_limit": 65_536,
            "registers_per_block_limit": 65_536,
            "block_dim_limit_x": 2_147_483_647,
            "block_dim_limit_y": 65_535,
            "block_dim_limit_z": 65_535,
        },
    },
}


def is_gpu(topology: str) -> bool:
    """Whether a topology is of GPUs, "h100:8" say."""
    return topology.partition(":")[0] in GPUS


def without_a_device() -> None:
    """Keeps JAX on the CPU and libtpu from looking around for a TPU. Call before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken, so nothing needs the lock
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # or it complains that it cannot find out


def topology_devices(topology: str) -> Sequence[Any]:
    """The devices of a topology, abstract; or, for "local", this machine's.

    Args:
      topology: a TPU slice such as "v5e:4x4", or GPUs: "h100:8" is eight of one host.

    Raises:
      ModuleNotFoundError: libtpu, or JAX's CUDA plugin, is not installed.
      ValueError: no such topology is known.
    """
    import jax

    if topology == LOCAL:
        return jax.devices()
    return _gpus(topology) if is_gpu(topology) else _tpus(topology)


def compiler_options(topology: str) -> dict[str, Any]:
    """Options of the compiler for a topology."""
    # No GPU is there on which to time kernels: they are chosen by rule, and Triton's have no rule.
    return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False} if is_gpu(topology) else {}


def memory_limit(topology: str) -> int | None:
    """Bytes of memory of one device, None where the compiler itself watches over them."""
    gpu = GPUS.get(topology.partition(":")[0])
    return gpu["gpu_device_info"]["device_memory_size"] if gpu else None


def _tpus(topology: str) -> Sequence[Any]:
    import jax
    from jax.experimental import topologies

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
            f"topology {topology!r}: {error}. Slices are named like v5e:4x4, v6e:8x8, v4:2x2x4, v5p:4x4x4; "
            f"GPUs like {next(iter(GPUS))}:8"
        ) from error


def _gpus(topology: str) -> Sequence[Any]:
    from jax.experimental import topologies

    kind, _, count = topology.partition(":")
    if not re.fullmatch(r"[1-9]\d*", count):
        raise ValueError(f"topology {topology!r}: GPUs of one host are named like {kind}:8")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ModuleNotFoundError(
            f"compiling for {topology} needs JAX's CUDA plugin (and no GPU): "
            "pip install 'clipdistill_jax[cuda]'"
        )
    target = _text_proto({"platform_name": "CUDA", "runtime_version": {"major": 12, "minor": 9}} | GPUS[kind])
    described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    return described.devices


def _text_proto(message: dict[str, Any]) -> str:
    """A protocol buffer as text."""
    lines = []
    for name, value in message.items():
        if isinstance(value, dict):
            lines.append(f"{name} {{\n{_text_proto(value)}}}\n")
        else:
            lines.append(f'{name}: "{value}"\n' if isinstance(value, str) else f"{name}: {value}\n")
    return "".join(lines)
