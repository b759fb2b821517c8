"""Region features as UNITER keeps them: an npz an image, or an LMDB of many.

An npz (ChenRocks' bottom-up extractor, tools/generate_npz.py) holds half-precision
  norm_bb [n, 6]  x1/W, y1/H, x2/W, y2/H, w/W, h/H          features [n, 2048]
  conf [n, 1]     the best class's probability              soft_labels [n, 1601]  background first
An LMDB (UNITER scripts/convert_imgdir.py) has the same under the npz's file name, either as npz bytes or as
msgpack with msgpack-numpy's arrays, and the list of names under "__keys__".
Neither is trusted: arrays of objects, which would be unpickled, are refused.
"""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.regions import MissingRegions, Regions, make_regions

WIDTH = 2048
NAMES_KEY = b"__keys__"
_DTYPES = {f"<{kind}" for kind in ("f2", "f4", "f8", "i2", "i4", "i8")} | {"|i1", "|u1", "|b1"}
# What NumPy and zipfile raise for a damaged npz; its flags may ask for a password or an unknown compression.
NPZ_DAMAGE = (ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
_ARRAYS = ("norm_bb", "boxes", "features", "conf", "soft_labels", "image")


def coco_name(subset: str, image_id: int) -> str:
    """UNITER's name of a COCO image; subset is train2014, val2014 or test2015."""
    return f"coco_{subset}_{image_id:012}.npz"


def flickr_name(image_id: str | int) -> str:
    """UNITER's name of a Flickr30k image."""
    return f"flickr30k_{int(image_id):012}.npz"


def vcr_names(split: str, image: Path) -> tuple[str, str]:
    """UNITER's names of a VCR image: of its ground-truth regions, and of the detected ones."""
    split = {"validation": "val"}.get(split, split)
    return f"vcr_gt_{split}_{image.stem}.npz", f"vcr_{split}_{image.stem}.npz"


def read_npz(
    path: str | os.PathLike[str], *, width: int | None = WIDTH, size: tuple[float, float] | None = None
) -> Regions:
    """The regions of one image.

    Args:
      path: the file. In place of norm_bb it may hold "boxes" [n, 4], in the frame of `size`.
      width: the features' width that the model takes; None takes any.
      size: (width, height) of the frame wanted for the boxes; without it they are fractions, in (1, 1).

    Raises:
      FileNotFoundError: it is absent.
      FormatError: it is damaged, lacks an array, or has another width.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return _regions(_npz_arrays(path.read_bytes(), str(path)), str(path), width, size)


class NpzFolder(Mapping[str, Regions]):
    """A folder of npz files; keys are file names."""

    def __init__(self, folder: str | os.PathLike[str], *, width: int | None = WIDTH):
        self._folder, self._width = Path(folder), width
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of npz files")
        self._names = sorted(e.name for e in os.scandir(folder) if e.name.endswith(".npz"))
        self._known = frozenset(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Regions:
        if name not in self._known:
            raise MissingRegions(f"{self._folder} has no {name}")
        return read_npz(self._folder / name, width=self._width)


class UniterLmdb(Mapping[str, Regions]):
    """An image database of UNITER, read only; keys are the npz files' names. Needs the package lmdb.

    Open it in the process that reads it: an LMDB may not cross a fork.
    """

    def __init__(self, folder: str | os.PathLike[str], *, width: int | None = WIDTH):
        """Opens it.

        Args:
          folder: the one that holds data.mdb, e.g. .../feat_th0.2_max100_min10_compressed.
          width: the features' width that the model takes; None takes any.

        Raises:
          FileNotFoundError: there is no database.
          ImportError: lmdb is not installed.
          FormatError: it is damaged or no finished image database.
        """
        self._folder, self._width = Path(folder), width
        if not (self._folder / "data.mdb").is_file():
            raise FileNotFoundError(f"{folder}: no LMDB here; give the folder that holds data.mdb")
        try:
            import lmdb
        except ImportError as error:
            raise ImportError("reading UNITER's LMDB needs the package lmdb: pip install lmdb") from error
        try:
            self._env = lmdb.open(os.fspath(folder), readonly=True, create=False, lock=False, readahead=False)
        except lmdb.Error as error:
            raise FormatError(f"{folder}: not an LMDB, damaged, or open already: {error}") from error
        try:
            self._names = self._read_names()
        except FormatError:
            self.close()
            raise
        self._known = frozenset(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Regions:
        value = self._value(name.encode()) if name in self._known else None
        if value is None:
            raise MissingRegions(f"{self._folder} has no {name}")
        where = f"{self._folder}, key {name!r}"
        arrays = _npz_arrays(value, where) if value[:2] == b"PK" else _msgpack_arrays(value, where)
        return _regions(arrays, where, self._width, None)

    def close(self) -> None:
        self._env.close()

    def _read_names(self) -> list[str]:
        listed = self._value(NAMES_KEY)
        if listed is None:
            raise FormatError(
                f"{self._folder}: no {NAMES_KEY.decode()!r} in it: its conversion did not finish, or it is a "
                "database of texts, not of images"
            )
        try:
            return list(map(str, json.loads(listed)))
        except (ValueError, TypeError) as error:
            raise FormatError(
                f"{self._folder}, key {NAMES_KEY.decode()!r}: not a JSON list: {error}"
            ) from error

    def _value(self, key: bytes) -> bytes | None:
        with self._env.begin() as transaction:
            return transaction.get(key)


def _npz_arrays(data: bytes, where: str) -> dict[str, np.ndarray]:
    """Only the arrays that are used: UNITER's compressed databases hold a stray one, "allow_pickle"."""
    try:
        file = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise FormatError(f"{where}: a single npy array, expected an npz of {', '.join(_ARRAYS)}")
        with file:
            return {name: file[name] for name in _ARRAYS if name in file.files}
    except FormatError:
        raise
    except NPZ_DAMAGE as error:
        hint = (
            "an array of objects, which could run code; write it again with numbers alone"
            if "pickle" in str(error) and data[:2] == b"PK"
            else f"not an npz file, or cut short ({error})"
        )
        raise FormatError(f"{where}: {hint}") from error


def _msgpack_arrays(data: bytes, where: str) -> dict[str, np.ndarray]:
    """A map of arrays as msgpack-numpy 0.4 writes them, and nothing else."""
    import msgpack

    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise FormatError(f"{where}: neither npz nor msgpack, or cut short: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a map of arrays, found {type(value).__name__}")
    return {name: _array(value[name], f"{where}, {name!r}") for name in _ARRAYS if name in value}


def _array(value: Any, where: str) -> np.ndarray:
    """{b"nd": True, b"type": "<f2", b"kind": b"", b"shape": [n, k], b"data": bytes} as an array."""
    if not isinstance(value, dict) or value.get(b"nd") is not True:
        raise FormatError(f"{where}: not an array of msgpack-numpy")
    dtype, kind, shape, data = (value.get(key) for key in (b"type", b"kind", b"shape", b"data"))
    if kind not in (None, b"", "") or not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(
            f"{where}: an array of type {dtype!r}, kind {kind!r}; plain numbers alone are read: pickled "
            "objects could run code"
        )
    sides = shape if isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape) else [-1]
    if not isinstance(data, bytes) or len(data) != math.prod(sides) * np.dtype(dtype).itemsize:
        raise FormatError(f"{where}: its bytes do not make an array of shape {shape}; cut short?")
    return np.frombuffer(data, dtype).reshape(sides)


