"""Region features from all four formats, their joining, and the two geometries."""

import base64
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.regions import (
    MissingRegions,
    Regions,
    join,
    make_regions,
    most_confident,
    prepend_image,
)
from clipdistill_jax.data.regions.bottom_up import BottomUpTsv
from clipdistill_jax.data.regions.geometry import uniter_locations, vl_bert_geometry
from clipdistill_jax.data.regions.uniter import (
    NpzFolder,
    UniterLmdb,
    coco_name,
    flickr_name,
    read_npz,
    vcr_names,
)
from clipdistill_jax.data.regions.vl_bert import VlBertFolder, read_json

SIZE = (640.0, 480.0)


def arrays(n: int = 5, width: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Features and boxes in pixels of a 640 x 480 image, the best first."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.5, (n, 2)) * SIZE
    high = low + rng.uniform(0.05, 0.5, (n, 2)) * SIZE
    return {
        "features": rng.normal(size=(n, width)).astype(np.float32),
        "boxes": np.concatenate([low, high], 1).astype(np.float32),
        "conf": np.sort(rng.uniform(0.05, 0.95, n))[::-1].astype(np.float32),
        "soft_labels": rng.dirichlet(np.ones(7), n).astype(np.float32),
    }


def uniter_arrays(n: int = 5, width: int = 8, seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """The same as UNITER's npz has them: half precision, boxes as fractions, with extent; conf [n, 1]."""
    found = arrays(n, width, seed)
    norm = found.pop("boxes") / np.array(SIZE * 2, np.float32)
    found["norm_bb"] = np.concatenate([norm, norm[:, 2:] - norm[:, :2]], 1)
    found["conf"] = found["conf"][:, None]
    return {k: v.astype(np.float16) for k, v in found.items()} | changes


def b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def check_same(found: Regions, expected: dict[str, np.ndarray], **tolerance) -> None:
    np.testing.assert_allclose(found.features, expected["features"], **tolerance)
    np.testing.assert_allclose(found.boxes, expected["boxes"], **tolerance)
    assert found.features.dtype == found.boxes.dtype == np.float32
    assert not found.ground_truth.any() and len(found) == len(expected["features"])


HALF = {"rtol": 2**-10, "atol": 2**-10 * 640}  # half precision has 11 bits; boxes are fractions of 640


# --- UNITER's npz


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
    with pytest.raises(FormatError) as caught:
        read_npz(tmp_path / "a.npz", width=8)
    for part in ["a.npz", *parts]:
        assert part in str(caught.value)


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


# --- UNITER's LMDB


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
    import io

    out = io.BytesIO()
    np.savez_compressed(out, **content)
    return out.getvalue()


def write_lmdb(folder: Path, values: dict[str, bytes], names: bytes | None = None) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as txn:
        for name, value in values.items():
            txn.put(name.encode(), value)
        txn.put(b"__keys__", json.dumps(list(values)).encode() if names is None else names)
    return folder


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
    import pickle

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
        with pytest.raises(FormatError) as caught:
            found[name]
        for part in [f"key {name!r}", *parts]:
            assert part in str(caught.value)


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


# --- bottom-up attention's TSV


def six_columns(name: str, found: dict[str, np.ndarray]) -> list[str]:
    n = len(found["features"])
    return [name, "640", "480", str(n), b64(found["boxes"]), b64(found["features"])]


def ten_columns(name: str, found: dict[str, np.ndarray]) -> list[str]:
    n = len(found["features"])
    ids, conf = np.arange(n, dtype=np.int64), found["conf"]
    row = [name, "480", "640", b64(ids), b64(conf), b64(ids), b64(conf), str(n)]
    return [*row, b64(found["boxes"]), b64(found["features"])]


def write_tsv(path: Path, rows: list[list[str]]) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("columns", [six_columns, ten_columns])
def test_tsv_in_both_orders(tmp_path, columns):
    images = {str(k): arrays(n=3 + k, seed=k) for k in (7, 1, 4)}
    path = write_tsv(tmp_path / "a.tsv", [columns(name, found) for name, found in images.items()])
    tsv = BottomUpTsv(path, width=8)
    assert list(tsv) == ["7", "1", "4"] and len(tsv) == 3
    for name, expected in images.items():
        found = tsv[name]
        check_same(found, expected, rtol=0, atol=0)
        assert found.size == SIZE
        if columns is ten_columns:
            np.testing.assert_array_equal(found.conf, expected["conf"])
            np.testing.assert_array_equal(found.class_ids, np.arange(len(found)))
        else:
            assert found.conf is None and found.class_ids is None
    with pytest.raises(MissingRegions, match="has no image '8'"):
        tsv["8"]


def test_real_features_through_tsv_and_json(tmp_path, shared_data):
    real = np.load(shared_data / "vqa_v2_mini/COCO_train2014_000000458752.npz")
    content = {"features": real["features"].astype(np.float32), "boxes": real["boxes"] * np.float32(0.6)}
    content["conf"] = np.linspace(1, 0.1, 36, dtype=np.float32)
    path = write_tsv(tmp_path / "a.tsv", [ten_columns("COCO_train2014_000000458752", content)])
    found = BottomUpTsv(path)["COCO_train2014_000000458752"]
    check_same(found, content, rtol=0, atol=0)
    write_json(tmp_path, "458752", content)
    check_same(VlBertFolder(tmp_path)["458752"], content, rtol=0, atol=0)


def edited(column: int, value: str) -> list[list[str]]:
    rows = [six_columns(str(k), arrays(seed=k)) for k in range(3)]
    rows[1][column] = value
    return rows


TSV_DAMAGE = {
    "swapped sides": (edited(1, "200"), ["line 2, image '1'", "leaves the image of 200 x 480"]),
    "no number": (edited(2, "x"), ["line 2, image '1'", "image_h", "should be numbers"]),
    "another count": (edited(3, "7"), ["line 2", "'features'", "do not make 7 rows"]),
    "no regions": (edited(3, "0"), ["line 2", "'features'", "do not make 0 rows"]),
    "not base64": (edited(4, "a*b="), ["line 2", "'boxes': not base64"]),
    "cut in base64": (edited(5, b64(arrays(seed=1)["features"])[:-3]), ["line 2", "'features': not base64"]),
    "cut in a row": (edited(5, b64(np.ones(39, np.float32))), ["line 2", "156 bytes do not make 5 rows"]),
    "another width": (
        edited(5, b64(np.ones((5, 4), np.float32))),
        ["line 2", "is 4 wide, the model takes 8"],
    ),
    "boxes of five": (
        edited(4, b64(np.ones((5, 5), np.float32))),
        ["'boxes' should be [5, 4], found [5, 5]"],
    ),
}


@pytest.mark.parametrize("name", TSV_DAMAGE)
def test_damaged_tsv_rows(tmp_path, name):
    rows, parts = TSV_DAMAGE[name]
    tsv = BottomUpTsv(write_tsv(tmp_path / "a.tsv", rows), width=8)
    assert len(tsv["0"]) == len(tsv["2"]) == 5
    with pytest.raises(FormatError) as caught:
        tsv["1"]
    for part in ["a.tsv", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the file is empty"),
        ("1\t2\t3\n", "line 1: 3 columns, expected 6 or 10"),
        ("a\t1\t1\t1\tx\ty\nb\t1\t1\n", "line 2: 3 columns, expected 6; cut short"),
        ("a\t1\t1\t1\tx\ty\n\na\t1\t1\t1\tx\ty\n", "line 3: the id 'a' was already in line 1"),
    ],
)
def test_damaged_tsv_files(tmp_path, text, part):
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(FormatError, match=part):
        BottomUpTsv(tmp_path / "a.tsv")


# --- VL-BERT's json


def write_json(folder: Path, name: str, found: dict[str, np.ndarray], **changes) -> Path:
    data = {"image_id": int(name), "image_w": 640, "image_h": 480, "num_boxes": len(found["features"])}
    data |= {"boxes": b64(found["boxes"]), "features": b64(found["features"])} | changes
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data))
    return path


