"""VL-BERT's region features: a json file an image."""

import json
from pathlib import Path

import numpy as np
import pytest

from clipdistill_jax.data.regions import MissingRegions
from clipdistill_jax.data.regions.vl_bert import VlBertFolder, read_json
from tests.data.damage import refused
from tests.data.regions.region_cases import SIZE, arrays, b64, check_same, real


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
        ({"image_w": -1}, ["'image_w' should be a number from 0, found -1"]),
        ({"image_h": 10**400}, ["'image_h' should be a number from 0"]),
        ({"boxes": b64(np.full((5, 4), 700, np.float32))}, ["box 0 (700, 700, 700, 700) leaves"]),
    ],
)
def test_damaged_json(tmp_path, changes, parts):
    path = write_json(tmp_path, "7", arrays(), **changes)
    with refused("7.json", *parts):
        read_json(path, width=8)


def test_real_features(tmp_path, shared_data):
    content = real(shared_data)
    write_json(tmp_path, "458752", content)
    check_same(VlBertFolder(tmp_path)["458752"], content, rtol=0, atol=0)
