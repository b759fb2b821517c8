"""The device mesh, where arrays live on it, and starting several hosts.

One mesh with three axes serves every size of run: `data` copies the parameters, `fsdp` splits them by
size, `tensor` splits them by rule. The batch is split over `data` and `fsdp` together. Everything is
`jit` over `NamedSharding`; XLA inserts the collectives.
"""

import glob
import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Below 4 MB of float32 a parameter costs less to copy than to gather.
FSDP_MIN_SIZE = 2**20

Rule = tuple[str, Sequence[Any]]  # (regex on the path, one entry a dimension: axis name(s) or None)

T = TypeVar("T")


def path_name(path: Any) -> str:
    """`student/vision/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh. `data=-1` takes every device that the other axes leave.

    Devices in several slices (TPU multislice, hosts of GPUs) are joined along `data`, the axis that
    talks least. The axes are of type Auto; enter the mesh with `jax.set_mesh(mesh)`.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if fsdp < 1 or tensor < 1 or data == 0 or data < -1:
        raise ValueError(f"mesh axes are positive (data may be -1); got {data=}, {fsdp=}, {tensor=}")
    if data == -1:
        data = max(len(devices) // (fsdp * tensor), 1)
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"a mesh of data {data} x fsdp {fsdp} x tensor {tensor} needs {data * fsdp * tensor} devices, "
            f"but there are {len(devices)}"
        )
    auto = (AxisType.Auto,) * len(AXES)  # stated: make_mesh makes Explicit axes by default
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=auto, devices=devices)
    return Mesh(_join_slices((data, fsdp, tensor), slices, devices), AXES, axis_types=auto)


def _join_slices(shape: tuple[int, int, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    data, fsdp, tensor = shape
    if data % slices:
        raise ValueError(f"the data axis ({data}) must be a multiple of the number of slices ({slices})")
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the first dimension over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def infer_sharding(
    tree: Any, mesh: Mesh, rules: Sequence[Rule] = (), fsdp_min_size: int = FSDP_MIN_SIZE
) -> Any:
    """A tree of `NamedSharding` for a tree of shapes.

    Args:
      tree: arrays or `ShapeDtypeStruct`s.
      mesh: made by `make_mesh`.
      rules: (regex, spec) pairs searched in the path; the first match wins. A spec has one entry for each
        leading dimension: an axis name, a tuple of names, or None.
      fsdp_min_size: after the rules, an array of at least this many elements is split over `fsdp`
        along its largest free dimension that divides.

    Raises:
      ValueError: a rule names an unknown axis, has too many entries or does not divide its dimension.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name, shape = path_name(path), leaf.shape
        rule = next((rule for rule in rules if re.search(rule[0], name)), None)
        spec = list(rule[1]) if rule else []
        if rule:
            _check_rule(rule, name, shape, mesh)
        spec += [None] * (len(shape) - len(spec))
        fsdp = mesh.shape["fsdp"]
        taken = "fsdp" in (axis for entry in spec for axis in _axes(entry))
        if fsdp > 1 and not taken and math.prod(shape) >= fsdp_min_size:
            free = [i for i, n in enumerate(shape) if spec[i] is None and n % fsdp == 0]
            if free:
                spec[max(free, key=lambda i: shape[i])] = "fsdp"
            else:
                logging.warning("%s %s: no free dimension divides over %d devices; copied", name, shape, fsdp)
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _check_rule(rule: Rule, name: str, shape: Sequence[int], mesh: Mesh) -> None:
    what = f"sharding rule {rule[0]!r} -> {tuple(rule[1])} on {name} of shape {tuple(shape)}"
    if len(rule[1]) > len(shape):
        raise ValueError(f"{what}: more entries than dimensions")
    for size, entry in zip(shape, rule[1], strict=False):
        unknown = [axis for axis in _axes(entry) if axis not in mesh.shape]
        if unknown:
            raise ValueError(f"{what}: the mesh has no axis {unknown[0]!r}, only {tuple(mesh.shape)}")
        ways = math.prod(mesh.shape[axis] for axis in _axes(entry))
        if size % ways:
            raise ValueError(f"{what}: {size} does not divide over {ways} devices")


