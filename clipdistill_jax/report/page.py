"""Writes what a run came to: report.md, report.html (one file, nothing outside it), text for the terminal."""

import importlib.resources
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from clipdistill_jax.experiment import Config, plain
from clipdistill_jax.report import answers, figures, table, tradeoff
from clipdistill_jax.report.gallery import FramesOf, Query, gallery, prepared_frames
from clipdistill_jax.report.scores import Scores, read_scores
from clipdistill_jax.report.sections import Panel, Section, read_sections
from clipdistill_jax.report.tokens import read_words, token_section

Results = Mapping[str, Mapping[str, Any]]
SCORES, WORDS = "scores.npz", "words.npz"  # what a stage's folder may hold
_TASK, _TOTAL = "train/task_loss", "train/loss"
_VALIDATION = {"t2v_R@1": "text to video R@1, %", "accuracy": "right answers, %"}


def write_report(config: Config, workdir: Path, results: Results, frames_of: FramesOf | None = None) -> str:
    """Writes workdir/report.md and workdir/report.html.

    Args:
      config: the run's; a stage may have a `title`.
      workdir: the run's folder. Of workdir/figures it reads what `write_sections` wrote, of each stage's
        folder metrics.jsonl, scores.npz, words.npz and launches.jsonl; what is missing is not shown.
      results: stage -> its result, as `run.run_stages` gives them, in the order to show. A result's `folder`
        is the stage's, workdir/STAGE if there is none. What its metrics are of, retrieval or questions,
        decides which tables and figures it stands in.
      frames_of: test clip -> uint8 [frames, height, width, 3], for the gallery; None reads the prepared data.

    Returns:
      A table of at most 100 columns, what distillation changed, and where the page is.
    """
    settings = plain(config)
    stages = settings["stages"]
    folders = {name: Path(result.get("folder", workdir / name)) for name, result in results.items()}
    launches = {name: _lines(folder / "launches.jsonl") for name, folder in folders.items()}
    starts = {name: len(lines) for name, lines in launches.items()}
    found = {name: result for name, result in results.items() if "t2v_R@1" in result.get("test", {})}
    answered = answers.answering(results)
    columns = table.columns(stages, found, starts) if found else []
    answer_columns = answers.columns(stages, answered, starts) if answered else []
    gains = [*table.gain_lines(stages, found), *answers.gain_lines(stages, answered)]
    scores = {n: s for n in found if (s := read_scores(folders[n] / SCORES))}
    if frames_of is None and found:
        frames_of = _prepared(settings, workdir)
    page = (
        _environment()
        .from_string(_template())
        .render(
            name=workdir.name or workdir.resolve().name,
            columns=columns,
            answer_columns=answer_columns,
            gains=gains,
            resumed=any(count > 1 for count in starts.values()),
            queries=max((len(s.captions) for s in scores.values()), default=0),
            clips=max((len(s.video_ids) for s in scores.values()), default=0),
            error=_standard_error(found, scores),
            accuracy=_accuracy(stages, found) if found else [],
            losses=_losses(stages, {n: _lines(folder / "metrics.jsonl") for n, folder in folders.items()}),
            pairs=_pairs(stages, results, scores),
            inspected=[*_words(folders), *read_sections(workdir, results)],
            gallery=_gallery(stages, found, scores, frames_of),
            runs=_runs(stages, results, launches),
            machine=_machine(launches),
            config=json.dumps(settings, indent=2, default=str),
            **_answers(settings, results, answered, folders),
        )
    )
    (workdir / "report.html").write_text(page, encoding="utf-8")
    (workdir / "report.md").write_text(_markdown(columns, answer_columns, gains), encoding="utf-8")
    told = [table.plain_table(part) for part in (columns, answers.short(answer_columns)) if part]
    told += [textwrap.fill(line, table.PLAIN_WIDTH, break_on_hyphens=False) for line in gains]
    return "\n\n".join([*told, f"The report: {workdir / 'report.html'}"])


