"""The files of an index: index.json says what it is of; each shard holds some clips, whole or not at all."""

import contextlib
import dataclasses
import fcntl
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clipdistill_jax.data.index import write_json

MANIFEST = "index.json"
SKIPPED = "skipped.json"
LAYOUT = 1  # raised when newer code no longer reads what older code wrote
_LOCK = ".lock"
_NAME = "shard-{:06d}.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Clips:
    """Indexed clips, N of them.

    Attributes:
      path: str [N], under the folder of videos, with slashes.
      size: int64 [N], bytes of the file when it was indexed; `mtime` int64 [N], its time in nanoseconds.
      seconds: float32 [N], length of the clip.
      vector: float32 [N, D], of unit length.
      thumbnail: N JPEGs.
    """

    path: np.ndarray
    size: np.ndarray
    mtime: np.ndarray
    seconds: np.ndarray
    vector: np.ndarray
    thumbnail: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.path)

    def take(self, rows: np.ndarray) -> "Clips":
        """Some of the clips, by index."""
        arrays = {name: getattr(self, name)[rows] for name in _ARRAYS}
        return Clips(**arrays, thumbnail=tuple(self.thumbnail[row] for row in rows))


_ARRAYS = ("path", "size", "mtime", "seconds", "vector")


def shards(folder: Path) -> list[Path]:
    """The shards of an index, oldest first."""
    return sorted(folder.glob("shard-*.npz"))


def write_shard(path: Path, clips: Clips) -> None:
    """Writes a shard that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(
            file,
            **{name: getattr(clips, name) for name in _ARRAYS},
            thumbnails=np.frombuffer(b"".join(clips.thumbnail), np.uint8),
            ends=np.cumsum([len(jpeg) for jpeg in clips.thumbnail], dtype=np.int64),
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append_shard(folder: Path, clips: Clips) -> None:
    """Writes clips as a new shard after the others."""
    last = max((int(path.stem.split("-")[1]) for path in shards(folder)), default=-1)
    write_shard(folder / _NAME.format(last + 1), clips)


def read_shard(path: Path) -> Clips:
    """Reads a shard.

    Raises:
      ValueError: it is damaged.
    """
    with _opened(path) as stored:
        arrays = {name: stored[name] for name in _ARRAYS}
        jpegs, ends = stored["thumbnails"].tobytes(), stored["ends"].tolist()
        if {len(x) for x in arrays.values()} != {len(ends)}:
            raise ValueError("its arrays differ in length")
    thumbnails = [jpegs[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return Clips(**arrays, thumbnail=tuple(thumbnails))


def read_vectors(path: Path) -> Float[np.ndarray, "n d"]:
    """The vectors of a shard alone. Raises as `read_shard` does."""
    with _opened(path) as stored:
        return stored["vector"]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            yield stored
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove that file and run the index command again"
        ) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an index is of: `model` (folder, fingerprint, video) and `videos` (the folder).

    Raises:
      FileNotFoundError: there is no index in the folder.
      ValueError: it cannot be read, or is of another layout.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no index (no {MANIFEST}): make one with python -m clipdistill_jax.search index"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        layout = manifest["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): remove {folder} and index again") from error
    if layout != LAYOUT:
        raise ValueError(f"{path}: layout {layout!r} is not {LAYOUT}: remove {folder} and index again")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes index.json; of an index that is there already only the model's folder may change.

    Raises:
      ValueError: the index is of another model, or of another folder of videos.
    """
    if (folder / MANIFEST).exists():
        before = read_manifest(folder)
        if before["videos"] != manifest["videos"]:
            raise ValueError(
                f"{folder} is an index of {before['videos']}, not of {manifest['videos']}: give another --out"
            )
        same = [{**found["model"], "folder": ""} for found in (before, manifest)]
        if same[0] != same[1]:
            raise ValueError(
                f"{folder} was made with another model ({before['model']['fingerprint']} of "
                f"{before['model']['folder']}): give another --out, or remove this one"
            )
    write_json(folder / MANIFEST, {"layout": LAYOUT, **manifest})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One index command a folder at a time. The lock file also tells a folder of ours from any other.

    Raises:
      ValueError: the folder holds something else, or another command is at work in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / _LOCK).exists():
        raise ValueError(f"{folder} is not empty and holds no index: give a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another command is writing {folder}: wait until it is done") from error
        yield
