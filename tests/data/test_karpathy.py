"""Captions of still images in Karpathy's files: records, images as clips, and what is refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.data.formats import FormatError, reader_options
from clipdistill_jax.data.formats.karpathy import read
from clipdistill_jax.data.pipeline import RetrievalData
from clipdistill_jax.data.shapes.karpathy import write_karpathy
from clipdistill_jax.data.shapes.painting import paint
from clipdistill_jax.data.shapes.sayings import captions
from clipdistill_jax.data.shapes.scenes import SceneConfig
from clipdistill_jax.data.shapes.stills_tree import draw_stills
from clipdistill_jax.data.tokenizer import open_tokenizer
from clipdistill_jax.data.video import VideoOptions, read_frames
from clipdistill_jax.prepare import prepare_dataset

SPLITS = ("train", "restval", "val", "test", "train")


def image(k: int, **changes) -> dict:
    sentences = [
        {"tokens": [], "raw": f"Sentence  {i} of {k}.", "imgid": k, "sentid": 5 * k + i} for i in range(2)
    ]
    record = {
        "filepath": "val2014" if k else "train2014",
        "sentids": [5 * k, 5 * k + 1],
        "filename": f"COCO_{k}.jpg",
        "imgid": k,
        "split": SPLITS[k],
        "sentences": sentences,
        "cocoid": k,
    }
    return record | changes


def write(folder: Path, images: list[dict], name: str = "dataset_coco.json") -> None:
    (folder / name).write_text(json.dumps({"images": images, "dataset": "coco"}))


@pytest.fixture
def tree(tmp_path) -> Path:
    """COCO's layout: two folders of images."""
    write(tmp_path, [image(k) for k in range(5)])
    for k in range(5):
        path = tmp_path / image(k)["filepath"] / f"COCO_{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"jpeg" * (k + 1))
    return tmp_path


def test_records(tree):
    found = read(tree)
    ids = {split: [clip.video_id for clip in clips] for split, clips in found.splits.items()}
    assert ids == {"train": ["COCO_0", "COCO_1", "COCO_4"], "validation": ["COCO_2"], "test": ["COCO_3"]}
    assert found.problems == () and found.notes == () and found.listed["train"] == 3
    clip = found.splits["train"][1]
    assert clip.path.resolve() == (tree / "val2014/COCO_1.jpg").resolve()
    assert clip.captions == ("Sentence 0 of 1.", "Sentence 1 of 1.")
    assert clip.record == "dataset_coco.json, images[1]"
    assert reader_options("karpathy") == {"restval": True}


def test_without_restval(tree):
    found = read(tree, restval=False)
    assert [clip.video_id for clip in found.splits["train"]] == ["COCO_0", "COCO_4"]
    assert found.notes == ("1 images of the split 'restval' are left out",)


def test_flickr_in_a_folder_of_its_own(tree):
    (tree / "dataset_coco.json").rename(tree / "dataset_flickr30k.json")
    (tree / "flickr30k_images").mkdir()
    for k in range(5):
        (tree / f"flickr30k_images/COCO_{k}.JPG").write_bytes(b"x")
    clips = read(tree).splits["train"]
    assert clips[0].path == tree / "flickr30k_images/COCO_0.JPG"


def test_the_fingerprint_changes_with_captions_and_images(tree):
    before = read(tree).fingerprint
    assert read(tree).fingerprint == before
    (tree / "val2014/COCO_4.jpg").write_bytes(b"other")
    changed = read(tree).fingerprint
    write(tree, [image(k) for k in range(4)])
    assert len({before, changed, read(tree).fingerprint}) == 3


def test_missing_images_and_empty_sentences_are_noted(tree):
    (tree / "val2014/COCO_1.jpg").unlink()
    images = [image(k) for k in range(5)]
    images[0]["sentences"][0]["raw"] = " "
    images[4]["sentences"] = []
    write(tree, images)
    found = read(tree)
    assert [clip.video_id for clip in found.splits["train"]] == ["COCO_0"]
    assert found.splits["train"][0].captions == ("Sentence 1 of 0.",)
    kinds = [(p.kind, p.split, p.file) for p in found.problems]
    name = "dataset_coco.json"
    assert kinds == [
        ("empty_caption", "train", name),
        ("missing_video", "train", name),
        ("no_caption", "train", name),
    ]
    assert "images[0], sentences[0]" in found.problems[0].record


