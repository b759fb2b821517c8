"""A frozen model's vectors, computed once over the training data and joined to its batches by id.

A cache is a folder. cache.json says what the vectors are, and of what; KIND-LO-HI.arrayrecord holds rows LO
.. HI-1 of a kind (clips, captions; images, texts), a record each: the bytes of its fields one after another.
A file is written under another name and renamed when it is whole, so a build that was killed goes on where
it was. Hosts write ranges of their own into one folder that all of them read; their number may change.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from clipdistill_jax.distill.cache_files import (
    RAGGED,
    CacheError,
    Layout,
    Records,
    Vectors,
    fixed_sizes,
    read_manifest,
    unpack,
    write_files,
    write_manifest,
)
from clipdistill_jax.models.features import Batch, Features

# The entry of a batch that says which rows of a kind are the batch's.
ID_OF = {"clips": "clip_id", "captions": "example_id", "images": "image_id", "texts": "example_id"}
# A score is up to 100 times a cosine of two of these. In bfloat16 it could be off by 100 * 2 * 2^-8 = 0.8; in
# float32 they are still small beside frames and words.
EXACT = ("video", "text", "image")


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache holds, and of what.

    Attributes:
      fingerprint: of the frozen model's variables.
      data: what the vectors depend on beside the model.
      sizes: rows of each kind, such as {"clips": N, "captions": M}; the ids run from 0.
      layouts: {kind: {field: (shape without the batch, dtype)}}, in the records' order.
      chosen: {kind: ascending ids} where only these are kept.
    """

    fingerprint: str
    data: Mapping[str, str | int]
    sizes: Mapping[str, int]
    layouts: Mapping[str, Layout]
    chosen: Mapping[str, Int[np.ndarray, " _n"]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for layout in self.layouts.values():
            for name, mask in RAGGED.items():
                if name in layout and mask not in layout:
                    raise ValueError(f"field {name!r} is kept where {mask!r} is True: keep that too")

    def facts(self) -> dict[str, str | int]:
        """All of it by name. Two caches are the same where these are."""
        fields = {
            f"{kind}/{name}": f"{dtype}{list(shape)}" + (f" where {RAGGED[name]}" if name in RAGGED else "")
            for kind, layout in self.layouts.items()
            for name, (shape, dtype) in layout.items()
        }
        chosen = {
            f"{kind}/ids": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
            for kind, ids in self.chosen.items()
        }
        return {"fingerprint": self.fingerprint, **self.data, **self.sizes, **fields, **chosen}

    def ids(self, kind: str, places: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
        """The ids of a kind's rows; -1 stays."""
        if kind not in self.chosen:
            return places
        return np.where(places >= 0, self.chosen[kind][np.maximum(places, 0)], -1)

    def places(self, kind: str, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The rows of a kind's ids. Raises CacheError for an id that is not among the chosen."""
        if kind not in self.chosen:
            return ids
        chosen = self.chosen[kind]
        places = np.minimum(np.searchsorted(chosen, ids), len(chosen) - 1)
        if len(missing := ids[chosen[places] != ids]):
            raise CacheError(
                f"the batch has the id {missing[0]}, which is none of the {len(chosen)} {kind} of the cache"
            )
        return places

    def folder(self, root: Path) -> Path:
        """Where this cache lies under `root`: other facts, another folder."""
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()
        return root / f"{self.fingerprint}-{digest[:8]}"

    def zeros(self, size: int, name: str = "teacher", slots: int | None = None) -> dict[str, np.ndarray]:
        """What `TeacherCache.lookup` gives for a batch of `size`, all zero: to compile with."""
        found: dict[str, np.ndarray] = {}
        for layout in self.layouts.values():
            record = bytes(sum(fixed_sizes(layout).values()))
            values = unpack(layout, [record] * size, slots) if layout else {}
            found |= {f"{name}/{field}": value for field, value in values.items()}
        return found


def layout_of(features: Features, names: Sequence[str], dtype: str) -> Layout:
    """How the named fields are kept: `EXACT` ones in float32, masks as bool, others in `dtype`.

    Raises:
      ValueError: dtype is not "bfloat16" or "float32".
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; a cache's can be 'bfloat16' or 'float32'")
    kept = {name: getattr(features, name) for name in names}
    return {
        name: (tuple(x.shape[1:]), "bool" if x.dtype == bool else "float32" if name in EXACT else dtype)
        for name, x in kept.items()
    }


def build_cache(
    folder: Path,
    spec: CacheSpec,
    vectors: Mapping[str, Vectors],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    agree: Callable[[int], int | None] = lambda value: value,
    scalars: Mapping[str, float] | None = None,
    steps_per_file: int = 32,
) -> None:
    """Computes what is missing of a cache. Every host calls it; returns when all of it is there.

    Args:
      folder: on a disk that every host sees, see `CacheSpec.folder`.
      spec: what it is to hold.
      vectors: by kind, ids [steps, b] (-1 on rows that only fill a batch) -> for each step this host's
        vectors, {field: [b, ...]}. See `computed_vectors`.
      batch_size: rows of a step on all hosts together.
      process_index: this host.
      process_count: hosts; each takes a range of every file's ids, and all take equally many steps.
      agree: one host's number, on every host (`train.sharding.first_host_says`), when all have called it.
      scalars: further facts of the model, written once (say, its logit_scale).
      steps_per_file: what a kill can cost.

    Raises:
      CacheError: the folder holds something else; the vectors are not finite, or of another shape.
    """
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must divide over the {process_count} processes")
    folder.mkdir(parents=True, exist_ok=True)
    if process_index == 0 and all(path.suffix == ".partial" for path in folder.iterdir()):
        write_manifest(folder, spec.facts(), scalars or {})
    agree(0)  # nobody looks before the first host has written
    read_manifest(folder, spec.facts())
    rows = batch_size // process_count
    for kind, layout in spec.layouts.items():
        if not layout:
            continue
        size, there = spec.sizes[kind], Records(folder, kind, spec.sizes[kind])
        todo = []
        for start in range(0, size, batch_size * steps_per_file):
            stop = min(start + batch_size * steps_per_file, size)
            # All hosts must take the same steps, whatever each of them sees on the disk.
            if not agree(int(there.has(start, stop))):
                steps = -(-(stop - start) // batch_size)
                ids = start + process_index * steps * rows + np.arange(steps * rows)
                todo.append(np.where(ids < stop, ids, -1).reshape(steps, rows))
        if todo:
            missing = sum(int((ids >= 0).sum()) for ids in todo)
            logging.info("cache %s: %d of %d %s to compute on this host", folder, missing, size, kind)
            write_files(folder, kind, layout, todo, vectors[kind], partial(spec.ids, kind))
    agree(0)  # all hosts have written
    if process_index == 0:
        TeacherCache(folder, spec)  # raises what is missing
        for left in folder.glob("*.partial"):  # by builds that were killed
            left.unlink(missing_ok=True)


class TeacherCache:
    """A whole cache, open for reading.

    Attributes:
      name: of the model in batches: its fields are NAME/frames ...
      scalars: further facts of the model.
    """

    def __init__(self, folder: Path, spec: CacheSpec, name: str = "teacher") -> None:
        """Opens a folder that `build_cache` made.

        Raises:
          CacheError: it is of something else, or vectors are missing.
        """
        self.name = name
        self._spec = spec
        self.scalars: dict[str, float] = read_manifest(folder, spec.facts())["scalars"]
        self._layouts = {kind: layout for kind, layout in spec.layouts.items() if layout}
        self._records = {kind: Records(folder, kind, spec.sizes[kind]) for kind in self._layouts}
        for kind, records in self._records.items():
            if not records.has():
                missing, size = int((records.file_of < 0).sum()), spec.sizes[kind]
                raise CacheError(f"cache {folder}: {missing} of {size} {kind} are missing: build it again")

    def lookup(
        self, *ids: Int[np.ndarray, " b"], slots: int | None = None
    ) -> dict[str, Shaped[np.ndarray, "b ..."]]:
        """The vectors of a batch, {NAME/field: [b, ...]}.

        Args:
          ids: of every kind, in the spec's order.
          slots: for words; None gives as many as were stored.

        Raises:
          CacheError: an id lies outside the cache, or a record is damaged.
        """
        found: dict[str, np.ndarray] = {}
        for kind, wanted in zip(self._spec.layouts, ids, strict=True):
            if kind in self._records:
                unique, row = np.unique(self._spec.places(kind, wanted), return_inverse=True)
                values = unpack(self._layouts[kind], self._records[kind].read(unique), slots)
                found |= {f"{self.name}/{field}": value[row] for field, value in values.items()}
        return found

    def join(self, batch: Mapping[str, np.ndarray]) -> dict[str, Shaped[np.ndarray, "b ..."]]:
        """`lookup` by the batch's own ids. Words get as many slots as its `importance` has."""
        ids = [batch[ID_OF[kind]] for kind in self._spec.layouts]
        slots = batch["importance"].shape[-1] if "importance" in batch else None
        return self.lookup(*ids, slots=slots)


def join_cached(
    batches: Iterator[Mapping[str, np.ndarray]], caches: Sequence[TeacherCache]
) -> Iterator[dict[str, np.ndarray]]:
    """Batches with the caches' vectors beside their own entries. Closing it closes `batches`."""
    try:
        for batch in batches:
            joined = dict(batch)
            for cache in caches:
                joined |= cache.join(batch)
            yield joined
    finally:
        if hasattr(batches, "close"):
            batches.close()


def computed_vectors(
    encode: Callable[[Any, Batch], Features],
    variables: Any,
    layout: Layout,
    batches: Callable[[np.ndarray], Iterable[Mapping[str, Any]]],
    inputs: Sequence[str],
    *,
    place: Callable[[dict[str, Any]], Any],
    sharding: Any,
) -> Vectors:
    """A model's vectors by ids, computed on all devices: what `build_cache` wants of a kind.

    Args:
      encode: (variables, batch) -> its `Features`; compiled once for each shape of the batches.
      variables: on the devices.
      layout: which fields.
      batches: ids [steps, b] -> this host's batches.
      inputs: what `encode` reads of them.
      place: puts this host's rows on the devices (`train.sharding.place_batch`).
      sharding: of a batch on the devices.
    """

    def fields(variables: Any, batch: Batch) -> dict[str, Any]:
        features = encode(variables, batch)
        return {name: getattr(features, name).astype(dtype) for name, (_, dtype) in layout.items()}

    compiled = jax.jit(fields, out_shardings=sharding)

    def run(ids: Int[np.ndarray, "steps b"]) -> Iterator[dict[str, np.ndarray]]:
        for batch in batches(ids):
            encoded = compiled(variables, place({name: batch[name] for name in inputs}))
            yield {name: _local_rows(x) for name, x in encoded.items()}

    return run


def widened(batch: Batch, name: str) -> dict[str, jax.Array]:
    """A batch's cached vectors by field, in float32; masks as they are.

    Raises:
      ValueError: the batch has no vectors of that name.
    """
    start = f"{name}/"
    given = {key.removeprefix(start): jnp.asarray(x) for key, x in batch.items() if key.startswith(start)}
    if not given:
        raise ValueError(f"the batch has no {start}... vectors, only {', '.join(batch)}")
    return {key: x if x.dtype == bool else x.astype(jnp.float32) for key, x in given.items()}


def _local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split along its first dimension alone."""
    parts = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
