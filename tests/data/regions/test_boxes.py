"""Which boxes of which images: VCR's metadata, a user's box file, grids; and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.regions.box_file import read_classes
from clipdistill_jax.data.regions.boxes import plan_boxes

OBJECTS = ["person", "car"]


def vcr_tree(root):
    """Two train images, the first of two questions, of 64 x 48 pixels; the metadata's frame is twice that."""
    images = root / "vcr1images" / "m"
    images.mkdir(parents=True)
    lines = []
    for k, name in enumerate(["a", "a", "b"]):
        texts = [[["x"]] * 4] * 2
        lines.append(
            {
                "annot_id": f"train-{k}",
                "objects": OBJECTS,
                "img_fn": f"m/{name}.jpg",
                "metadata_fn": f"m/{name}.json",
                "question": ["Why", [0], "?"],
                "answer_choices": texts[0],
                "rationale_choices": texts[1],
                "answer_label": 0,
                "rationale_label": 0,
            }
        )
        Image.effect_noise((64, 48), 90).convert("RGB").save(images / f"{name}.jpg")
        boxes = [[0, 0, 64, 48, 0.9], [64, 24, 128.5, 96, 0.8]]
        metadata = {"names": OBJECTS, "boxes": boxes, "width": 128, "height": 96}
        (images / f"{name}.json").write_text(json.dumps(metadata))
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def write_boxes(path, boxes):
    path.write_text(json.dumps(boxes))
    return str(path)


def plan(tree, boxes, **options):
    return plan_boxes("vcr", tree, boxes, splits=("train",), **options)


@pytest.fixture
def tree(tmp_path):
    return vcr_tree(tmp_path / "vcr")


def test_annotated_boxes(tree):
    images, problems = plan(tree, "metadata")
    assert problems == ()
    assert [i.image.name for i in images] == ["a.jpg", "b.jpg"] and images[1].record == "train.jsonl, line 3"
    (file,) = images[0].files
    assert file.file == "vcr_gt_train_a.npz" and file.class_ids is None
    # In the metadata's frame, not the file's; half a pixel too far is cut off.
    np.testing.assert_array_equal(file.corners, [[0, 0, 0.5, 0.5], [0.5, 0.25, 1, 1]])
    np.testing.assert_array_equal(file.conf, [1, 1])


def test_box_file(tree, tmp_path):
    path = write_boxes(
        tmp_path / "b.json", {"m/a.jpg": [[16, 12, 32, 24, 0.75], [0, 0, 64, 48]], "m/b.jpg": []}
    )
    images, _ = plan(tree, path)
    ground_truth, detected = images[0].files
    assert (ground_truth.file, detected.file) == ("vcr_gt_train_a.npz", "vcr_train_a.npz")
    np.testing.assert_array_equal(detected.corners, [[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]])
    np.testing.assert_array_equal(detected.conf, [1, 0.75])  # the best first, as UNITER's files have them
    np.testing.assert_array_equal(images[1].files[1].corners, [[0, 0, 1, 1]])  # no detection: the whole image


def test_classes(tree, tmp_path):
    (tmp_path / "classes.txt").write_text("dog\ncar\nperson\n")
    classes = read_classes(tmp_path / "classes.txt")
    assert classes == ("dog", "car", "person")
    rows = [[1, 1, 2, 2, 0.5, 0], [1, 1, 2, 2, 0.6, "person"], [1, 1, 2, 2, 0.5, "car"]]
    images, _ = plan(
        tree, write_boxes(tmp_path / "b.json", {"m/a.jpg": rows, "m/b.jpg": []}), classes=classes
    )
    assert [f.class_ids.tolist() for i in images for f in i.files] == [[2, 1], [2, 0, 1], [2, 1], [-1]]
    with pytest.raises(FormatError, match=r"a\.json.*objects \['car'\] are not in the list"):
        plan(tree, "metadata", classes=("person", "dog"))
    (tmp_path / "classes.txt").write_text("dog\ndog\n")
    with pytest.raises(FormatError, match="line 2: the class 'dog' was already"):
        read_classes(tmp_path / "classes.txt")


def test_grid(tree):
    images, _ = plan(tree, "grid:2")
    assert [f.file for f in images[0].files] == ["vcr_gt_train_a.npz", "vcr_train_a.npz"]
    np.testing.assert_array_equal(
        images[0].files[1].corners,
        [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]],
    )
    for wrong in ("grid:0", "grid:11", "grid:x"):
        with pytest.raises(ValueError, match="N from 1 to 10"):
            plan(tree, wrong)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 0, 48, 64]], ["'m/a.jpg'", "box 0 (0, 0, 48, 64) leaves the image of 64 x 48", "swapped"]),
        ([[0, 0, 1, 1], [9, 0, 8, 1]], ["box 1", "x1 <= x2"]),
        ([[0, 0, 1]], ["box 0", "expected x1, y1, x2, y2"]),
        ([[0, 0, 1, "2"]], ["box 0", "expected x1, y1, x2, y2"]),
        ([[0, 0, 1, 1], [0, 0, 1, 10**400]], ["box 1", "expected x1, y1, x2, y2"]),
        ([[0, 0, 1, 1e300]], ["box 0", "expected x1, y1, x2, y2"]),
        ([[0, 0, 1, 1, 3]], ["box 0", "confidence 3"]),
        ([[0, 0, 1, 1, 1, 5]], ["have classes", "give the list"]),
        ({"boxes": []}, ["expected a list of boxes"]),
    ],
)
def test_damaged_rows(tree, tmp_path, rows, said):
    path = write_boxes(tmp_path / "b.json", {"m/a.jpg": rows, "m/b.jpg": []})
    with pytest.raises(FormatError) as caught:
        plan(tree, path)
    assert all(part in str(caught.value) for part in [path, *said]), caught.value


