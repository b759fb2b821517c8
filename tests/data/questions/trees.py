"""Small trees of the three question datasets with pictures and region features, written by hand.

The first numbers of a region's features say whose it is: the image, the region, 1 for an annotated one.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from clipdistill_jax.data.formats.snli_ve import LABELS
from clipdistill_jax.data.regions.uniter import coco_name, flickr_name, vcr_names

WIDTH = 8  # of the features
CLASSES = 7  # of soft_labels, background first
OBJECTS = ["person", "person", "car"]
VCR = {"train": 12, "validation": 6, "test": 4}  # records, two an image
VE = {"train": 12, "validation": 6, "test": 3}  # pairs, three an image
VQA = {"train": 12, "validation": 4, "test": 4}  # questions, two an image
SIZES = {"region_width": WIDTH, "max_regions": 5, "stored_size": 24, "workers": 1, "progress": False}
WORDS = ["tall", "small", "red", "quick", "lazy", "old", "new", "wet"]
TEXTS = [
    "Why is person near car ? What are they doing and where will it go ?",
    "Riley Casey Jessie Jackie Avery Jaime Peyton Kerry Jody Kendall Frankie Pat Quinn",
    "the person waits . He is hurry , 0 1 2 3 4 5 6 7 8 9 ! yes no blue",
    "a hypothesis on the picture is " + " ".join(WORDS),
]


def colour(number: int) -> tuple[int, int, int]:
    return (40 + 20 * number % 200, 200 - 15 * number % 180, 30 * number % 250)


def write_picture(path: Path, number: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(number)).save(path, quality=95)


def region_arrays(number: int, count: int, annotated: bool, width: int = WIDTH) -> dict[str, np.ndarray]:
    """Regions of image `number` as UNITER's npz has them, the best first."""
    rng = np.random.default_rng(number)
    features = rng.integers(0, 100, (count, width)).astype(np.float16)
    features[:, :3] = np.stack([np.full(count, number), np.arange(count), np.full(count, annotated)], 1)
    low = np.linspace(0, 0.4, count)
    boxes = np.stack([low, low, low + 0.5, low + 0.25], 1)
    norm = np.concatenate([boxes, boxes[:, 2:] - boxes[:, :2]], 1)
    return {
        "features": features,
        "norm_bb": norm.astype(np.float16),
        "conf": np.linspace(0.9, 0.3, count)[:, None].astype(np.float16),
        "soft_labels": rng.dirichlet(np.ones(CLASSES), count).astype(np.float16),
    }


def write_regions(folder: Path, name: str, **arrays: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / name, **arrays)


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def vcr_record(split: str, k: int) -> dict:
    """The k-th question of a split; texts grow longer with k."""
    more = WORDS[: k % 8]
    record = {
        "annot_id": f"{split}-{k}",
        "objects": OBJECTS,
        "img_fn": f"lsmdc_m/{split}@{k // 2}.jpg",
        "metadata_fn": f"lsmdc_m/{split}@{k // 2}.json",
        "question": [["Why", "What"][k % 2], "is", [0], "near", [1, 2], *more, "?"],
        "answer_choices": [[[1], "waits", *more[i:], str(i), "."] for i in range(4)],
        "answer_label": k % 4,
        "rationale_choices": [[[0, 1], "hurry", str(i)] for i in range(4)],
        "rationale_label": (k + 1) % 4,
    }
    if split == "test":
        del record["answer_label"], record["rationale_label"]
    return record


def write_vcr(root: Path) -> Path:
    """Image i of a split has 3 annotated regions and i + 1 detected ones."""
    for split, count in VCR.items():
        name = {"validation": "val"}.get(split, split)
        root.mkdir(parents=True, exist_ok=True)
        write_lines(root / f"{name}.jsonl", [vcr_record(name, k) for k in range(count)])
        for i in range(count // 2):
            image = root / f"vcr1images/lsmdc_m/{name}@{i}.jpg"
            write_picture(image, i)
            boxes = [[0, 0, 10, 20, 0.9], [5, 4, 30, 28, 0.8], [1, 2, 40, 30, 1.0]]
            metadata = {"names": OBJECTS, "boxes": boxes, "segms": [], "width": 40, "height": 30}
            image.with_suffix(".json").write_text(json.dumps(metadata))
            truth, found = vcr_names(split, image)
            write_regions(root / "regions", truth, **region_arrays(i, 3, True))
            write_regions(root / "regions", found, **region_arrays(i, i + 1, False))
    return root


def write_snli_ve(root: Path) -> Path:
    """Image i has i + 2 regions."""
    image = 100
    for split, count in VE.items():
        pairs = []
        for k in range(count):
            pairs.append(
                {
                    "Flickr30K_ID": str(image + k // 3),
                    "pairID": f"{image + k // 3}.jpg#0r{k}",
                    "gold_label": LABELS[k % 3],
                    "sentence1": "not read",
                    "sentence2": f"The hypothesis on {' '.join(WORDS[: k % 8])} {k}.",
                }
            )
        for i in range(count // 3):
            number = image + i
            write_picture(root / f"flickr30k_images/{number}.jpg", number)
            arrays = region_arrays(number % 90, i + 2, False)
            write_regions(root / "regions", flickr_name(number), **arrays)
        write_lines(root / f"snli_ve_{ {'validation': 'dev'}.get(split, split) }.jsonl", pairs)
        image += count // 3
    return root


def write_vqa(root: Path) -> Path:
    """Of ten people 7 say yes and 3 blue, or the other way round; of validation's last question all Yes."""
    root.mkdir(parents=True, exist_ok=True)
    image = 10
    for split, count in VQA.items():
        subset = {"train": "train2014", "validation": "val2014", "test": "test2015"}[split]
        questions, notes = [], []
        for k in range(count):
            number, identity = image + k // 2, 10 * (image + k // 2) + k % 2
            questions.append(
                {
                    "image_id": number,
                    "question_id": identity,
                    "question": f"What is {' '.join(WORDS[: k % 8])} {k}?",
                }
            )
            said = ["yes", "blue"] if k % 2 else ["blue", "yes"]
            if split == "validation" and k == count - 1:
                said = ["Yes", "Yes"]
            notes.append(
                {
                    "image_id": number,
                    "question_id": identity,
                    "answer_type": "yes/no" if k % 2 else "other",
                    "multiple_choice_answer": said[0],
                    "answers": [{"answer": said[i >= 7]} for i in range(10)],
                }
            )
            if k % 2 == 0:
                write_picture(root / subset / f"COCO_{subset}_{number:012}.jpg", number)
                write_regions(
                    root / "regions", coco_name(subset, number), **region_arrays(number, 3 + k % 3, False)
                )
        path = root / f"v2_OpenEnded_mscoco_{subset}_questions.json"
        path.write_text(json.dumps({"questions": questions}))
        if split != "test":
            path = root / f"v2_mscoco_{subset}_annotations.json"
            path.write_text(json.dumps({"annotations": notes}))
        image += count // 2
    return root


WRITERS = {"vcr": write_vcr, "snli_ve": write_snli_ve, "vqa": write_vqa}