def like_params(tree: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings for optimizer state: a leaf that mirrors a parameter lies where the parameter does.

    A leaf mirrors a parameter when its path ends with the parameter's path and the shapes agree;
    everything else (counters, factored moments) is copied to every device.
    """
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    placed = named_leaves(param_shardings)

    def place(path: Any, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            name = path_name(path[start:])
            if shapes.get(name) == leaf.shape:
                return placed[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def shape_structs(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s that carry shardings: a template for restoring, or for compiling ahead."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings
    )


def place_tree(tree: Any, shardings: Any) -> Any:
    """Puts host arrays that every process holds whole (say, read weights) where `shardings` says."""

    def place(x: Any, sharding: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows [b, ...] of a batch on its devices, as global arrays [B, ...].

    Raises:
      ValueError: the rows do not divide over this process's share of the data and fsdp axes.
    """
    sharding = batch_sharding(mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = process_parts(mesh)[1]
    placed = {}
    for key, x in batch.items():
        x = np.asarray(x)
        if x.ndim == 0 or (x.shape[0] * parts) % ways:
            raise ValueError(
                f"batch[{key!r}] of shape {x.shape} on each of {parts} process(es) does not divide over "
                f"{ways} devices (data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']})"
            )
        placed[key] = jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * parts, *x.shape[1:]))
    return placed


def process_parts(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which part of every global batch this process must bring.

    Processes joined by the tensor axis bring the same part, so this is not always
    (`jax.process_index()`, `jax.process_count()`).

    Raises:
      ValueError: this process's devices hold rows that are not one equal, contiguous part.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = batch_sharding(mesh).addressable_devices_indices_map((ways,))
    return _one_part(sorted({index[0].indices(ways)[0] for index in rows.values() if index}), ways)


def _one_part(held: list[int], ways: int) -> tuple[int, int]:
    if held != list(range(held[0], held[0] + len(held))) or ways % len(held) or held[0] % len(held):
        raise ValueError(f"this process holds parts {held} of {ways} of the batch: not one equal part")
    return held[0] // len(held), ways // len(held)


def first_host_says(value: int | None) -> int | None:
    """One host's small number (not negative), on every host: they must not decide differently."""
    if jax.process_count() == 1:
        return value
    said = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
    return None if said < 0 else said


def init_distributed(environ: Mapping[str, str] | None = None) -> bool:
    """Joins the other processes of this job, if there are others. Call before anything touches a device.

    In this order: CLIPDISTILL_COORDINATOR (host:port), CLIPDISTILL_NUM_PROCESSES and
    CLIPDISTILL_PROCESS_ID say it all; a Slurm job of several tasks; a TPU host. The last two are read
    by `jax.distributed.initialize` itself.

    Returns:
      Whether `jax.distributed` was started.

    Raises:
      ValueError: only some of the three variables are set.
    """
    env = os.environ if environ is None else environ
    names = ("CLIPDISTILL_COORDINATOR", "CLIPDISTILL_NUM_PROCESSES", "CLIPDISTILL_PROCESS_ID")
    if any(name in env for name in names):
        missing = [name for name in names if name not in env]
        if missing:
            raise ValueError(f"set {', '.join(missing)} too: {', '.join(names)} go together")
        jax.distributed.initialize(env[names[0]], int(env[names[1]]), int(env[names[2]]))
        return True
    slurm = int(env.get("SLURM_NTASKS", env.get("SLURM_NPROCS", "1"))) > 1 and "SLURM_STEP_NODELIST" in env
    if slurm or _on_tpu(env):
        jax.distributed.initialize()
        return True
    return False


def _on_tpu(env: Mapping[str, str]) -> bool:
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def first_host_first(work: Callable[[], T]) -> T:
    """Calls `work` on the first host, then on the others: where they share a disk, it is written once."""
    first = jax.process_index() == 0
    try:
        if not first:
            wait_for_all()
        return work()
    finally:
        if first:
            wait_for_all()


def wait_for_all() -> None:
    """Returns when every host has called it."""
    first_host_says(0)


def fetch(tree: Any) -> Any:
    """Global arrays as whole host arrays, on every host; all of them must call it."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)
