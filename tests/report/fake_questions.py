"""A made-up run of question stages: results, arrays, words, metrics and launches, as a run leaves them."""

import json

import numpy as np

from clipdistill_jax.evaluate.choices import QuestionSplit, question_metrics
from clipdistill_jax.report.tokens import WordScores, write_words
from tests.report import fake_run

CATEGORIES = ("activity", "explanation", "mental", "role", "scene", "temporal", "hypothetical")
# Stage -> (title, chance of a right answer, terms, gate, init)
STAGES = {
    "baseline": ("UNITER, no distillation", 0.42, (), {}, ""),
    "naive": ("UNITER, naive VL", 0.50, ("vision", "language"), {}, ""),
    "ts": ("UNITER, token selective", 0.55, ("vision", "language", "tokens"), {}, ""),
    "clip_td": ("UNITER, CLIP-TD", 0.60, ("vision", "tokens"), {"temperature": 1.0}, "stage:adapt"),
}


def config():
    common = {
        "model": "student",
        "temporal": "",
        "num_frames": 0,
        "steps": 200,
        "batch_size": 32,
        "teacher": "",
        "clip": "",
        "terms": {},
        "gate": {},
        "init": {"model": ""},
        "protocol": "low_shot",
        "shots": 20,
        "pretraining": {},
    }
    stages = {
        "adapt": {**common, "title": "Adaptive finetuning", "pretraining": {"mlm": 1}, "protocol": "full"}
    }
    for name, (title, _, terms, gate, init) in STAGES.items():
        learned = {"terms": {term: {"weight": 0.05} for term in terms}, "gate": gate, "init": {"model": init}}
        stages[name] = {**common, **learned, "title": title, "clip": "hf" if terms else ""}
    return {"seed": 0, "data": {"format": "vcr", "prepared": ""}, "stages": stages}


def arrays(name, records=70, seed=0):
    """A scores.npz: two items a record, ten records a category."""
    rng = np.random.default_rng([seed, list(STAGES).index(name)])
    kinds = np.array(["qa", "qar"] * records)
    return {
        "kinds": kinds,
        "record_ids": np.array([f"val-{i // 2}" for i in range(2 * records)]),
        "categories": np.array([CATEGORIES[i // 2 % 7] for i in range(2 * records)]),
        "labels": np.zeros(2 * records, np.int32),
        "judged": np.ones(2 * records, bool),
        "outcome": (rng.uniform(size=2 * records) < STAGES[name][1]).astype(np.float32),
    }


def metrics(found):
    fields = {name: found[name] for name in ("kinds", "record_ids", "categories", "labels")}
    return question_metrics(found["outcome"], found["judged"], QuestionSplit(batches=list, **fields))


def words():
    said = ("why", "is", "[person2]", "sending", "a", "telegram", "?")
    relevance = np.array([0.05, 0.05, 0.2, 0.2, 0.05, 0.4, 0.05], np.float32)
    importance = np.array([0, 0, 0, 0.4, 0, 0.6, 0], np.float32)
    chosen = np.isin(np.arange(7), [3, 5])
    return {"val-0, the right answer": WordScores(said, relevance, importance, chosen)}


def write(workdir, seed=0):
    """Writes the stages' folders and returns (config, results)."""
    settings, results = config(), {}
    for name, stage in settings["stages"].items():
        folder = workdir / name
        folder.mkdir(parents=True)
        test = {}
        if name in STAGES:
            found = arrays(name, seed=seed)
            test = metrics(found)
            np.savez_compressed(folder / "scores.npz", **found)
        if "tokens" in stage["terms"]:
            write_words(folder / "words.npz", words())
        results[name] = {
            "stage": name,
            "step": 200,
            "seconds": 30.0,
            "seed": seed,
            "fingerprint": "ab" * 16,
            "test": test,
            "sizes": {"parameters": {"encoder": 1_000_000}, "total": 1_234_567, "flops_question": 4.5e8},
        }
        lines = [
            {"step": step, "train/task_loss": 3.0 / step, "train/loss": 4.0 / step, "train/tokens_loss": 1.0}
            | ({"validation/accuracy": test["accuracy"]} if test else {})
            for step in (50, 100, 150, 200)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "launches.jsonl").write_text(json.dumps(fake_run.launch()) + "\n")
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "result.json").write_text(json.dumps(results[name]))
    return settings, results
