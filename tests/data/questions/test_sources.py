"""Finding an image's regions in every file format, by UNITER's names, the file's and the dataset's."""

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.formats.snli_ve import SnliVeRecord
from clipdistill_jax.data.formats.vcr import VcrRecord
from clipdistill_jax.data.formats.vqa import VqaRecord
from clipdistill_jax.data.questions.images import images_of
from clipdistill_jax.data.questions.sources import RegionSource, read_regions, region_names
from clipdistill_jax.data.regions import MissingRegions
from tests.data.questions.trees import WIDTH, region_arrays, write_regions

VCR = VcrRecord(
    "train-0", Path("m/a@0.jpg"), Path("m/a@0.json"), ("person",), ("?",), (), (), None, None, "r"
)
VE = SnliVeRecord("1.jpg#0", "123", Path("123.jpg"), "text", 0, "Flickr30K_ID", "r")
VQA = VqaRecord("7", 42, Path("COCO_val2014_000000000042.jpg"), "what", (), None, None, "r")


def b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode()


def pixels(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, and boxes in a frame of 200 x 100."""
    arrays = region_arrays(3, count, False)
    return arrays["features"], arrays["norm_bb"][:, :4] * np.array([200, 100, 200, 100])


def write_tsv(folder: Path, name: str) -> None:
    features, boxes = pixels(4)
    folder.mkdir(exist_ok=True)
    row = [name, "200", "100", "4", b64(boxes), b64(features)]
    with open(folder / "some.tsv", "a") as file:
        file.write("\t".join(row) + "\n")


def write_json(folder: Path, name: str) -> None:
    features, boxes = pixels(4)
    folder.mkdir(exist_ok=True)
    data = {"image_id": name, "image_w": 200, "image_h": 100, "num_boxes": 4}
    (folder / f"{name}.json").write_text(json.dumps(data | {"boxes": b64(boxes), "features": b64(features)}))


def test_names():
    assert region_names(VCR, "validation", "npz") == (("vcr_gt_val_a@0.npz",), ("vcr_val_a@0.npz",))
    assert region_names(VE, "train", "lmdb") == ((), ("flickr30k_000000000123.npz", "123.npz"))
    assert region_names(VQA, "validation", "tsv") == (
        (),
        ("coco_val2014_000000000042", "COCO_val2014_000000000042", "42"),
    )


@pytest.mark.parametrize("name", ["42", "COCO_val2014_000000000042", "coco_val2014_000000000042"])
@pytest.mark.parametrize(("format", "write"), [("tsv", write_tsv), ("vl_bert", write_json)])
def test_other_formats(tmp_path, format, write, name):
    """The whole image first, then as many as are wanted; boxes in the file's frame."""
    write(tmp_path / "inner", "13")
    write(tmp_path / "inner", name)
    source = RegionSource(tmp_path, format, width=WIDTH)
    options = {"num_objects": 0, "max_regions": 3, "need_detected": True, "where": "train.json, questions[0]"}
    found = read_regions(source, *region_names(VQA, "validation", format), **options)
    features, boxes = pixels(4)
    assert len(found) == 4 and found.size == (200, 100)
    np.testing.assert_array_equal(found.features[1:], features[:3])
    np.testing.assert_allclose(found.features[0], features[:3].astype(float).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.boxes, [[0, 0, 200, 100], *boxes[:3]], rtol=1e-6)
    with pytest.raises(MissingRegions, match=r"train.json, questions\[0\].*has no flickr30k_000000000123"):
        read_regions(source, *region_names(VE, "train", format), **options)
    with pytest.raises(FormatError, match=f"{WIDTH} wide, the model takes 9"):
        wrong = RegionSource(tmp_path, format, width=9)
        read_regions(wrong, *region_names(VQA, "validation", format), **options)


def test_annotated_regions_alone(tmp_path):
    """Where no image has detections, none needs them."""
    write_regions(tmp_path, "vcr_gt_train_a@0.npz", **region_arrays(0, 1, True))
    source = RegionSource(tmp_path, "npz", width=WIDTH)
    names = region_names(VCR, "train", "npz")
    options = {"num_objects": 1, "max_regions": 5, "where": "train.jsonl, line 1"}
    assert len(read_regions(source, *names, need_detected=False, **options)) == 2
    with pytest.raises(MissingRegions, match="has no vcr_train_a@0.npz"):
        read_regions(source, *names, need_detected=True, **options)
    other = RegionSource(tmp_path, "npz", width=WIDTH).fingerprint
    assert other == source.fingerprint
    write_regions(tmp_path, "vcr_train_a@0.npz", **region_arrays(0, 2, False))
    again = RegionSource(tmp_path, "npz", width=WIDTH)
    assert again.fingerprint != source.fingerprint
    assert len(read_regions(again, *names, need_detected=True, **options)) == 4


@pytest.mark.parametrize("format", ["npz", "tsv"])
def test_fingerprint_follows_what_files_hold(tmp_path, format):
    """Of the same names and sizes."""

    def fingerprint(seed: int) -> str:
        arrays = region_arrays(seed, 40, False, 64)
        if format == "npz":
            write_regions(tmp_path, "a.npz", **arrays)
        else:
            row = ["7", "1", "1", "40", b64(arrays["norm_bb"][:, :4]), b64(arrays["features"])]
            (tmp_path / "some.tsv").write_text("\t".join(row) + "\n")
        return RegionSource(tmp_path, format, width=64).fingerprint

    first = fingerprint(3)
    assert fingerprint(4) != first and fingerprint(3) == first


def test_what_two_folders_have(tmp_path):
    """Which is meant only the user knows; of names that nobody asks for it does not matter."""
    for folder in ("a", "b"):
        write_regions(tmp_path / folder, "vcr_train_a@0.npz", **region_arrays(0, 1, False))
    write_regions(tmp_path / "b", "vcr_gt_train_a@0.npz", **region_arrays(0, 1, True))
    source = RegionSource(tmp_path, "npz", width=WIDTH)
    assert len(source["vcr_gt_train_a@0.npz"]) == 1
    for ask in (source.__getitem__, source.__contains__, lambda name: source.first_of([name])):
        with pytest.raises(FormatError, match=r"vcr_train_a@0\.npz is in .*/a and in .*/b: give the one"):
            ask("vcr_train_a@0.npz")


def test_frames_of_one_name_in_two_movies(tmp_path):
    write_regions(tmp_path, "vcr_train_a@0.npz", **region_arrays(0, 1, False))
    source = RegionSource(tmp_path, "npz", width=WIDTH)
    other = dataclasses.replace(VCR, image=Path("n/a@0.jpg"), example_id="train-1", record="line 2")
    assert len(images_of([VCR, VCR], "train", source)) == 1
    with pytest.raises(FormatError, match=r"line 2, id 'train-1'.*n/a@0\.jpg would .* of m/a@0\.jpg"):
        images_of([VCR, other], "train", source)
