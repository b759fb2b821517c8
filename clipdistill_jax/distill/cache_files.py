"""The files of a cache: record files of an id range each, and cache.json; written whole or not at all."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Shaped

MANIFEST = "cache.json"
FORMAT = 1
SUFFIX = ".arrayrecord"

Layout = Mapping[str, tuple[tuple[int, ...], str]]  # field -> (shape of one row, dtype), in a record's order
# Fields that are kept only where another field, a mask over all their dimensions but the last, is True; they
# are 0 elsewhere. They end a record.
RAGGED = {"words": "word_mask"}
Vectors = Callable[[Int[np.ndarray, "steps b"]], Iterable[Mapping[str, Any]]]


class CacheError(ValueError):
    """A cache that cannot be used: the message says which, why, and what to do."""


def pack(layout: Layout, vectors: Mapping[str, Any], ids: Int[np.ndarray, " b"]) -> list[bytes]:
    """The records of the rows whose id is not -1."""
    real = np.flatnonzero(ids >= 0)
    if not len(real):
        return []
    fields = {}
    for name, (shape, dtype) in layout.items():
        x = np.asarray(vectors[name])
        if x.shape != (len(ids), *shape):
            raise CacheError(f"{name} came as {x.shape} where the cache keeps {(len(ids), *shape)}")
        x = np.ascontiguousarray(x[real].astype(jnp.dtype(dtype)))
        bad = real[~np.isfinite(x.astype(np.float32)).reshape(len(real), -1).all(1)]
        if len(bad):
            raise CacheError(f"{name} of id {ids[bad[0]]} is not finite: the frozen model is broken there")
        fields[name] = x
    fixed = [x.reshape(len(real), -1).view(np.uint8) for name, x in fields.items() if name not in RAGGED]
    records = [row.tobytes() for row in np.concatenate(fixed, 1)]
    for name, mask in RAGGED.items():
        if name in fields:
            kept = (x[there] for x, there in zip(fields[name], fields[mask], strict=True))
            records = [record + x.tobytes() for record, x in zip(records, kept, strict=True)]
    return records


def fixed_sizes(layout: Layout) -> dict[str, int]:
    """Bytes of each field in a record, but the ragged ones'."""
    return {
        name: int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize
        for name, (shape, dtype) in layout.items()
        if name not in RAGGED
    }


def unpack(layout: Layout, records: list[bytes], slots: int | None = None) -> dict[str, np.ndarray]:
    """The fields of records, {field: [records, ...]}.

    Args:
      layout: of the records.
      records: as `pack` made them.
      slots: of ragged fields and their masks; later ones are left out, missing ones are empty. None gives as
        many as were packed.
    """
    sizes = fixed_sizes(layout)
    end = sum(sizes.values())
    rows = np.frombuffer(b"".join(record[:end] for record in records), np.uint8).reshape(len(records), end)
    found: dict[str, np.ndarray] = {}
    start = 0
    for name, size in sizes.items():
        shape, dtype = layout[name]
        field = np.ascontiguousarray(rows[:, start : start + size]).view(jnp.dtype(dtype))
        found[name], start = field.reshape(len(records), *shape), start + size
    for name, mask in RAGGED.items():
        if name in layout:
            shape, dtype = layout[name]
            kept = np.frombuffer(b"".join(record[end:] for record in records), jnp.dtype(dtype))
            found[name], found[mask] = _spread(kept.reshape(-1, shape[-1]), found[mask], slots)
    return found


def _spread(
    kept: Shaped[np.ndarray, "n d"], mask: Bool[np.ndarray, "*b s"], slots: int | None
) -> tuple[Shaped[np.ndarray, "*b w d"], Bool[np.ndarray, "*b w"]]:
    """The rows that were kept, at the places where the mask is True; and the mask."""
    slots = mask.shape[-1] if slots is None else slots
    there = np.zeros((*mask.shape[:-1], slots), bool)
    there[..., : mask.shape[-1]] = mask[..., :slots]
    spread = np.zeros((*there.shape, kept.shape[-1]), kept.dtype)
    spread[there] = kept[np.nonzero(mask)[-1] < slots]
    return spread, there


