"""Preparing questions: the manifest, a second call, what is left out, and what is refused."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.data import builder
from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.importance import word_importance
from clipdistill_jax.data.index import read_manifest
from clipdistill_jax.data.questions.importance import importance_file
from clipdistill_jax.data.questions.index import read_images, read_items
from clipdistill_jax.data.questions.prepare import prepare_questions
from clipdistill_jax.data.regions.uniter import vcr_names
from clipdistill_jax.data.vocabulary import read_vocabulary
from tests.data.questions.trees import (
    CLASSES,
    OBJECTS,
    SIZES,
    VCR,
    VE,
    VQA,
    WIDTH,
    region_arrays,
    vcr_record,
    write_lines,
    write_regions,
)
from tests.data.regions.region_cases import write_lmdb

pytest.importorskip("tensorflow", reason="records are written with TFDS")


@pytest.fixture
def copy(trees, tmp_path):
    """format -> a raw tree of its own, and where to prepare it."""

    def make(name: str) -> tuple[Path, Path]:
        return Path(shutil.copytree(trees[name], tmp_path / "raw")), tmp_path / "out"

    return make


def prepare(name: str, tree: Path, out: Path, **options):
    options = {"min_count": 3} | options if name == "vqa" else options
    return prepare_questions(name, tree, out, **({"regions": tree / "regions"} | SIZES | options))


def test_manifests(prepared):
    found = {name: read_manifest(folder) for name, folder in prepared.items()}
    items = {"train": 24, "validation": 12, "test": 4 * 5}  # of the test split four rationale items a record
    assert found["vcr"]["splits"] == {
        s: {"listed": n, "questions": n, "items": items[s], "images": n // 2, "left_out": []}
        for s, n in VCR.items()
    }
    for name, sizes, share in (("snli_ve", VE, 3), ("vqa", VQA, 2)):
        assert found[name]["splits"] == {
            s: {"listed": n, "questions": n, "items": n, "images": n // share, "left_out": []}
            for s, n in sizes.items()
        }
    assert found["vcr"]["object_classes"] == ["__background__", "car", "person"]
    assert {m["region_classes"] for m in found.values()} == {CLASSES}
    assert all(m["counts"] == {} and m["skipped"] == [] for m in found.values())
    vocabulary = read_vocabulary(prepared["vqa"] / "answers.json")
    assert vocabulary.answers == ("blue", "yes")
    assert found["vqa"]["answers"] == {"fingerprint": vocabulary.fingerprint, "count": 2}


def test_items(prepared):
    items = list(read_items(prepared["vcr"], "train", ("qa", "qar")))
    qa, qar = items[6:8]
    assert (qa.example_id, qar.example_id, qa.record_id) == ("train-3/qa", "train-3/qar", "train-3")
    assert (qa.image, qa.label, qar.label, qa.given, qar.given) == (1, 3, 0, -1, 3)
    record = vcr_record("train", 3)
    words = tuple(w if isinstance(w, str) else tuple(w) for w in record["question"])
    assert qa.context == (words,) and qar.context == (words, qa.choices[3])
    assert qar.choices[2] == ((0, 1), "hurry", "2") and qa.objects == tuple(OBJECTS)
    assert qa.names[2] == "car" and len({*qa.names}) == 3 and "person" not in qa.names
    assert items[0].category == "explanation" and items[0].group == items[1].group
    test = list(read_items(prepared["vcr"], "test", ("qa", "qar")))
    assert [i.example_id for i in test[:5]] == ["test-0/qa", *(f"test-0/qar{k}" for k in range(4))]
    assert [i.given for i in test[:5]] == [-1, 0, 1, 2, 3] and {i.label for i in test} == {-1}
    assert test[3].context[1] == test[0].choices[2]
    ve = list(read_items(prepared["snli_ve"], "validation", ("ve",)))
    assert [i.label for i in ve] == [0, 1, 2] * 2 and ve[1].category == ve[1].group == "entailment"
    vqa = list(read_items(prepared["vqa"], "train", ("vqa",)))
    assert [i.scores for i in vqa[:2]] == [{0: (1, 1), 1: (0.9, 0.9)}, {0: (0.9, 0.9), 1: (1, 1)}]  # 7 and 3
    last = list(read_items(prepared["vqa"], "validation", ("vqa",)))[-1]
    assert last.scores == {1: (1, 0)}  # ten times "Yes", of which the class "yes" is not the writing
    assert (vqa[0].category, vqa[0].group) == ("other", "all")
    assert {i.scores for i in read_items(prepared["vqa"], "test", ("vqa",))} == {None}


def test_importance_is_that_of_the_text_read_aloud(prepared):
    with np.load(importance_file(prepared["vcr"], "train", "qar", "both")) as file:
        starts, values = file["starts"], file["values"]
    # Question, right answer and second rationale of the first record; "and" has a score but no place.
    text = "Why is person near person and car ? person waits 0 . person and person hurry 1"
    (expected,) = word_importance([text])
    expected = np.delete(expected, [5, 13])
    np.testing.assert_allclose(values[starts[1] : starts[2]], expected, rtol=1e-6)
    assert len(starts) == 12 * 4 + 1 and expected.max() > 0


def test_a_second_call_finds_it_done(copy, monkeypatch):
    tree, out = copy("vcr")
    first = prepare("vcr", tree, out, clip_text="")
    prepare_here = partial(prepare, workers=1)  # processes for a few words take longer than the words
    assert not (out / "importance").exists()
    monkeypatch.setattr(builder, "write", lambda *args: pytest.fail("prepared again"))
    assert prepare_here("vcr", tree, out) == first  # and scores the words, which is asked for now
    assert importance_file(out, "train", "qa", "both").exists()
    with pytest.raises(ValueError, match=r"max_regions=5 \(now 4\)"):
        prepare("vcr", tree, out, max_regions=4)
    truth, _ = vcr_names("train", Path("train@0.jpg"))
    write_regions(tree / "regions", truth, **region_arrays(0, 3, True, WIDTH + 8))
    with pytest.raises(ValueError, match="are not the same as then"):
        prepare("vcr", tree, out)
    shutil.rmtree(tree)
    assert prepare_here("vcr", tree, out) == first


def test_a_database_gives_what_files_give(copy):
    tree, out = copy("vcr")
    arrays = sorted((tree / "regions").rglob("*.npz"))
    write_lmdb(tree / "database", {path.name: path.read_bytes() for path in arrays})
    database = dict(regions=tree / "database", region_format="lmdb", clip_text="")
    prepare("vcr", tree, out, **database)
    again = prepare("vcr", tree, out, **database)  # a process can open it once at a time
    assert again["splits"]["train"]["questions"] == VCR["train"]
    prepare("vcr", tree, out.with_name("of_files"), clip_text="")
    assert _files(out) == _files(out.with_name("of_files"))


def _files(folder: Path) -> dict[str, bytes]:
    """What a prepared folder holds, but for where it is from."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_after_a_stop_it_begins_anew(copy, monkeypatch):
    tree, out = copy("snli_ve")

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clipdistill_jax.data.questions.index.write_images", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare("snli_ve", tree, out)
    assert not (out / "manifest.json").exists()
    assert prepare("snli_ve", tree, out, workers=1)["splits"]["train"]["items"] == 12


