"""A frozen model's vectors, computed once over the training data and joined to its batches by id.

A cache is a folder. cache.json says what the vectors are, and of what; clips-LO-HI.arrayrecord and
captions-LO-HI.arrayrecord hold the ids LO .. HI-1, a record each: the bytes of its fields one after another.
A file is written under another name and renamed when it is whole, so a build that was killed goes on where
it was. Hosts write ranges of their own into one folder that all of them read; their number may change.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from clipdistill_jax.distill.cache_files import (
    CacheError,
    Layout,
    Records,
    Vectors,
    read_manifest,
    unpack,
    write_files,
    write_manifest,
)
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Batch, Features
from clipdistill_jax.models.temporal import TightTransf

# What can be kept of a clip and of a caption. Feature maps are too large: they are computed again.
KINDS = {"clips": ("frames", "frame_mask", "temporal", "video"), "captions": ("text", "words", "word_mask")}
TEACHER = ("frames", "frame_mask", "temporal", "video", "text")
RAW_CLIP = ("frames", "frame_mask", "video", "text", "words", "word_mask")
# A score is up to 100 times a cosine of these two. In bfloat16 it could be off by 100 * 2 * 2^-8 = 0.8; in
# float32 they are still small beside the frames.
EXACT = ("video", "text")


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache holds, and of what. See `cache_spec`.

    Attributes:
      fingerprint: of the frozen model's variables.
      data: what the vectors depend on beside the model.
      sizes: {"clips": N, "captions": M}; the ids run from 0.
      layouts: {"clips": {field: (shape without the batch, dtype)}, "captions": ...}, in the records' order.
    """

    fingerprint: str
    data: Mapping[str, str | int]
    sizes: Mapping[str, int]
    layouts: Mapping[str, Layout]

    def facts(self) -> dict[str, str | int]:
        """All of it by name. Two caches are the same where these are."""
        fields = {
            f"{kind}/{name}": f"{dtype}{list(shape)}"
            for kind, layout in self.layouts.items()
            for name, (shape, dtype) in layout.items()
        }
        return {"fingerprint": self.fingerprint, **self.data, **self.sizes, **fields}

    def folder(self, root: Path) -> Path:
        """Where this cache lies under `root`: other facts, another folder."""
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()
        return root / f"{self.fingerprint}-{digest[:8]}"

    def zeros(self, size: int, name: str = "teacher") -> dict[str, np.ndarray]:
        """What `TeacherCache.lookup` gives for a batch of `size`, all zero: to compile with."""
        return {
            f"{name}/{field}": np.zeros((size, *shape), jnp.dtype(dtype))
            for layout in self.layouts.values()
            for field, (shape, dtype) in layout.items()
        }


