"""A made-up run: four stages with results, scores, metrics and launches, as `run_stages` leaves them."""

import json
import math

import numpy as np

from clipdistill_jax.evaluate.retrieval import pair_accuracy, retrieval_metrics

KINDS = ("direction", "order", "size", "colour", "several")
# Stage -> (skill, skill at telling twins apart, final task loss).
SKILLS = {
    "pretrain": (2.2, 0.0, 1.9),
    "teacher": (3.1, 1.2, 1.2),
    "student": (1.6, 0.3, 1.5),
    "distilled": (2.3, 0.7, 1.8),
}
TERMS = ("temporal", "spatial", "global")


def config():
    """The fields that a report reads, and two that it only shows."""
    common = {"temporal": "", "num_frames": 0, "steps": 600, "batch_size": 64, "teacher": "", "terms": {}}
    weights = {term: {"weight": 1.0} for term in TERMS}
    return {
        "seed": 0,
        "data": {"prepared": "", "image_size": 32},
        "stages": {
            "pretrain": {
                **common,
                "model": "teacher",
                "temporal": "meanP",
                "steps": 1500,
                "title": "CLIP from scratch",
            },
            "teacher": {**common, "model": "teacher", "title": "Teacher (CLIP4Clip, seqTransf)"},
            "student": {**common, "model": "student", "title": "Student MobileViTv2-0.5, alone"},
            "distilled": {
                **common,
                "model": "student",
                "title": "Student MobileViTv2-0.5, distilled",
                "teacher": "teacher",
                "terms": weights,
            },
        },
    }


def scores(name, clips=48, pairs=10, seed=0):
    """Arrays of a scores.npz: one caption a clip, the first 2 x `pairs` clips are twins."""
    skill, motion, _ = SKILLS[name]
    rng = np.random.default_rng([seed, list(SKILLS).index(name)])
    matrix = rng.normal(0, 1, (clips, clips))
    matrix[np.arange(clips), np.arange(clips)] += skill
    for a in range(0, 2 * pairs, 2):
        for own, twin in ((a, a + 1), (a + 1, a)):
            matrix[own, twin] = matrix[own, own] + rng.normal(-motion, 1)
    return {
        "scores": matrix.astype(np.float32),
        "video_ids": np.array([f"video{i}" for i in range(clips)]),
        "captions": np.array([f"a red ball number {i} slides left and then climbs" for i in range(clips)]),
        "clip_of_text": np.arange(clips, dtype=np.int32),
        "pairs": np.arange(2 * pairs, dtype=np.int32).reshape(-1, 2),
        "pair_kinds": np.array([KINDS[i % len(KINDS)] for i in range(pairs)]),
    }


def result(name, arrays):
    """A stage's result.json."""
    metrics = retrieval_metrics(arrays["scores"], arrays["clip_of_text"])
    if len(arrays["pairs"]):
        pairs = [(int(a), int(b)) for a, b in arrays["pairs"]]
        metrics["motion_pairs"] = pair_accuracy(arrays["scores"], arrays["clip_of_text"], pairs)
    parameters = {"vision": 1_234_567, "text": 456_789, "temporal": 98_765, "logit_scale": 1}
    flops = 1.23e7
    if name in ("pretrain", "teacher"):
        parameters, flops = {"vision": 7_654_321, "text": 456_789, "logit_scale": 1}, 1.9e8
    return {
        "stage": name,
        "key": "0123456789abcdef",
        "step": 600,
        "seconds": 90.0,
        "fingerprint": "fedcba9876543210fedcba9876543210",
        "validation": {"validation/t2v_R@1": metrics["t2v_R@1"]},
        "test": metrics,
        "sizes": {
            "parameters": parameters,
            "total": sum(parameters.values()),
            "flops_clip": flops,
            "flops_caption": 1e6,
        },
    }


def metric_lines(name, steps, arrays):
    """Lines of a metrics.jsonl."""
    rng, last = np.random.default_rng(1), SKILLS[name][2]
    for step in range(25, steps + 1, 25):
        task = last + (math.log(64) - last) * math.exp(-step / 150) + rng.normal(0, 0.03)
        line = {"step": step, "train/loss": task, "train/task_loss": task, "train/grad_norm": 1.0}
        if name == "distilled":
            level = 0.4 + math.exp(-step / 200)
            terms = {f"train/{term}_loss": 0.3 * (i + 1) * level for i, term in enumerate(TERMS)}
            line |= {**terms, "train/loss": task + sum(terms.values())}
        if step % 200 == 0:
            final = retrieval_metrics(arrays["scores"], arrays["clip_of_text"])["t2v_R@1"]
            line["validation/t2v_R@1"] = final * (1 - math.exp(-step / 250))
        yield line


def launch():
    """A line of a launches.jsonl."""
    return {
        "time": "2025-01-31T12:34:56+0000",
        "command": "python -m clipdistill_jax.main --config=configs/quickstart.py --workdir=runs/quickstart",
        "config": {},
        "python": "3.11.9",
        "platform": "Linux-6.1-x86_64-with-glibc2.36",
        "packages": {"clipdistill_jax": "0.1.0", "jax": "0.10.2", "numpy": "2.3.0"},
        "devices": {"kind": "cpu", "count": 1, "local": 1, "hosts": 1},
    }


def write(workdir, clips=48, pairs=10):
    """Writes the stages' folders and returns (config, results)."""
    settings, results = config(), {}
    for name, stage in settings["stages"].items():
        folder = workdir / name
        folder.mkdir(parents=True)
        arrays = scores(name, clips, pairs)
        results[name] = result(name, arrays)
        np.savez_compressed(folder / "scores.npz", **arrays)
        lines = metric_lines(name, stage["steps"], arrays)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "launches.jsonl").write_text(json.dumps(launch()) + "\n")
    return settings, results


def frames_of(clip):
    """A grey clip that gets lighter: uint8 [3, 16, 16, 3]."""
    return np.full((3, 16, 16, 3), np.array([20, 90, 160])[:, None, None, None] + clip, np.uint8)