def _markdown(
    columns: Sequence[table.Column], answer_columns: Sequence[table.Column], gains: Sequence[str]
) -> str:
    parts = list(map(table.escape, gains))
    if answer_columns:
        parts = [table.markdown(answer_columns), *parts, answers.NOTE]
    if columns:
        retrieval = (
            "t2v: text to video, v2t: video to text; recalls in percent on the test split, MdR the median "
            "rank. GFLOPs of the forward pass of one clip, a multiply-add counted as two. Motion pairs: 50 "
            "is chance."
        )
        parts = [table.markdown(columns), *parts, retrieval]
    return "\n\n".join(parts) + "\n"


def _answers(
    settings: Mapping[str, Any], results: Results, answered: Results, folders: Mapping[str, Path]
) -> dict[str, Any]:
    """What the page says of the stages that answer questions."""
    stages = settings["stages"]
    split = next((str(result["split"]) for result in answered.values() if "split" in result), "test")
    if not answered:
        return {"questions": 0, "by_kind": [], "answer_error": "", "split": split}
    metric = answers.main_metric(answered)
    counts = next((c for name in answered if (c := answers.read_counts(folders[name] / SCORES, metric))), {})
    total = counts.get("", 0)
    worst = max((answers.standard_error(r["test"][metric], total) for r in answered.values()), default=0.0)
    labels = {name: _label(stages, results, name) for name in answered}
    chance = answers.CHANCE.get(settings["data"].get("format", ""), 0.0)
    return {
        "questions": total,
        "by_kind": answers.category_panels(labels, list(results), answered, counts, chance),
        "answer_error": f"{worst:.1f}" if total and worst >= 0.05 else "",
        "split": split,
    }


def _words(folders: Mapping[str, Path]) -> list[Section]:
    """The words that the first stage with such scores chose; all choose by the same model."""
    examples = next((found for folder in folders.values() if (found := read_words(folder / WORDS))), {})
    return [token_section(examples)] if examples else []


def _template() -> str:
    return importlib.resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file; a line cut short is passed over, a missing file is empty."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _standard_error(results: Results, scores: Mapping[str, Scores]) -> str:
    """Standard error over queries, in points, of the recall where it is largest; "" where none is known."""
    counts = [len(s.captions) for s in scores.values()]
    if not counts:
        return ""
    shares = [results[name]["test"][key] / 100 for name in scores for key in ("t2v_R@1", "t2v_R@10")]
    error = 100 * math.sqrt(max(p * (1 - p) for p in shares) / min(counts))
    return f"{error:.1f}" if error >= 0.05 else ""


def _accuracy(stages: Mapping[str, Any], results: Results) -> list[Panel]:
    order = list(results)
    arrows = [(order.index(c.alone), order.index(c.distilled)) for c in table.comparisons(stages, results)]
    rows, panels = {_label(stages, results, name): [result] for name, result in results.items()}, []
    for metric in ("R@1", "R@10"):
        points, heading = tradeoff.cost_points(rows, f"t2v_{metric}"), f"Text to video {metric}"
        panels.append(Panel(heading, tradeoff.tradeoff(points, arrows, heading)))
    return panels