def test_json(tmp_path):
    whole = np.arange(8, dtype=np.float32)
    write_json(tmp_path, "12", arrays())
    write_json(tmp_path, "13", arrays(), image_box_feature=b64(whole))
    folder = VlBertFolder(tmp_path, width=8)
    assert list(folder) == ["12", "13"]
    check_same(folder["12"], arrays(), rtol=0, atol=0)
    assert folder["12"].image is None and folder["12"].size == SIZE
    np.testing.assert_array_equal(folder["13"].image, whole)
    with pytest.raises(MissingRegions, match=r"has no 14\.json"):
        folder["14"]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        VlBertFolder(tmp_path / "no")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"features": 3}, ["'features' should be a str"]),
        ({"num_boxes": "5"}, ["'num_boxes' should be a int"]),
        ({"num_boxes": 3}, ["'features'", "160 bytes do not make 3 rows"]),
        ({"image_id": 8}, ["'image_id' is 8, another image's"]),
        ({"image_box_feature": b64(np.ones(9, np.float32))}, ["'image' should be [8], found [9]"]),
        ({"image_w": -1}, ["-1.0 x 480.0"]),
        ({"boxes": b64(np.full((5, 4), 700, np.float32))}, ["box 0 (700, 700, 700, 700) leaves"]),
    ],
)
def test_damaged_json(tmp_path, changes, parts):
    path = write_json(tmp_path, "7", arrays(), **changes)
    with pytest.raises(FormatError) as caught:
        read_json(path, width=8)
    for part in ["7.json", *parts]:
        assert part in str(caught.value)


# --- the record


def some(n: int, *, seed: int = 0, size=SIZE, conf: bool = True) -> Regions:
    content = arrays(n, seed=seed)
    extra = {"conf": content["conf"], "class_probs": content["soft_labels"]} if conf else {}
    return make_regions(content["features"], content["boxes"], size, "x", width=8, **extra)


