"""Weight files that cannot be read, and names that cannot be found, say what is wrong with them."""

import json
import pickle
import sys

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from clipdistill_jax.convert import files

WEIGHTS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float16([1.5])}


def test_safetensors_and_msgpack(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "model.safetensors")
    nested = {"a": {"weight": WEIGHTS["a.weight"]}, "b": WEIGHTS["b"]}
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.msgpack_serialize(nested))
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "x.msgpack"):
        read = files.read_weights(path)
        assert read.keys() == WEIGHTS.keys()
        for name, x in WEIGHTS.items():
            assert read[name].dtype == x.dtype
            np.testing.assert_array_equal(read[name], x)


def test_bfloat16(tmp_path):
    safetensors.numpy.save_file({"a": np.array([1.5], ml_dtypes.bfloat16)}, tmp_path / "x.safetensors")
    assert files.read_weights(tmp_path / "x.safetensors")["a"].astype(np.float32) == 1.5
    torch = pytest.importorskip("torch", reason="reads torch's own files")
    torch.save({"a": torch.tensor([1.5], dtype=torch.bfloat16)}, tmp_path / "x.pt")
    assert files.read_weights(tmp_path / "x.pt")["a"] == 1.5


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_a_file_cut_short_is_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        safetensors.numpy.save_file(WEIGHTS, path)
    elif name.endswith("msgpack"):
        path.write_bytes(flax.serialization.msgpack_serialize(WEIGHTS))
    else:
        torch = pytest.importorskip("torch", reason="reads torch's own files")
        torch.save({name: torch.tensor(x) for name, x in WEIGHTS.items()}, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{name}: .*cannot"):
        files.read_weights(tmp_path)


def test_missing_files_and_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors"):
        files.read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="x.pt: no such file"):
        files.read_weights(tmp_path / "x.pt")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="x.npz: not a kind of weight file"):
        files.read_weights(tmp_path / "x.npz")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002.safetensors: shard named in"):
        files.read_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="not an index of weight shards"):
        files.read_weights(tmp_path)


class Evil:
    """Unpickling this would make a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_code_is_never_run(tmp_path):
    pytest.importorskip("torch", reason="reads torch's own files")
    mark = tmp_path / "ran"
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Evil(str(mark))))
    with pytest.raises(ValueError, match="x.bin: torch cannot read it as weights"):
        files.read_weights(tmp_path / "x.bin")
    assert not mark.exists()


def test_torch_files_that_are_no_weights(tmp_path):
    torch = pytest.importorskip("torch", reason="reads torch's own files")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not a dictionary"):
        files.read_weights(tmp_path / "list.pt")
    torch.save({"epoch": 3, "a": torch.zeros(1)}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match="not tensors: epoch"):
        files.read_weights(tmp_path / "mixed.pt")


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"x\.pt.*pip install 'clipdistill_jax\[torch\]'"):
        files.read_weights(tmp_path / "x.pt")


def test_hub_names(tmp_path, monkeypatch):
    """A local directory wins; from the hub one kind of weights is asked for after the other."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision, allow_patterns))
        if any("msgpack" in pattern for pattern in allow_patterns):
            (tmp_path / "cache" / "flax_model.msgpack").write_bytes(b"")
        return str(tmp_path / "cache")

    monkeypatch.setattr(files.huggingface_hub, "snapshot_download", download)
    (tmp_path / "cache").mkdir()
    assert files.resolve("openai/clip", revision="main") == tmp_path / "cache"
    assert [name for name, _, _ in asked] == ["openai/clip"] * 2
    assert asked[0][1] == "main" and "model*.safetensors" in asked[0][2]
    (tmp_path / "openai" / "clip").mkdir(parents=True)
    assert str(files.resolve("openai/clip")) == "openai/clip"
    assert len(asked) == 2

    def offline(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(files.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="owner/name: no such directory here.*no network"):
        files.resolve("owner/name")
    with pytest.raises(FileNotFoundError, match="not a directory, and not the name of a hub repository"):
        files.resolve("/a/b/c")