def cache_spec(
    features: Features,
    *,
    fingerprint: str,
    data: Mapping[str, str | int],
    clips: int,
    captions: int,
    frame_sampling: str,
    fields: Sequence[str] = TEACHER,
    dtype: str = "bfloat16",
) -> CacheSpec:
    """Describes the cache of a model over a training set.

    Args:
      features: of any batch, or their shapes (`jax.eval_shape`).
      fingerprint: of the model's variables, see `distill.teacher`.
      data: what the vectors depend on beside the model: the prepared data, frames a clip, the tokenizer ...
      clips: how many clips the training draws from; clip_id runs from 0.
      captions: how many captions those have; example_id runs from 0.
      frame_sampling: the stage's. Vectors are of one choice of frames, so it must be "uniform".
      fields: of `Features`, what to keep: `TEACHER`, or `RAW_CLIP` for alignment with words.
      dtype: of the vectors, "bfloat16" or "float32"; `video` and `text` are float32 always.

    Raises:
      ValueError: frame_sampling or dtype is another, a field is not given by the model or cannot be kept.
    """
    if frame_sampling != "uniform":
        raise ValueError(
            f"frame_sampling is {frame_sampling!r}: a cache holds one choice of a clip's frames. Set it to "
            "'uniform', or cache to False"
        )
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; a cache's can be 'bfloat16' or 'float32'")
    for field in fields:
        if field not in {name for names in KINDS.values() for name in names} & features.given():
            why = "is not kept in a cache" if field in features.given() else "is not given by the model"
            raise ValueError(f"field {field!r} {why}")

    def layout(names: Sequence[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        kept = {name: getattr(features, name) for name in names if name in fields}
        return {
            name: (
                tuple(x.shape[1:]),
                "bool" if x.dtype == bool else "float32" if name in EXACT else dtype,
            )
            for name, x in kept.items()
        }

    layouts = {kind: layout(names) for kind, names in KINDS.items()}
    return CacheSpec(fingerprint, dict(data), {"clips": clips, "captions": captions}, layouts)


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
      vectors: for "clips" and "captions": ids [steps, b] (-1 on rows that only fill a batch) -> for each
        step this host's vectors, {field: [b, ...]}. See `frozen_vectors`.
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
            write_files(folder, kind, layout, todo, vectors[kind])
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
        self.scalars: dict[str, float] = read_manifest(folder, spec.facts())["scalars"]
        self._layouts = {kind: layout for kind, layout in spec.layouts.items() if layout}
        self._records = {kind: Records(folder, kind, spec.sizes[kind]) for kind in self._layouts}
        for kind, records in self._records.items():
            if not records.has():
                missing, size = int((records.file_of < 0).sum()), spec.sizes[kind]
                raise CacheError(f"cache {folder}: {missing} of {size} {kind} are missing: build it again")

    def lookup(
        self, clip_id: Int[np.ndarray, " b"], example_id: Int[np.ndarray, " b"]
    ) -> dict[str, Shaped[np.ndarray, "b ..."]]:
        """The vectors of a batch, {NAME/field: [b, ...]}.

        Raises:
          CacheError: an id lies outside the cache, or a record is damaged.
        """
        found: dict[str, np.ndarray] = {}
        ids = {"clips": clip_id, "captions": example_id}
        for kind, layout in self._layouts.items():
            unique, row = np.unique(ids[kind], return_inverse=True)
            values = unpack(layout, self._records[kind].read(unique))
            found |= {f"{self.name}/{field}": value[row] for field, value in values.items()}
        return found


def join_cached(
    batches: Iterator[Mapping[str, np.ndarray]], caches: Sequence[TeacherCache]
) -> Iterator[dict[str, np.ndarray]]:
    """Batches with the caches' vectors beside their own entries. Closing it closes `batches`."""
    try:
        for batch in batches:
            joined = dict(batch)
            for cache in caches:
                joined |= cache.lookup(batch["clip_id"], batch["example_id"])
            yield joined
    finally:
        if hasattr(batches, "close"):
            batches.close()


def cached_features(module: DualEncoder, variables: Any, batch: Batch, name: str = "teacher") -> Features:
    """The `Features` of a batch's cached vectors, as the model itself would give them.

    Vectors are widened to float32. `similarity` is computed here, over the whole batch, by the model's own
    method; it needs no more than `similarity_variables`.

    Raises:
      ValueError: the batch has no vectors of that name.
    """
    start = f"{name}/"
    given = {key.removeprefix(start): jnp.asarray(x) for key, x in batch.items() if key.startswith(start)}
    if not given:
        raise ValueError(f"the batch has no {start}... vectors, only {', '.join(batch)}")
    wide = {key: x if x.dtype == bool else x.astype(jnp.float32) for key, x in given.items()}
    features = Features(**wide, logit_scale=module.apply(variables, method="scale"))
    if not {"text", "video", "frames", "frame_mask"} <= given.keys():
        return features
    similarity = module.apply(variables, features, features, method="similarity")
    return dataclasses.replace(features, similarity=similarity)


def similarity_variables(module: DualEncoder, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that `cached_features` reads: no tower needs to lie on the devices."""
    parts = ("logit_scale", "temporal") if isinstance(module.temporal, TightTransf) else ("logit_scale",)
    return {"params": {part: variables["params"][part] for part in parts}}


def frozen_vectors(
    module: DualEncoder,
    variables: Any,
    spec: CacheSpec,
    *,
    clips: Callable[[np.ndarray], Iterable[Mapping[str, Any]]],
    captions: Callable[[np.ndarray], Iterable[Mapping[str, Any]]],
    place: Callable[[dict[str, Any]], Any],
    sharding: Any,
) -> dict[str, Vectors]:
    """A model's vectors by ids, computed on all devices: what `build_cache` wants.

    Args:
      module: the frozen model.
      variables: its variables, on the devices.
      spec: which fields.
      clips: ids [steps, b] -> batches with frames and frame_mask (`RetrievalData.clip_batches`).
      captions: ids [steps, b] -> batches with tokens, token_mask and word_ids (`caption_batches`).
      place: puts this host's rows on the devices (`train.sharding.place_batch`).
      sharding: of a batch on the devices.
    """

    def vectors(batches: Any, method: str, inputs: tuple[str, ...], layout: Layout) -> Vectors:
        def encode(variables: Any, batch: Batch) -> dict[str, Any]:
            said: Any = module.apply(variables, *(batch[name] for name in inputs), method=method)
            return {name: getattr(said, name).astype(dtype) for name, (_, dtype) in layout.items()}

        compiled = jax.jit(encode, out_shardings=sharding)

        def run(ids: Int[np.ndarray, "steps b"]) -> Iterator[dict[str, np.ndarray]]:
            for batch in batches(ids):
                encoded = compiled(variables, place({name: batch[name] for name in inputs}))
                yield {name: _local_rows(x) for name, x in encoded.items()}

        return run

    return {
        "clips": vectors(clips, "encode_video", ("frames", "frame_mask"), spec.layouts["clips"]),
        "captions": vectors(
            captions, "encode_text", ("tokens", "token_mask", "word_ids"), spec.layouts["captions"]
        ),
    }


def _local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split along its first dimension alone."""
    parts = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