def test_a_foreign_folder_is_left_alone(copy):
    tree, out = copy("vqa")
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty and not of this program's making"):
        prepare("vqa", tree, out)


def lose_picture(tree: Path) -> None:
    (tree / "vcr1images/lsmdc_m/train@2.jpg").unlink()


def spoil_picture(tree: Path) -> None:
    path = tree / "vcr1images/lsmdc_m/train@2.jpg"
    path.write_bytes(path.read_bytes()[:200])


def lose_regions(tree: Path) -> None:
    (tree / "regions" / vcr_names("train", Path("train@2.jpg"))[1]).unlink()


LEFT_OUT = {
    "missing_image": (lose_picture, ["train.jsonl", "line 5", "'train-4'", "'img_fn'", "train@2.jpg"]),
    "unreadable_image": (
        spoil_picture,
        ["train.jsonl", "line 5", "'img_fn'", "train@2.jpg", "cannot be read"],
    ),
    "missing_regions": (lose_regions, ["train.jsonl", "line 5", "'img_fn'", "vcr_train_train@2.npz"]),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_is_missing_is_an_error_or_listed(copy, kind):
    tree, out = copy("vcr")
    spoil, names = LEFT_OUT[kind]
    spoil(tree)
    with pytest.raises(FormatError) as error:
        prepare("vcr", tree, out, clip_text="")
    assert all(name in str(error.value) for name in names)
    manifest = prepare("vcr", tree, out, clip_text="", allow_missing=True, workers=2)
    counts = {"listed": 12, "questions": 10, "items": 20, "images": 5}
    assert manifest["splits"]["train"] == {**counts, "left_out": ["train-4", "train-5"]}
    assert manifest["counts"][kind] == len(manifest["skipped"]) == (2 if kind == "missing_image" else 1)
    skipped = manifest["skipped"][0]
    assert skipped["file"] == "train.jsonl" and "line 5" in skipped["record"] and skipped["reason"]
    assert not {"train-4", "train-5"} & {i.record_id for i in read_items(out, "train", ("qa", "qar"))}
    assert read_images(out, "train")[0] == [f"train@{i}.jpg" for i in (0, 1, 3, 4, 5)]


def edit(k: int, **changes):
    """Changes the k-th training record."""

    def change(tree: Path) -> None:
        records = [vcr_record("train", i) for i in range(12)]
        records[k] |= changes
        write_lines(tree / "train.jsonl", records)

    return change


def more_objects(tree: Path) -> None:
    path = tree / "vcr1images/lsmdc_m/train@0.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"names": ["person", "car", "person"]}))


def regions_of_train_0(*args, annotated: bool = True):
    def change(tree: Path) -> None:
        name = vcr_names("train", Path("train@0.jpg"))[0 if annotated else 1]
        write_regions(tree / "regions", name, **region_arrays(*args))

    return change


BAD = {
    "three answers": (edit(2, answer_choices=[["a"], ["b"], ["c"]]), ["line 3", "'answer_choices'", "3"]),
    "tag out of range": (edit(1, question=["Why", [3], "?"]), ["line 2", "'question'", "tag 3", "3 objects"]),
    "unknown label": (edit(4, answer_label=4), ["line 5", "'answer_label'", "4"]),
    "duplicate id": (edit(5, annot_id="train-0"), ["train.jsonl", "line 6", "'train-0'", "line 1"]),
    "other names": (more_objects, ["train@0.json", "line 1", "'names'"]),
    "another width": (
        regions_of_train_0(0, 3, True, WIDTH + 1),
        ["vcr_gt_train_train@0.npz", "9 wide", "takes 8", "line 1", "'img_fn'"],
    ),
    "fewer regions": (regions_of_train_0(0, 2, True), ["line 1", "2 ground-truth regions", "3 objects"]),
    "cut short": (
        lambda tree: os.truncate(tree / "regions/vcr_gt_train_train@0.npz", 300),
        ["vcr_gt_train_train@0.npz", "cut short", "line 1"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records(copy, case):
    """Errors that nothing allows: a run never starts on them."""
    tree, out = copy("vcr")
    spoil, names = BAD[case]
    spoil(tree)
    with pytest.raises(FormatError) as error:
        prepare("vcr", tree, out, clip_text="", allow_missing=True)
    assert all(name in str(error.value) for name in names), str(error.value)
    assert not (out / "manifest.json").exists()


def test_annotated_regions_alone_are_said_so(copy, caplog):
    """No detections at all can be meant, or be the wrong folder."""
    tree, out = copy("vcr")
    for path in (tree / "regions").glob("vcr_[!g]*.npz"):
        path.unlink()
    prepare("vcr", tree, out, clip_text="", workers=1)
    assert f"none of {sum(VCR.values()) // 2} images has detected regions in {tree}" in caplog.text
    assert read_images(out, "train")[1].tolist() == [4] * 6


def test_too_many_objects_and_other_classes(copy):
    tree, out = copy("vcr")
    with pytest.raises(FormatError, match="3 objects, more than max_regions=2"):
        prepare("vcr", tree, out, max_regions=2)
    name = vcr_names("train", Path("train@1.jpg"))[0]
    arrays = region_arrays(1, 3, True)
    write_regions(tree / "regions", name, **{k: v for k, v in arrays.items() if k != "soft_labels"})
    with pytest.raises(FormatError, match=r"over 7 classes, those of .* over 0|over 0 classes, those of"):
        prepare("vcr", tree, out)
    assert prepare("vcr", tree, out, class_probs=False, clip_text="")["region_classes"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": ""}, "regions is empty"),
        ({"region_format": "npy"}, "region_format='npy' must be one of npz, lmdb, tsv, vl_bert"),
        ({"answers": "a.json"}, "a.json"),
        ({"clip_text": "all"}, "clip_text='all' must be one of both, choice"),
    ],
)
def test_bad_options(trees, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare("snli_ve", trees["snli_ve"], tmp_path / "out", **options)
    with pytest.raises(ValueError, match="'coco' is not known: choose one of vcr, snli_ve, vqa"):
        prepare("coco", trees["snli_ve"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="has no region features of the format 'tsv'"):
        prepare("snli_ve", trees["snli_ve"], tmp_path / "out", region_format="tsv")


def test_real_samples(shared_data, tmp_path):
    """SNLI-VE pairs with their photos; region features of an image, 1024 wide."""
    sample = shared_data / "snli_ve_mini"
    (tmp_path / "raw/flickr30k_images").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        lines = (sample / "sample_pairs.jsonl").read_text().splitlines()
        lines = [json.dumps(json.loads(line) | {"pairID": f"{split}{k}"}) for k, line in enumerate(lines)]
        (tmp_path / f"raw/snli_ve_{split}.jsonl").write_text("\n".join(lines) + "\n")
    for path in sample.glob("*.jpg"):
        shutil.copy(path, tmp_path / "raw/flickr30k_images")
    with np.load(sample / "2248275918.npz") as file:
        features, boxes = file["features"], file["boxes"]
    # The file's boxes are in pixels of a frame that it does not name: as UNITER's fractions of their extent.
    norm = np.clip(boxes / np.tile(boxes.max(0)[2:], 2), 0, 1)
    norm = np.concatenate([norm, norm[:, 2:] - norm[:, :2]], 1).astype(np.float16)
    write_regions(tmp_path / "regions", "2248275918.npz", features=features, norm_bb=norm)
    options = {"regions": tmp_path / "regions", "allow_missing": True, "max_regions": 100, "clip_text": ""}
    with pytest.raises(FormatError, match=r"2248275918.npz.*1024 wide, the model takes 2048"):
        prepare("snli_ve", tmp_path / "raw", tmp_path / "out", **(options | {"region_width": 2048}))
    manifest = prepare("snli_ve", tmp_path / "raw", tmp_path / "out", **(options | {"region_width": 1024}))
    assert manifest["splits"]["train"]["images"] == 1 and manifest["counts"]["missing_regions"] == 3
    assert read_images(tmp_path / "out", "train")[1].tolist() == [94]
    (first, *_) = read_items(tmp_path / "out", "train", ("ve",))
    assert first.choices == (("A", "toddler", "sleeps", "outside."),) and first.label == 0


def test_real_vqa_samples(shared_data, tmp_path):
    """Three questions of VQA v2 with the 3129 answers of LXMERT, and 36 bottom-up regions of their image."""
    sample, image = shared_data / "vqa_v2_mini", "COCO_train2014_000000458752"
    tree, regions = tmp_path / "raw", tmp_path / "regions"
    (tree / "train2014").mkdir(parents=True)
    shutil.copy(sample / f"{image}.jpg", tree / "train2014")
    shutil.copy(sample / "questions.json", tree / "v2_OpenEnded_mscoco_train2014_questions.json")
    shutil.copy(sample / "annotations.json", tree / "v2_mscoco_train2014_annotations.json")
    with np.load(sample / f"{image}.npz") as file, Image.open(sample / f"{image}.jpg") as picture:
        features, boxes = file["features"], file["boxes"] / np.tile(picture.size, 2) / 1.667
    norm = np.concatenate([boxes, boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float16)
    write_regions(regions, f"{image}.npz", features=features, norm_bb=norm)
    answers = shared_data / "vocab" / "vqa_trainval_label2ans.json"
    options = {
        "regions": regions,
        "region_width": 2048,
        "max_regions": 100,
        "splits": ("train",),
        "workers": 1,
    }
    manifest = prepare("vqa", tree, tmp_path / "out", answers=answers, **options)
    assert manifest["answers"]["count"] == 3129 and manifest["splits"]["train"]["items"] == 3
    assert read_images(tmp_path / "out", "train")[1].tolist() == [37]
    vocabulary = read_vocabulary(answers)
    for item in read_items(tmp_path / "out", "train", ("vqa",)):
        assert item.scores and max(map(max, item.scores.values())) <= 1 and max(item.scores) < 3129
    assert "net" in {
        vocabulary.answers[k] for k in next(read_items(tmp_path / "out", "train", ("vqa",))).scores
    }
    with pytest.raises(ValueError, match="answers="):
        prepare("vqa", tree, tmp_path / "out", **options)
