"""Features of boxes in UNITER's files: values, resuming, unreadable images."""

import json

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.data.regions.box_file import Boxes
from clipdistill_jax.data.regions.boxes import ImageBoxes, Plan
from clipdistill_jax.data.regions.extract import extract_regions, fit_square, padded_count, soft_labels
from clipdistill_jax.data.regions.uniter import NpzFolder
from clipdistill_jax.models.regions import RegionTower

SIZE = 16
# Its map is the image, 4 x 4 pixels a cell, times the weight.
TOWER = RegionTower(
    lambda gain, images: gain * images.reshape(len(images), 4, 4, 4, 4, 3).mean((2, 4)),
    np.float32(1),
    SIZE,
    (0.5, 0.5, 0.5),
)
LEFT = [0, 0, 0.5, 1]
RIGHT = [0.5, 0, 1, 1]
INNER = [0.25, 0.25, 0.75, 0.75]


def boxes(file, *corners, **fields):
    return Boxes(file, np.array(corners, np.float32), np.ones(len(corners), np.float32), **fields)


@pytest.fixture
def plan(tmp_path):
    """Five images of 16 x 16 pixels, black on the left; on the right image k has the grey 40 (k + 1)."""
    images = []
    for k in range(5):
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[:, 8:] = 40 * (k + 1)
        path = tmp_path / f"{k}.png"
        Image.fromarray(pixels).save(path)
        files = (boxes(f"gt_{k}.npz", LEFT, RIGHT), boxes(f"det_{k}.npz", *[INNER] * (1 + 8 * k)))
        images.append(ImageBoxes(path, "train", f"line {k}", files))
    return Plan(tuple(images), ())


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run(plan, out, tower=TOWER, options=None, **settings):
    settings = {"batch_size": 2, "workers": 2, "progress": False} | settings
    return extract_regions(plan, tower, out, options or {"tower": "a"}, **settings)


def test_values(plan, out):
    manifest = run(plan, out)
    assert {**manifest, "options": 0} == {
        "options": 0,
        "complete": True,
        "images": 5,
        "files": 10,
        "written": 10,
        "counts": {},
        "skipped": [],
    }
    assert json.loads((out / "regions.json").read_text()) == manifest
    folder = NpzFolder(out, width=3)
    assert len(folder) == 10
    for k in range(5):
        found = folder[f"gt_{k}.npz"]
        # A row of cells is black, black, grey, grey. Of the 14 samples of the left half the last three lie
        # beyond the second cell's centre, by 2/14, 4/14 and 6/14 of a cell: 12/14/14 = 3/49 is grey.
        grey = 40 * (k + 1)
        halves = np.array([[3 / 49], [46 / 49]]) * grey
        np.testing.assert_allclose(found.features, np.tile(halves, 3), rtol=1e-3)  # half precision
        np.testing.assert_array_equal(found.boxes, [LEFT, RIGHT])
        np.testing.assert_array_equal(found.conf, [1, 1])
        with np.load(out / f"gt_{k}.npz") as file:
            np.testing.assert_allclose(file["norm_bb"], [[*LEFT, 0.5, 1], [*RIGHT, 0.5, 1]])
            assert file["features"].dtype == np.float16
            np.testing.assert_allclose(file["image"], grey / 2, rtol=1e-3)  # by symmetry, as INNER is
        inner = np.full((1 + 8 * k, 3), grey / 2)
        np.testing.assert_allclose(folder[f"det_{k}.npz"].features, inner, rtol=1e-3)


def test_rows_do_not_depend_on_the_batch(plan, out, tmp_path):
    run(plan, out, batch_size=5)
    (tmp_path / "other").mkdir()
    run(plan, tmp_path / "other", batch_size=2)
    for name, found in NpzFolder(out, width=3).items():
        np.testing.assert_array_equal(found.features, NpzFolder(tmp_path / "other", width=3)[name].features)
    assert [padded_count(n) for n in (1, 16, 17, 32, 33, 101)] == [16, 16, 32, 32, 64, 128]


def test_goes_on(plan, out):
    first = run(Plan(plan.images[:3], ()), out)
    assert first["written"] == 6
    kept = (out / "gt_0.npz").stat().st_mtime_ns
    (out / "gt_1.npz").write_bytes((out / "gt_1.npz").read_bytes()[:-50])  # cut short
    (out / "det_2.npz").unlink()
    (out / "gt_9.npz.partial").write_bytes(b"half")
    manifest = run(plan, out)
    assert manifest["written"] == 2 * 4 and manifest["files"] == 10
    assert (out / "gt_0.npz").stat().st_mtime_ns == kept
    assert len(NpzFolder(out, width=3)["gt_1.npz"]) == 2 and not list(out.glob("*.partial"))
    moved = ImageBoxes(plan.images[0].image, "train", "line 0", (boxes("gt_0.npz", INNER),))
    assert run(Plan((moved,), ()), out)["written"] == 1  # other boxes than the file's
    with pytest.raises(ValueError, match=r"made with tower='a' \(now 'b'\)"):
        run(plan, out, options={"tower": "b"})


def test_unreadable_images(plan, out):
    path = plan.images[3].image
    path.write_bytes(path.read_bytes()[:60])  # the header is whole
    plan.images[1].image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)1 of 5 images.*1\.png, line 1: not a readable image"):
        run(plan, out)
    assert not json.loads((out / "regions.json").read_text())["complete"]
    manifest = run(plan, out, max_unreadable=0.5)
    assert (
        manifest["counts"] == {"unreadable_image": 2} and manifest["files"] == 6 and manifest["images"] == 3
    )
    assert [(p["file"], p["record"]) for p in manifest["skipped"]] == [
        (str(plan.images[k].image), f"line {k}") for k in (1, 3)
    ]
    assert "gt_1.npz" not in NpzFolder(out) and "gt_4.npz" in NpzFolder(out)


def test_soft_labels(plan, out):
    found = soft_labels(np.array([0.75, 1], np.float32), np.array([1, -1]), 3)
    np.testing.assert_array_equal(found, [[0.25, 0, 0.75, 0], [1, 0, 0, 0]])
    file = boxes("x.npz", LEFT, RIGHT, class_ids=np.array([2, 0], np.int32))
    run(Plan((ImageBoxes(plan.images[0].image, "train", "line 0", (file,)),), ()), out, num_classes=3)
    np.testing.assert_array_equal(NpzFolder(out, width=3)["x.npz"].class_probs, [[0, 0, 0, 1], [0, 1, 0, 0]])


def test_features_that_half_precision_cannot_hold(plan, out):
    broken = RegionTower(TOWER.maps, np.float32(1e4), SIZE, TOWER.mean)
    with pytest.raises(FloatingPointError, match=r"0\.png.*half precision"):
        run(plan, out, tower=broken)
    assert not list(out.glob("*.npz"))


def test_fit_square():
    image = Image.new("L", (20, 40), 255)
    pixels, extent = fit_square(image, 16, (0.5, 0.25, 0.0))
    assert extent == (8, 16) and pixels.shape == (16, 16, 3)
    assert (pixels[:, :8] == 255).all() and (pixels[:, 8:] == [128, 64, 0]).all()
    assert fit_square(Image.new("RGB", (1000, 1)), 16, (0.0, 0.0, 0.0)).extent == (16, 1)
