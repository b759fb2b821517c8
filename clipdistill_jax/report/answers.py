"""What the stages of a run that answer questions came to: table, gains, right answers by kind of question."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clipdistill_jax.report import table
from clipdistill_jax.report.figures import Picture, Theme, picture
from clipdistill_jax.report.sections import Panel
from clipdistill_jax.report.table import NONE, Column

Results = Mapping[str, Mapping[str, Any]]
OVERALL = {"accuracy": "all", "Q->A": "Q→A", "QA->R": "QA→R", "Q->AR": "Q→AR"}  # metric -> its heading
CHANCE = {"vcr": 25.0, "snli_ve": 100 / 3}  # by the data's format; VQA's has no such number
BY_CATEGORY = "By category"
NOTE = (
    "Right answers in percent. Q→A: of four answers; QA→R: of four rationales, given the right answer; Q→AR: "
    "both right. For open answers a question counts as far as people agree with the answer."
)
_KINDS = {"Q->A": ("qa",)}  # kinds of the items that a metric is of, where not all
_ASIDE = frozenset(("title", "teacher", "clip", "terms", "gate", "cache", "init", "select"))


@dataclasses.dataclass(frozen=True)
class Bar:
    """A stage's right answers to some questions.

    Attributes:
      label: of the stage.
      index: its place in the run, which sets its colour.
      share: in percent.
      error: one standard error over the questions, in points; None where their number is not known.
    """

    label: str
    index: int
    share: float
    error: float | None


def answering(results: Results) -> dict[str, Mapping[str, Any]]:
    """The results of the stages that answer questions."""
    return {name: result for name, result in results.items() if "accuracy" in result.get("test", {})}


def main_metric(results: Results) -> str:
    """What stages are compared by: "Q->A" (which the paper gives) where all have it, else "accuracy"."""
    return "Q->A" if all("Q->A" in result["test"] for result in results.values()) else "accuracy"


def columns(stages: Mapping[str, Any], results: Results, starts: Mapping[str, int]) -> list[Column]:
    """The table, column by column; arguments as of `table.columns`, the results those that answer."""
    tests, main = [result["test"] for result in results.values()], main_metric(results)

    def shares(metric: str) -> list[str]:
        return [f"{test[metric]:.1f}" if metric in test else NONE for test in tests]

    overall = [metric for metric in OVERALL if any(metric in test for test in tests)]
    by = f"{BY_CATEGORY}, {OVERALL[main]}"
    return [
        Column("", "Stage", [table.title(stages, name) for name in results]),
        Column("", "Learned from", [learned_from(stages, name) for name in results]),
        *_sizes(results),
        *(Column("Right answers, %", OVERALL[metric], shares(metric)) for metric in overall),
        *(Column(by, category, shares(f"{main}/{category}")) for category in categories(results, main)),
        Column("Training", "minutes", table.minutes(results, starts)),
    ]


def short(columns: Sequence[Column]) -> list[Column]:
    """The columns that a terminal has room for."""
    return [column for column in columns if not column.group.startswith(BY_CATEGORY)]


def categories(results: Results, metric: str) -> list[str]:
    """The categories that a metric is split by in any result."""
    keys = {key for result in results.values() for key in result["test"]}
    return sorted(key.removeprefix(f"{metric}/") for key in keys if key.startswith(f"{metric}/"))


def learned_from(stages: Mapping[str, Any], name: str) -> str:
    """The frozen models' terms of a stage and of the stage that it starts from: "CLIP: vision, language"."""
    stage = stages.get(name, {})
    before = str(stage.get("init", {}).get("model", "")).removeprefix("stage:")
    said = [f"after {table.title(stages, before)}"] if before in stages and before != name else []
    if stage.get("terms"):
        teacher = table.title(stages, stage["teacher"]) if stage.get("teacher") else "CLIP"
        gated = ", where CLIP is surer" if stage.get("gate") else ""
        said.append(f"{teacher}: {', '.join(stage['terms'])}{gated}")
    return "; ".join(said) or NONE


def gain_lines(stages: Mapping[str, Any], results: Results) -> list[str]:
    """A sentence for each further stage: what it gained over the first that learned from labels alone."""
    main, lines = main_metric(results), []
    for name in results:
        other = _plain_stage(stages, results, name)
        if other is None:
            continue
        before, after = results[other]["test"], results[name]["test"]
        metrics = [metric for metric in OVERALL if metric in before and metric in after]
        metrics = [metric for metric in metrics if metric != "accuracy" or main == "accuracy"]
        changes = ", ".join(
            table.change(metric, metric.replace("->", "→"), before, after) for metric in metrics
        )
        line = f"{table.title(stages, name)} compared with {table.title(stages, other)}: {changes}."
        also = differences(stages.get(other, {}), stages.get(name, {}))
        lines.append(line + (f" The two also differ in: {', '.join(also)}." if also else ""))
    return lines