class Records:
    """The whole files of one kind as one table by id; others are passed over with a warning."""

    def __init__(self, folder: Path, kind: str, size: int) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self.file_of = np.full(size, -1, np.int32)
        self._files: list[tuple[Path, int, Any]] = []
        for path in sorted(folder.glob(f"{kind}-*{SUFFIX}")):
            named = re.fullmatch(rf"{kind}-(\d+)-(\d+){SUFFIX}", path.name)
            if named is None:
                continue
            start, stop = int(named[1]), int(named[2])
            reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
            if not reader.ok() or reader.num_records() != stop - start:
                logging.warning("%s is not whole: its %s will be computed again", path, kind)
                continue
            self.file_of[start:stop] = len(self._files)
            self._files.append((path, start, reader))
        self._kind = kind

    def has(self, start: int = 0, stop: int | None = None) -> bool:
        """Whether all ids start .. stop-1 are there."""
        return bool((self.file_of[start:stop] >= 0).all())

    def read(self, ids: Int[np.ndarray, " n"]) -> list[bytes]:
        """The records of ascending ids."""
        if len(ids) and not 0 <= ids[0] <= ids[-1] < len(self.file_of):
            raise CacheError(
                f"the batch has the id {ids[-1] if ids[0] >= 0 else ids[0]}, the cache {len(self.file_of)} "
                f"{self._kind}: they are not of the same data"
            )
        found: list[bytes] = [b""] * len(ids)
        file_of = self.file_of[ids]
        for file in np.unique(file_of):
            path, start, reader = self._files[file]
            places = np.flatnonzero(file_of == file)
            try:
                records = reader.read((ids[places] - start).tolist())
            except RuntimeError as error:
                raise CacheError(
                    f"{path} is damaged: remove it, and it is computed again ({error})"
                ) from error
            for place, record in zip(places, records, strict=True):
                found[place] = record
        return found


def write_files(
    folder: Path,
    kind: str,
    layout: Layout,
    todo: Sequence[Int[np.ndarray, "_steps b"]],
    vectors: Vectors,
    ids_of: Callable[[Int[np.ndarray, "*n"]], Int[np.ndarray, "*n"]],
) -> None:
    """Computes and writes one file for each of `todo`, places that ascend and then are -1.

    `ids_of` gives the ids by which `vectors` knows the rows of these places.
    """
    stream = iter(vectors(ids_of(np.concatenate(todo))))
    for steps in todo:
        real = steps[steps >= 0]
        with contextlib.ExitStack() as stack:
            write = None
            if len(real):
                path = folder / f"{kind}-{real[0]:09d}-{real[-1] + 1:09d}{SUFFIX}"
                write = stack.enter_context(_new_file(path, len(real)))
            for places in steps:
                step = next(stream, None)
                if step is None:
                    raise CacheError(f"the {kind} ended before id {ids_of(real)[-1]}: the data changed")
                records = pack(layout, step, ids_of(places))
                for record in records:
                    assert write is not None
                    write(record)


@contextlib.contextmanager
def _new_file(path: Path, records: int) -> Iterator[Callable[[bytes], None]]:
    """A record file that gets its name when it is whole and on the disk."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    # Two runs may build the same cache at once: each writes a file of its own, and either will do.
    partial = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    # One record a group: a read decodes no more than is asked for. Vectors in bfloat16 shrink by a fifth.
    writer = ArrayRecordWriter(str(partial), "group_size:1,zstd:1")
    try:
        yield writer.write
        writer.close()
        if not partial.exists():
            return  # another run found the cache whole, and cleaned up
        reader = ArrayRecordReader(str(partial))
        if not reader.ok() or reader.num_records() != records:
            raise CacheError(f"{partial} could not be written whole: is the disk full?")
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if writer.is_open():
            writer.close()
        partial.unlink(missing_ok=True)
        raise


def write_manifest(folder: Path, facts: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
    """Writes cache.json."""
    value = {"format": FORMAT, "facts": dict(facts), "scalars": dict(scalars)}
    partial = folder / f"{MANIFEST}.{os.uname().nodename}-{os.getpid()}.partial"
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, folder / MANIFEST)


def read_manifest(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """cache.json. Raises CacheError where its facts are not those that are wanted."""
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_text())
        found, version, _ = dict(value["facts"]), value["format"], value["scalars"]
    except FileNotFoundError:
        raise CacheError(
            f"{folder} holds no cache (no {MANIFEST}): give an empty folder, or build one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} cannot be read ({error}): remove {folder} and build it again") from error
    if version != FORMAT:
        raise CacheError(f"{path} is of format {version}, not {FORMAT}: remove {folder} and build it again")
    names = [*wanted, *(found.keys() - wanted.keys())]
    other = [
        f"{k} is {found.get(k)!r}, not {wanted.get(k)!r}" for k in names if found.get(k) != wanted.get(k)
    ]
    if other:
        raise CacheError(
            f"cache {folder} is not this run's: {'; '.join(other)}. Give another folder, or remove it"
        )
    return value