def test_ground_truth_first():
    truth, detected = some(3, seed=1), some(4, seed=2)
    found = join(truth, detected, "image", num_objects=3)
    assert found.ground_truth.tolist() == [True] * 3 + [False] * 4
    for name in ("features", "boxes", "conf", "class_probs"):
        np.testing.assert_array_equal(getattr(found, name)[:3], getattr(truth, name))
        np.testing.assert_array_equal(getattr(found, name)[3:], getattr(detected, name))
    assert join(some(2, conf=False), detected, "image").conf is None
    with pytest.raises(FormatError, match="image: 3 ground-truth regions, but 5 objects"):
        join(truth, detected, "image", num_objects=5)
    with pytest.raises(FormatError, match=r"\(640.0, 480.0\).*\(1.0, 1.0\).*scaled"):
        join(truth, detected.scaled((1.0, 1.0)), "image")
    narrow = make_regions(np.ones((1, 5)), np.ones((1, 4)), SIZE, "x", width=None)
    with pytest.raises(FormatError, match="'features' is 8 wide in the ground truth, 5 in the detections"):
        join(truth, narrow, "image")


def test_scaling_there_and_back():
    found = some(4)
    back = found.scaled((1.0, 1.0)).scaled(SIZE)
    np.testing.assert_allclose(back.boxes, found.boxes, rtol=3e-7)  # two roundings of 2**-24
    assert back.size == SIZE


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=16), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(8, 20),
)
def test_most_confident(conf, low, high):
    n = len(conf)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1))
    features = np.arange(n, dtype=np.float32)[:, None]
    regions = make_regions(features, boxes, (1.0, 1.0), "x", width=1, conf=np.array(conf, np.float32))
    found = most_confident(regions, threshold=0.2, min_count=low, max_count=high)
    above = sum(c > np.float32(0.2) for c in np.array(conf, np.float32))
    assert len(found) == min(n, max(low, min(above, high)))
    best_first = sorted(range(n), key=lambda i: (-conf[i], i))
    assert found.features[:, 0].tolist() == best_first[: len(found)]


def test_confidence_is_needed():
    with pytest.raises(ValueError, match="without confidences"):
        most_confident(some(3, conf=False))


def test_whole_image_as_region_0():
    found = prepend_image(some(4), inset=1)
    assert len(found) == 5 and not found.ground_truth.any()
    assert found.boxes[0].tolist() == [0, 0, 639, 479]
    np.testing.assert_allclose(found.features[0], arrays(4)["features"].mean(0), rtol=1e-6)
    assert found.conf[0] == 1 and not found.class_probs[0].any()
    np.testing.assert_array_equal(found.boxes[1:], some(4).boxes)
    whole = np.arange(8, dtype=np.float32)
    given = make_regions(*(arrays(4)[k] for k in ("features", "boxes")), SIZE, "x", width=8, image=whole)
    found = prepend_image(given.scaled((1.0, 1.0)))
    np.testing.assert_array_equal(found.features[0], whole)
    np.testing.assert_array_equal(uniter_locations(found.boxes, found.size)[0], [0, 0, 1, 1, 1, 1, 1])
    truth = join(some(2), some(3), "image")
    assert prepend_image(truth).ground_truth.tolist() == [False, True, True, False, False, False]


# --- geometry


def slow_locations(box, size) -> list[float]:
    x1, y1, x2, y2 = box
    w, h = (x2 - x1) / size[0], (y2 - y1) / size[1]
    return [x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1], w, h, w * h]


def slow_geometry(box, size, waves) -> list[float]:
    x1, y1, x2, y2 = box
    out = []
    for value in (
        (x1 + x2) / 2 / size[0],
        (y1 + y2) / 2 / size[1],
        (x2 - x1) / size[0],
        (y2 - y1) / size[1],
    ):
        angles = [100 * value / 1000 ** (k / waves) for k in range(waves)]
        out += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return out


def test_geometry_against_the_formulas():
    boxes = arrays(6)["boxes"]
    np.testing.assert_allclose(
        uniter_locations(boxes, SIZE), [slow_locations(b, SIZE) for b in boxes.astype(float)], rtol=1e-5
    )
    found = vl_bert_geometry(boxes, SIZE)
    assert found.shape == (6, 2048)
    # float64 inside, rounded once: 2**-24 of at most 1.
    np.testing.assert_allclose(found, [slow_geometry(b, SIZE, 256) for b in boxes.astype(float)], atol=1e-7)


def test_geometry_by_hand():
    boxes = np.array([[0, 0, 50, 100]], np.float32)
    np.testing.assert_allclose(uniter_locations(boxes, (100.0, 100.0)), [[0, 0, 0.5, 1, 0.5, 1, 0.5]])
    found = vl_bert_geometry(boxes, (100.0, 100.0), waves=2)[0]
    # Centre (25, 50), extent (50, 100) hundredths; waves divide by 1 and by sqrt(1000).
    assert found[:4] == pytest.approx(
        [math.sin(25), math.sin(25 / 1000**0.5), math.cos(25), math.cos(25 / 1000**0.5)], abs=1e-7
    )
    assert found[12] == pytest.approx(math.sin(100), abs=1e-7)