DAMAGE = {
    "no file name": ({"filename": None}, ["'filename'", "should be a str"]),
    "name that leads out": ({"filename": "../x.jpg"}, ["'filename'", "refused"]),
    "name with a folder": ({"filename": "val2014/x.jpg"}, ["'filename'", "refused"]),
    "not an image": ({"filename": "x.mp4"}, ["'x.mp4'", ".jpg, .jpeg, .png"]),
    "name twice": ({"filename": "COCO_1.png"}, ["'COCO_1'", "already in", "images[1]"]),
    "unknown split": ({"split": "dev"}, ["'split' is 'dev'", "train, restval, val, test"]),
    "no sentences": ({"sentences": "none"}, ["'sentences'", "should be a list"]),
    "sentence without text": (
        {"sentences": [{"raw": "a"}, {"tokens": []}]},
        ["sentences[1]", "'raw' is missing"],
    ),
    "sentence that is a number": ({"sentences": [{"raw": 3}]}, ["sentences[0]", "'raw'", "should be a str"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_records(tree, name):
    changes, parts = DAMAGE[name]
    write(tree, [image(k, **(changes if k == 2 else {})) for k in range(5)])
    with pytest.raises(FormatError) as caught:
        read(tree)
    for part in ["dataset_coco.json, images[2]", *parts]:
        assert part in str(caught.value)


def test_damaged_files(tree, tmp_path_factory):
    path = tree / "dataset_coco.json"
    whole = path.read_text()
    path.write_text(whole[:-30])
    with pytest.raises(FormatError, match="not valid JSON"):
        read(tree)
    path.write_text("[]")
    with pytest.raises(FormatError, match="top level: expected an object with 'images'"):
        read(tree)
    write(tree, [image(2), image(3)])
    with pytest.raises(FormatError, match="none of its 2 images is in the split 'train'"):
        read(tree)
    path.write_text(whole)
    (tree / "dataset_flickr8k.json").write_text(whole)
    with pytest.raises(FormatError, match="dataset_flickr8k.json and dataset_coco.json are both there"):
        read(tree)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match="no annotations; expected dataset_flickr30k.json"):
        read(empty)
    write(empty, [image(0)])
    with pytest.raises(FileNotFoundError, match="no images; expected files such as .id..jpg"):
        read(empty)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "L"}, {"format": "PNG"}])
def test_an_image_is_a_clip_of_one_frame(tmp_path, options):
    y, x = np.mgrid[0:48, 0:64]
    picture = Image.fromarray(np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], -1).astype(np.uint8))
    path = tmp_path / ("%03d." + ("png" if "format" in options else "jpg"))  # the name is no pattern
    picture.convert(options.get("mode", "RGB")).save(
        path, quality=95, progressive=options.get("progressive", False)
    )
    clip = read_frames(path, VideoOptions(size=48, quality=95))
    assert clip.timestamps == (0.0,)
    (jpeg,) = clip.frames
    found, expected = (np.asarray(Image.open(f).convert("RGB"), int) for f in (io.BytesIO(jpeg), path))
    assert found.shape == (48, 64, 3)
    assert np.abs(found - expected).mean() < 3  # JPEG once more


def test_the_world_as_captioned_images(tmp_path):
    config = SceneConfig(train=6, validation=3, test=4, captions=2)
    write_karpathy(tmp_path / "world", config, workers=1)
    video = VideoOptions(size=64, quality=95)
    manifest = prepare_dataset(
        "karpathy", tmp_path / "world", tmp_path / "out", video=video, workers=1, progress=False
    )
    assert manifest["counts"] == {} and manifest["notes"] == []
    assert manifest["splits"]["train"] == {"listed": 6, "clips": 6, "captions": 12, "frames": 6}
    tokenizer = open_tokenizer("train:600", "clip", lambda: ["a red ball"], tmp_path / "tokenizer")
    data = RetrievalData(tmp_path / "out", tokenizer, max_tokens=16)
    for split, stills in draw_stills(config, "karpathy").items():
        train = split == "train"
        said = [text for still in stills for text in captions(still, 2 if train else 1, partial=train)]
        assert data.captions(split) == said
        (batch,) = data.eval_clips(split, batch_size=len(stills), num_frames=1, image_size=64)
        assert batch["frames"].shape == (len(stills), 1, 64, 64, 3) and batch["frame_mask"].all()
        painted = np.stack([paint(still, config)[0] for still in stills]).astype(float)
        distance = np.abs(batch["frames"].astype(float) - painted[None]).mean((2, 3, 4))
        np.testing.assert_array_equal(distance.argmin(1), np.arange(len(stills)))
        assert distance.min(1).max() < 12  # two JPEGs, of which one keeps half of the colours' detail
