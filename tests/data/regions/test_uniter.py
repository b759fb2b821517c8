"""UNITER's region features: npz files and their LMDB."""

import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.regions import MissingRegions
from clipdistill_jax.data.regions.geometry import uniter_locations
from clipdistill_jax.data.regions.uniter import (
    NpzFolder,
    UniterLmdb,
    coco_name,
    flickr_name,
    read_npz,
    vcr_names,
)
from tests.data.damage import refused
from tests.data.regions.region_cases import HALF, SIZE, arrays, check_same, uniter_arrays, write_lmdb


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", **uniter_arrays())
    expected = arrays()
    found = read_npz(tmp_path / "a.npz", width=8)
    assert found.size == (1.0, 1.0)
    np.testing.assert_allclose(found.boxes, expected["boxes"] / np.array(SIZE * 2), atol=2**-11)
    pixels = read_npz(tmp_path / "a.npz", width=8, size=SIZE)
    assert pixels.size == SIZE
    np.testing.assert_allclose(pixels.boxes, expected["boxes"], atol=2**-11 * 640)
    np.testing.assert_allclose(pixels.features, expected["features"], rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(pixels.conf, expected["conf"], rtol=2**-10)
    np.testing.assert_allclose(pixels.class_probs, expected["soft_labels"], rtol=2**-10, atol=1e-6)
    np.testing.assert_allclose(
        uniter_locations(found.boxes, found.size), uniter_locations(pixels.boxes, SIZE), atol=1e-6
    )


def test_npz_that_savez_spoilt(tmp_path):
    """UNITER's own compressed files hold a stray array, "allow_pickle"."""
    np.savez_compressed(tmp_path / "a.npz", **uniter_arrays(), allow_pickle_=np.array(True))
    assert len(read_npz(tmp_path / "a.npz", width=8)) == 5


NPZ_DAMAGE = {
    "another width": (uniter_arrays(width=4), ["'features' is 4 wide, the model takes 8"]),
    "no boxes": ({"features": np.zeros((2, 8))}, ["needs the arrays norm_bb", "'features'"]),
    "boxes in pixels": (arrays(), ["give the size of the frame"]),
    "seven columns": (uniter_arrays(norm_bb=np.zeros((5, 7))), ["'norm_bb' should be [regions, 6]"]),
    "fewer boxes": (uniter_arrays(norm_bb=np.zeros((4, 6))), ["'boxes' should be [5, 4], found [4, 4]"]),
    "other columns": (
        uniter_arrays(norm_bb=np.tile([0.1, 0.1, 0.3, 0.3, 0.3, 0.3], (5, 1))),
        ["last two are not w and h"],
    ),
    "pixels as fractions": (
        uniter_arrays(norm_bb=np.tile([1.0, 1, 30, 30, 29, 29], (5, 1))),
        ["box 0", "leaves the image of 1 x 1"],
    ),
    "not finite": (uniter_arrays(features=np.full((5, 8), np.inf)), ["'features'", "not finite"]),
    "NaN boxes": (uniter_arrays(norm_bb=np.full((5, 6), np.nan)), ["last two are not w and h"]),
    "no region": (
        uniter_arrays(features=np.zeros((0, 8)), norm_bb=np.zeros((0, 6))),
        ["should be [regions, width], found [0, 8]"],
    ),
    "conf of another length": (uniter_arrays(conf=np.ones(4)), ["'conf' should be [5]", "found [4]"]),
    "objects": (
        uniter_arrays(features=np.array([[object()] * 8] * 5, object)),
        ["array of objects", "run code"],
    ),
}


@pytest.mark.parametrize("name", NPZ_DAMAGE)
def test_damaged_npz(tmp_path, name):
    content, parts = NPZ_DAMAGE[name]
    np.savez(tmp_path / "a.npz", **content)
    with refused("a.npz", *parts):
        read_npz(tmp_path / "a.npz", width=8)


def test_npz_cut_short(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **uniter_arrays())
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"nothing of the kind", whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"a\.npz: not an npz file, or cut short"):
            read_npz(path, width=8)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(FormatError, match="a single npy array"):
        read_npz(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.npz is missing"):
        read_npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_a_wrong_byte(tmp_path, save):
    """Wherever it stands: refused, or else of no consequence."""
    path = tmp_path / "a.npz"
    save(path, **uniter_arrays(n=2))
    whole = path.read_bytes()
    refusals = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        try:
            read_npz(path, width=8)
        except FormatError as error:
            assert "a.npz" in str(error)
            refusals += 1
    assert refusals > len(whole) / 3 / 2


def test_npz_folder(tmp_path):
    for k in range(3):
        np.savez(tmp_path / coco_name("val2014", k), **uniter_arrays(seed=k))
    (tmp_path / "README").write_text("x")
    folder = NpzFolder(tmp_path, width=8)
    assert list(folder) == [f"coco_val2014_00000000000{k}.npz" for k in range(3)] and len(folder) == 3
    assert coco_name("val2014", 1) in folder and "other.npz" not in folder
    check_same(folder[coco_name("val2014", 1)].scaled(SIZE), arrays(seed=1), **HALF)
    for name in (coco_name("val2014", 3), "../a.npz"):
        with pytest.raises(MissingRegions) as caught:
            folder[name]
        assert str(caught.value) == f"{tmp_path} has no {name}"
    assert folder.get("other.npz") is None


def test_names():
    assert coco_name("train2014", 458752) == "coco_train2014_000000458752.npz"
    assert flickr_name("2248275918") == "flickr30k_002248275918.npz"
    image = Path("vcr1images/lsmdc_1/1_00.01.46.736-00.01.50.168@0.jpg")
    assert vcr_names("validation", image) == (
        "vcr_gt_val_1_00.01.46.736-00.01.50.168@0.npz",
        "vcr_val_1_00.01.46.736-00.01.50.168@0.npz",
    )


def test_real_features(shared_data):
    path = shared_data / "vqa_v2_mini/COCO_train2014_000000458752.npz"
    scale = 800 / 480  # its boxes lie in the image enlarged to a short side of 800
    found = read_npz(path, size=(640 * scale, 800.0))
    assert found.features.shape == (36, 2048) and found.boxes[0] == pytest.approx(
        [426.5257, 565.28046, 611.6193, 779.56757]
    )
    with pytest.raises(FormatError, match="leaves the image of 640 x 480.*resized image"):
        read_npz(path, size=(640.0, 480.0))
    with pytest.raises(FormatError, match="give the size of the frame"):
        read_npz(path)
    narrow = shared_data / "snli_ve_mini/2248275918.npz"
    with pytest.raises(FormatError, match=r"2248275918\.npz: 'features' is 1024 wide, the model takes 2048"):
        read_npz(narrow, size=(1066.7, 800.0))
    assert read_npz(narrow, size=(1066.7, 800.0), width=1024).features.shape == (93, 1024)


def packed(array: np.ndarray, changes: dict[bytes, object] | None = None) -> dict:
    """An array as msgpack-numpy 0.4 describes it."""
    return {
        b"nd": True,
        b"type": array.dtype.str,
        b"kind": b"",
        b"shape": list(array.shape),
        b"data": array.tobytes(),
    } | (changes or {})


def msgpacked(content: dict) -> bytes:
    import msgpack

    return msgpack.packb(content, use_bin_type=True)


def zipped(content: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **content)
    return out.getvalue()


def test_lmdb(tmp_path):
    plain = uniter_arrays(seed=1)
    folder = write_lmdb(
        tmp_path / "feat_th0.2_max100_min10",
        {
            "a.npz": msgpacked({k: packed(v) for k, v in plain.items()}),
            "b.npz": zipped(uniter_arrays(seed=2) | {"allow_pickle": np.array(True)}),
        },
    )
    found = UniterLmdb(folder, width=8)
    assert list(found) == ["a.npz", "b.npz"] and len(found) == 2
    for seed, name in ((1, "a.npz"), (2, "b.npz")):
        check_same(found[name].scaled(SIZE), arrays(seed=seed), **HALF)
        np.testing.assert_allclose(found[name].conf, arrays(seed=seed)["conf"], rtol=2**-10)
    with pytest.raises(MissingRegions, match="has no c.npz"):
        found["c.npz"]
    assert "__keys__" not in found
    found.close()
    with pytest.raises(FormatError, match=r"key 'a\.npz': 'features' is 8 wide, the model takes 2048"):
        UniterLmdb(folder)["a.npz"]


def test_arrays_of_msgpack_numpy_itself(tmp_path):
    encode = pytest.importorskip("msgpack_numpy", reason="msgpack-numpy is not installed").encode
    import msgpack

    data = msgpack.packb(uniter_arrays(), default=encode, use_bin_type=True)
    check_same(UniterLmdb(write_lmdb(tmp_path, {"a": data}), width=8)["a"].scaled(SIZE), arrays(), **HALF)


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def lmdb_damage() -> dict[str, tuple[bytes, list[str]]]:
    good = {k: packed(v) for k, v in uniter_arrays().items()}
    features = uniter_arrays()["features"]
    whole = msgpacked(good)
    return {
        "pickled": (
            msgpacked(good | {"features": packed(features, {b"kind": b"O", b"data": pickle.dumps(Trap())})}),
            ["'features'", "kind b'O'", "could run code"],
        ),
        "object type": (
            msgpacked(good | {"features": packed(features, {b"type": "|O"})}),
            ["'features'", "'|O'", "could run code"],
        ),
        "structured": (
            msgpacked(good | {"conf": packed(features, {b"type": [["a", "<f4"]], b"kind": b"V"})}),
            ["'conf'", "could run code"],
        ),
        "structured, of no kind": (
            msgpacked(good | {"conf": packed(features, {b"type": [["a", "<f4"]]})}),
            ["'conf'", "could run code"],
        ),
        "wrong shape": (
            msgpacked(good | {"features": packed(features, {b"shape": [5, 9]})}),
            ["'features'", "shape [5, 9]", "cut short"],
        ),
        "negative shape": (
            msgpacked(good | {"features": packed(features, {b"shape": [-5, -8]})}),
            ["'features'", "shape [-5, -8]"],
        ),
        "a scalar": (
            msgpacked(good | {"conf": {b"nd": False, b"type": "<f2", b"data": b"ab"}}),
            ["'conf'", "not an array"],
        ),
        "plain list": (msgpacked(good | {"norm_bb": [[0] * 6] * 5}), ["'norm_bb'", "not an array"]),
        "cut short": (whole[:-9], ["neither npz nor msgpack, or cut short"]),
        "compressed text": (b"\x04\x22\x4d\x18 lz4", ["neither npz nor msgpack"]),
        "npz cut short": (zipped(uniter_arrays())[:-9], ["not an npz file, or cut short"]),
        "a number": (msgpacked(7), ["expected a map of arrays, found int"]),  # type: ignore[arg-type]
        "nothing": (msgpacked({}), ["needs the arrays norm_bb and features; it has none"]),
    }


def test_damaged_lmdb_values(tmp_path):
    damage = lmdb_damage()
    found = UniterLmdb(write_lmdb(tmp_path, {k: v for k, (v, _) in damage.items()}), width=8)
    for name, (_, parts) in damage.items():
        with refused(f"key {name!r}", *parts):
            found[name]


def test_damaged_lmdb(tmp_path):
    pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    with pytest.raises(FileNotFoundError, match=r"holds data\.mdb"):
        UniterLmdb(tmp_path)
    (tmp_path / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(FormatError, match="not an LMDB, damaged"):
        UniterLmdb(tmp_path)
    with pytest.raises(FormatError, match="'__keys__': not a JSON list"):
        UniterLmdb(write_lmdb(tmp_path / "b", {}, names=b"[1,"))


def test_lmdb_whose_conversion_did_not_finish(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    with lmdb.open(str(tmp_path)) as env, env.begin(write=True) as txn:
        txn.put(b"a.npz", b"x")
    with pytest.raises(FormatError, match="its conversion did not finish, or it is a database of texts"):
        UniterLmdb(tmp_path)


def test_lmdb_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="pip install lmdb"):
        UniterLmdb(tmp_path)
