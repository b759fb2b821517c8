"""Reading weight files of other libraries as flat dictionaries of NumPy arrays."""

import importlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.serialization
import flax.traverse_util
import huggingface_hub
import ml_dtypes  # noqa: F401  (teaches NumPy, and through it safetensors, the name bfloat16)
import numpy as np
import safetensors
import safetensors.numpy

# In order of preference: no pickle and no torch first.
WEIGHT_FILES = ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin")


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """A local directory as it is; otherwise the Hugging Face hub repository of that name, downloaded.

    From the hub only the JSON files and one kind of weights are fetched, into Hugging Face's own cache,
    which also answers when the hub cannot be reached.

    Raises:
      FileNotFoundError: no such directory, and no such repository or no way to reach it.
    """
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local
    name = str(path_or_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or local.exists():
        raise FileNotFoundError(f"{name}: not a directory, and not the name of a hub repository (owner/name)")
    try:
        for file in WEIGHT_FILES:
            stem, suffix = file.split(".", 1)
            wanted = ["*.json", f"{stem}*.{suffix}", f"{stem}*.{suffix}.index.json"]
            folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted)
            if _weights_in(Path(folder)):
                return Path(folder)
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: no such directory here, and the Hugging Face hub did not give it: {error}"
        ) from error
    raise FileNotFoundError(f"{name}: the hub repository holds none of {', '.join(WEIGHT_FILES)}")


def _weights_in(folder: Path) -> Path | None:
    for name in WEIGHT_FILES:
        for candidate in (folder / name, folder / f"{name}.index.json"):
            if candidate.is_file():
                return candidate
    return None


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a weight file, under the names the file gives them.

    Reads safetensors; torch's .pt, .pth, .bin and .bin.N (with `weights_only=True`, or as a TorchScript
    archive, which is what OpenAI publishes); Flax msgpack (nested names joined by dots); an index.json of
    shards; or a directory that holds one of the names that Hugging Face gives these.

    Raises:
      FileNotFoundError: no such file, or a shard named in the index is not there.
      ModuleNotFoundError: a torch file, and torch is not installed.
      ValueError: the file is of no known kind, or cannot be read (cut short, or not weights).
    """
    path = Path(path)
    if path.is_dir():
        found = _weights_in(path)
        if found is None:
            raise FileNotFoundError(f"{path}: holds none of {', '.join(WEIGHT_FILES)}")
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    read: Callable[[Path], dict[str, np.ndarray]]
    if path.suffix == ".safetensors":
        read = safetensors.numpy.load_file
    elif path.suffix == ".msgpack":
        read = _read_msgpack
    elif re.search(r"\.(pt|pth|bin|model)(\.\d+)?$", path.name):
        return _read_torch(path, _torch(path))
    else:
        raise ValueError(f"{path}: not a kind of weight file known here (.safetensors, .msgpack, .pt, .bin)")
    try:
        return read(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of weight shards: {error!r}") from error
    weights: dict[str, np.ndarray] = {}
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: shard named in {index.name} is not there")
        weights |= read_weights(index.parent / shard)
    return weights


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"holds a {type(tree).__name__}, not a tree of arrays")
    return {name: np.asarray(x) for name, x in flax.traverse_util.flatten_dict(tree, sep=".").items()}


def _torch(path: Path) -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path}: reading this kind of file needs torch: pip install 'clipdistill_jax[torch]'"
        ) from error


def _read_torch(path: Path, torch: ModuleType) -> dict[str, np.ndarray]:
    try:
        if zipfile.is_zipfile(path) and _is_torchscript(path):
            state = torch.jit.load(str(path), map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: torch cannot read it as weights: {error}") from error
    for name in ("state_dict", "model_state"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
    others = [str(name) for name, x in state.items() if not isinstance(x, torch.Tensor)]
    if others:
        raise ValueError(f"{path}: these entries are not tensors: {', '.join(others)}")
    return {name: _numpy(x, torch) for name, x in state.items()}


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _numpy(tensor: Any, torch: ModuleType) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