def _regions(
    arrays: dict[str, np.ndarray], where: str, width: int | None, size: tuple[float, float] | None
) -> Regions:
    if "features" not in arrays or not arrays.keys() & {"norm_bb", "boxes"}:
        raise FormatError(
            f"{where}: needs the arrays norm_bb and features; it has {sorted(arrays) or 'none'}"
        )
    rest: dict[str, Any] = {
        "width": width,
        "conf": arrays.get("conf"),
        "class_probs": arrays.get("soft_labels"),
        "image": arrays.get("image"),
    }
    if "norm_bb" not in arrays:
        if size is None:
            raise FormatError(
                f"{where}: 'boxes' instead of norm_bb: give the size of the frame that they lie in"
            )
        return make_regions(arrays["features"], arrays["boxes"], size, where, **rest)
    norm = arrays["norm_bb"].astype(np.float32)
    if norm.ndim != 2 or norm.shape[1] != 6:
        raise FormatError(f"{where}: 'norm_bb' should be [regions, 6], found {list(norm.shape)}")
    # Two half-precision numbers below 1 differ from their true difference by less than this.
    if not np.allclose(norm[:, 2:4] - norm[:, :2], norm[:, 4:], atol=0.01):
        raise FormatError(f"{where}: 'norm_bb' should be x1, y1, x2, y2, w, h; its last two are not w and h")
    regions = make_regions(arrays["features"], norm[:, :4], (1.0, 1.0), where, **rest)
    return regions if size is None else regions.scaled(size)