def _plain_stage(stages: Mapping[str, Any], results: Results, name: str) -> str | None:
    """The first stage that learns the same questions from labels alone; None where that is `name`.

    The same: equal `model`, `protocol` and `shots`.
    """
    alike = ("model", "protocol", "shots")
    wanted = [stages.get(name, {}).get(field) for field in alike]
    for other in results:
        stage = stages.get(other, {})
        if not stage.get("terms") and [stage.get(field) for field in alike] == wanted:
            return None if other == name else other
    return None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that two stages differ in, beside what they learn from."""
    return tuple(sorted(f for f in (a.keys() | b.keys()) - _ASIDE if a.get(f) != b.get(f)))


def _sizes(results: Results) -> list[Column]:
    """Parameters, and the FLOPs of one question with all its choices where they are known."""
    sizes = [result.get("sizes", {}) for result in results.values()]
    totals = [table.humanize(size["total"]) if "total" in size else NONE for size in sizes]
    costs = [table.gflops(size["flops_question"]) if "flops_question" in size else NONE for size in sizes]
    made = [Column("Parameters", "total", totals)]
    return made if set(costs) == {NONE} else [*made, Column("GFLOPs", "a question", costs)]


def read_counts(path: Path, metric: str) -> dict[str, int]:
    """Questions that a metric is of, by category and in all (""); empty where a stage left no arrays.

    Args:
      path: the stage's scores.npz: `judged`, `kinds` and `categories`, an entry an item.
    """
    if not path.exists():
        return {}
    with np.load(path) as file:
        counted = file["judged"] & np.isin(file["kinds"], _KINDS.get(metric, np.unique(file["kinds"])))
        names, counts = np.unique(file["categories"][counted], return_counts=True)
    return {"": int(counted.sum())} | {str(n): int(c) for n, c in zip(names, counts, strict=True) if n}


def standard_error(share: float, count: int) -> float:
    """Of a share in percent of so many questions, in points."""
    return math.sqrt(max(share * (100 - share), 0.0) / max(count, 1))


def category_panels(
    labels: Mapping[str, str],
    order: Sequence[str],
    results: Results,
    counts: Mapping[str, int],
    chance: float,
) -> list[Panel]:
    """A panel for all questions, and one for each category: a bar a stage.

    Args:
      labels: of each stage.
      order: all stages of the run.
      results: of those that answer.
      counts: as `read_counts` gives them; may be empty.
      chance: percent that guessing gets right; 0 draws no line.
    """
    metric, panels = main_metric(results), []
    for category in ("", *categories(results, metric)):
        key, count = (f"{metric}/{category}" if category else metric), counts.get(category)
        shares = {name: result["test"][key] for name, result in results.items() if key in result["test"]}
        bars = [
            Bar(labels[name], order.index(name), share, None if not count else standard_error(share, count))
            for name, share in shares.items()
        ]
        heading = (category or "all questions") + (f" ({count:,})" if count else "")
        panels.append(Panel(heading, share_bars(bars, chance, heading)))
    return panels


def share_bars(bars: Sequence[Bar], chance: float, heading: str) -> Picture:
    """Bars from top to bottom with their values and standard errors, and a line at chance."""
    names = [textwrap.fill(bar.label, 26) for bar in bars]
    room = sum(max(1.5, 0.3 + name.count("\n") + 1) for name in names)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        ends = [min(bar.share + (bar.error or 0), 100) for bar in bars]
        colours = [theme.colour(bar.index) for bar in bars]
        axes.barh(range(len(bars)), [bar.share for bar in bars], 0.62, color=colours)
        for row, bar in enumerate(bars):
            if bar.error is not None:
                span = [max(bar.share - bar.error, 0), ends[row]]
                for colour, width in ((theme.paper, 2.6), (theme.ink, 1.1)):
                    axes.plot(span, [row, row], color=colour, lw=width, solid_capstyle="butt")
            axes.text(
                ends[row] + 1.5, row, f"{bar.share:.1f}", va="center", fontsize=8, color=theme.ink
            ).set_bbox({"facecolor": theme.paper, "edgecolor": "none", "pad": 0.4})
        if chance:
            axes.axvline(chance, color=theme.ink, lw=1, ls=(0, (4, 3)))
            axes.text(chance, -0.6, f"chance {chance:.0f}", ha="center", va="bottom", fontsize=8)
        axes.set_yticks(range(len(bars)), names)
        axes.set_ylim(len(bars) - 0.5, -0.6)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel("right answers, %")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)

    said = ", ".join(f"{bar.label} {bar.share:.1f}%" for bar in bars)
    return picture(draw, 0.85 + 0.145 * room, f"Right answers, {heading}: {said}.")