def test_damaged_classes(tree, tmp_path):
    for row, said in (([0, 0, 1, 1], "box 0: no class"), ([0, 0, 1, 1, 1, "cat"], "'cat' is none of the 2")):
        path = write_boxes(tmp_path / "b.json", {"m/a.jpg": [row], "m/b.jpg": []})
        with pytest.raises(FormatError, match=said):
            plan(tree, path, classes=("person", "car"))


def test_names_of_the_box_file(tree, tmp_path):
    path = write_boxes(tmp_path / "b.json", {"a.jpg": [], "m/b.jpg": []})
    with pytest.raises(FormatError, match=r"1 of its 2 names.*first 'a\.jpg'; a name looks like 'm/a\.jpg'"):
        plan(tree, path)
    path = write_boxes(tmp_path / "b.json", {"m/b.jpg": []})
    with pytest.raises(FormatError, match=r"no boxes of 1 of 2 images, the first 'm/a\.jpg'"):
        plan(tree, path)
    (tmp_path / "b.json").write_text('{"m/a.jpg": [], "m/b.jpg": [], "m/a.jpg": [[0, 0, 1, 1]]}')
    with pytest.raises(FormatError, match=r"b\.json: 'm/a\.jpg' occurs twice"):
        plan(tree, path)
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(FormatError, match="expected an object"):
        plan(tree, path)
    with pytest.raises(FileNotFoundError, match="none.json"):
        plan(tree, str(tmp_path / "none.json"))


def test_missing_and_unreadable_images(tree, tmp_path):
    path = write_boxes(tmp_path / "b.json", {"m/a.jpg": [], "m/b.jpg": []})
    (tree / "vcr1images/m/a.jpg").write_bytes(b"no jpeg")
    images, problems = plan(tree, path)
    assert [i.image.name for i in images] == ["b.jpg"]
    assert [(p.kind, p.split, p.record) for p in problems] == [
        ("unreadable_image", "train", "train.jsonl, line 1")
    ]
    (tree / "vcr1images/m/b.jpg").unlink()
    with pytest.raises(FormatError, match=r"b\.jpg"):
        plan(tree, path)
    images, problems = plan(tree, path, allow_missing=True)
    assert images == () and [p.kind for p in problems] == ["missing_image", "unreadable_image"]


def test_two_images_of_one_file_name(tree):
    (tree / "vcr1images/n").mkdir()
    for suffix in ("jpg", "json"):
        (tree / f"vcr1images/m/a.{suffix}").rename(tree / f"vcr1images/n/b.{suffix}")
    text = (tree / "train.jsonl").read_text().replace("m/a.", "n/b.")
    (tree / "train.jsonl").write_text(text)
    with pytest.raises(FormatError, match="line 3: the image .* would have the file vcr_train_b.npz"):
        plan(tree, "metadata")


def test_snli_ve_and_vqa(tmp_path):
    (tmp_path / "flickr30k_images").mkdir()
    (tmp_path / "train2014").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flickr30k_images/36979.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "train2014/COCO_train2014_000000000009.jpg")
    pair = {"pairID": "1", "Flickr30K_ID": "36979", "gold_label": "neutral", "sentence2": "A man."}
    (tmp_path / "snli_ve_train.jsonl").write_text(json.dumps(pair) + "\n")
    question = {"image_id": 9, "question": "What?", "question_id": 1}
    note = {"question_id": 1, "image_id": 9, "answers": [{"answer": "x"}] * 10}
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps({"questions": [question]})
    )
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": [note]}))
    for format, file, name in (
        ("snli_ve", "flickr30k_000000036979.npz", "36979.jpg"),
        ("vqa", "coco_train2014_000000000009.npz", "COCO_train2014_000000000009.jpg"),
    ):
        images, _ = plan_boxes(format, tmp_path, "grid:1", splits=("train",))
        assert [[f.file for f in i.files] for i in images] == [[file]]
        path = write_boxes(tmp_path / "boxes.json", {name: [[0, 0, 4, 8]]})
        images, _ = plan_boxes(format, tmp_path, path, splits=("train",))
        np.testing.assert_array_equal(images[0].files[0].corners, [[0, 0, 0.5, 1]])
        with pytest.raises(ValueError, match="no annotated boxes"):
            plan_boxes(format, tmp_path, "metadata", splits=("train",))
        with pytest.raises(ValueError, match="splits has"):
            plan_boxes(format, tmp_path, "grid:1", splits=("val",))
    (tmp_path / "flickr30k_images/x.jpg").write_bytes(b"")
    (tmp_path / "snli_ve_train.jsonl").write_text(json.dumps(pair | {"Flickr30K_ID": "x"}) + "\n")
    images, _ = plan_boxes("snli_ve", tmp_path, "grid:1", splits=("train",))
    assert images[0].files[0].file == "x.npz"
    with pytest.raises(ValueError, match="'coco' is not one of vcr, snli_ve, vqa"):
        plan_boxes("coco", tmp_path, "grid:1")