def _losses(stages: Mapping[str, Any], metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """The task loss of each model (its stages together), each term, the sum, the validation recall."""

    def lines(key: str, names: Sequence[str]) -> list[figures.Line]:
        made = []
        for i, name in enumerate(metrics):
            points = [(line["step"], line[key]) for line in metrics[name] if line.get(key) is not None]
            if points and name in names:
                x, y = zip(*points, strict=True)
                made.append(figures.Line(table.title(stages, name), i, x, y))
        return made

    wanted: list[tuple[str, str, str, Sequence[str]]] = []
    kinds = {n: f"{stages[n]['model']} model" for n in metrics if n in stages}
    # Losses of other tasks have another size.
    kinds |= {n: f"{kind}, pretraining" for n, kind in kinds.items() if stages[n].get("pretraining")}
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name in metrics if kinds.get(name) == kind]
        wanted.append((f"Task loss, {kind}", "task loss, nats", _TASK, names))
    keys = dict.fromkeys(key for log in metrics.values() for line in log for key in line)
    for key in keys:
        if key.startswith("train/") and key.endswith("_loss") and key != _TASK:
            term = key.removeprefix("train/").removesuffix("_loss")
            wanted.append((f"Term: {term}", f"{term} loss, unweighted", key, list(metrics)))
    taught = [n for n in metrics if any(stages.get(n, {}).get(field) for field in ("teacher", "terms"))]
    wanted.append(("Sum: task loss and weighted terms", "loss that is minimised", _TOTAL, taught))
    for metric, ylabel in _VALIDATION.items():
        wanted.append(("Validation while training", ylabel, f"validation/{metric}", list(metrics)))
    drawn = ((heading, ylabel, lines(key, names)) for heading, ylabel, key, names in wanted)
    return [
        Panel(heading, figures.curves(found, ylabel, f"{heading}: {', '.join(line.label for line in found)}"))
        for heading, ylabel, found in drawn
        if found
    ]


def _pairs(stages: Mapping[str, Any], results: Results, scores: Mapping[str, Scores]) -> list[Panel]:
    paired = {_label(stages, results, name): found for name, found in scores.items() if len(found.pairs)}
    if not paired:
        return []
    index = {_label(stages, results, name): i for i, name in enumerate(results)}
    return [
        Panel("Right choices, by what differs", figures.pair_bars(paired, index)),
        Panel("Which of the two clips is preferred", figures.pair_confusion(paired)),
    ]


def _label(stages: Mapping[str, Any], results: Results, name: str) -> str:
    """The title, with the name where another stage has the same title."""
    title = table.title(stages, name)
    same = sum(table.title(stages, other) == title for other in results) > 1
    return f"{title} ({name})" if same else title


def _gallery(
    stages: Mapping[str, Any], results: Results, scores: Mapping[str, Scores], frames_of: FramesOf | None
) -> list[Query]:
    """Teacher, student alone and distilled student of the first comparison; else the last three stages."""
    compared = table.comparisons(stages, results)
    trio = tuple(results)[-3:]
    if compared:
        trio = (compared[0].teacher, compared[0].alone, compared[0].distilled)
    shown = {_label(stages, results, name): scores[name] for name in trio if name in scores}
    same = len({(tuple(s.video_ids), tuple(s.captions)) for s in shown.values()}) == 1
    return gallery(shown, frames_of) if frames_of is not None and same else []


def _prepared(settings: Mapping[str, Any], workdir: Path) -> FramesOf | None:
    home = settings.get("base") or workdir
    folder = Path(settings["data"]["prepared"] or Path(home) / "prepared").expanduser()
    return prepared_frames(folder) if (folder / "manifest.json").exists() else None


def _runs(
    stages: Mapping[str, Any], results: Results, launches: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, str]]:
    return [
        {
            "title": table.title(stages, name),
            "steps": str(stages.get(name, {}).get("steps", table.NONE)),
            "batch": str(stages.get(name, {}).get("batch_size", table.NONE)),
            "selected": str(result["step"]),
            "started": launches[name][-1]["time"] if launches[name] else table.NONE,
            "starts": str(len(launches[name]) or table.NONE),
            "fingerprint": str(result["fingerprint"])[:16],
        }
        for name, result in results.items()
    ]


def _machine(launches: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
    """What the last starts of the stages say of device, versions and command; equal ones once."""
    last = [starts[-1] for starts in launches.values() if starts]
    devices = [
        f"{d['count']} x {d['kind']} on {d['hosts']} host{'s' * (d['hosts'] > 1)}, {start['platform']}"
        for start in last
        for d in [start["devices"]]
    ]
    packages = [{"python": start["python"], **start["packages"]} for start in last]
    versions = [", ".join(f"{name} {version}" for name, version in found.items()) for found in packages]
    found = {"Device": devices, "Versions": versions, "Command": [start["command"] for start in last]}
    return {name: list(dict.fromkeys(values)) for name, values in found.items() if values}
