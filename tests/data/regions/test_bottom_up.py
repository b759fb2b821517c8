"""Bottom-up attention's TSV, in both orders of its columns."""

from pathlib import Path

import numpy as np
import pytest

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.regions import MissingRegions
from clipdistill_jax.data.regions.bottom_up import BottomUpTsv
from tests.data.damage import refused
from tests.data.regions.region_cases import SIZE, arrays, b64, check_same, real


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


def test_real_features(tmp_path, shared_data):
    content = real(shared_data)
    path = write_tsv(tmp_path / "a.tsv", [ten_columns("COCO_train2014_000000458752", content)])
    check_same(BottomUpTsv(path)["COCO_train2014_000000458752"], content, rtol=0, atol=0)


def edited(column: int, value: str) -> list[list[str]]:
    rows = [six_columns(str(k), arrays(seed=k)) for k in range(3)]
    rows[1][column] = value
    return rows


TSV_DAMAGE = {
    "swapped sides": (edited(1, "200"), ["line 2, image '1'", "leaves the image of 200 x 480"]),
    "no number": (edited(2, "x"), ["line 2, image '1'", "image_h", "should be numbers"]),
    "too large": (edited(1, "9" * 400), ["line 2, image '1'", "the size inf x 480.0"]),
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
    with refused("a.tsv", *parts):
        tsv["1"]


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
