"""Accuracy against cost (CLIPPING, Figure 6): a mark a stage, with its deviation where there are seeds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from clipdistill_jax.report import table
from clipdistill_jax.report.figures import Picture, Theme, legend, picture

MARKERS = ("o", "s", "^", "D", "v", "P")
# What is on the axis: its label, a value as text.
COSTS = {
    "flops": ("GFLOPs of one clip (log scale)", table.gflops),
    "parameters": ("parameters (log scale)", table.humanize),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A model in the plane of cost and quality.

    Attributes:
      label: of the model.
      index: its place among the others; it sets colour and mark in every figure.
      flops: of the forward pass of one clip.
      parameters: of the whole model.
      recalls: in percent, one a seed.
    """

    label: str
    index: int
    flops: float | int
    parameters: int
    recalls: tuple[float | int, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.recalls))

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; 0 of a single one."""
        return float(np.std(self.recalls, ddof=1)) if len(self.recalls) > 1 else 0.0

    def cost(self, which: str) -> float:
        """Its FLOPs or parameters."""
        return float(self.flops if which == "flops" else self.parameters)


def cost_points(rows: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> list[Point]:
    """A point for each label.

    Args:
      rows: label -> results as `run.run_stage` gives them, one a seed.
      metric: a key of a result's `test`, such as "t2v_R@1".

    Raises:
      ValueError: the results of a label are of models of other sizes.
    """
    made = []
    for index, (label, results) in enumerate(rows.items()):
        parameters = sorted({result["sizes"]["total"] for result in results})
        if len(parameters) > 1:
            raise ValueError(
                f"{label} has {parameters[0]:,} parameters with one seed, {parameters[1]:,} with another"
            )
        recalls = tuple(result["test"][metric] for result in results)
        made.append(Point(label, index, results[0]["sizes"]["flops_clip"], parameters[0], recalls))
    return made


def side_by_side(costs: Sequence[float], axis: float) -> tuple[list[float], list[tuple[float, float]]]:
    """Where to draw models of such costs: (places, from and to of each band of several of the same cost).

    Args:
      costs: within 1% of each other they count as the same, and are drawn beside each other about their mean.
      axis: right end of the logarithmic axis over its left end.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(costs)), key=lambda i: costs[i]):
        if groups and costs[i] < 1.01 * costs[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    places, bands = list(costs), []
    for group in groups:
        if len(group) == 1:
            continue
        step = axis ** min(0.035, 0.15 / (len(group) - 1))
        middle, reach = float(np.exp(np.mean(np.log([costs[i] for i in group])))), (len(group) - 1) / 2
        for k, i in enumerate(sorted(group)):
            places[i] = middle * step ** (k - reach)
        bands.append((middle / step ** (reach + 0.7), middle * step ** (reach + 0.7)))
    return places, bands


def tradeoff(
    points: Sequence[Point], arrows: Sequence[tuple[int, int]], metric: str, cost: str = "flops"
) -> Picture:
    """Quality against cost; the bars are one standard deviation over seeds, up and down.

    Args:
      points: those of equal cost are drawn side by side in a band.
      arrows: (alone, distilled) places in `points`.
      metric: name of the recall, for the axis.
      cost: a key of `COSTS`.
    """
    xlabel, say = COSTS[cost]
    costs = [point.cost(cost) for point in points]
    left, right = min(costs) / 2, max(costs) * 2
    places, bands = side_by_side(costs, right / left)
    few = max(costs) / min(costs) < 30

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for band in bands:
            axes.axvspan(*band, color=theme.grid, alpha=0.5, lw=0, zorder=0)
        for start, end in arrows:
            xy = [(places[i], points[i].mean) for i in (end, start)]
            arrow = {"arrowstyle": "->", "color": theme.quiet, "shrinkA": 6, "shrinkB": 6}
            axes.annotate("", xy=xy[0], xytext=xy[1], arrowprops=arrow)
        for x, point in zip(places, points, strict=True):
            turn, place = divmod(point.index, len(MARKERS))
            colour, marker = theme.colour(place), MARKERS[(place + turn) % len(MARKERS)]
            (drawn,) = axes.plot([x], [point.mean], marker, ms=8, color=colour, label=point.label, zorder=3)
            drawn.set_clip_on(False)
            if point.deviation:
                axes.errorbar([x], [point.mean], [point.deviation], color=colour, capsize=5, lw=1.4, zorder=2)
        axes.set_xscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(0, max(1.0, 1.15 * max(point.mean + point.deviation for point in points)))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: say(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(xlabel)
        axes.set_ylabel(f"{metric}, %")
        legend(figure)

    unit = " GFLOPs" if cost == "flops" else " parameters"
    said = "; ".join(
        f"{point.label}: {point.mean:.1f}%"
        + (f" ± {point.deviation:.1f} over {len(point.recalls)} seeds" if len(point.recalls) > 1 else "")
        + f" at {say(x)}{unit}"
        for x, point in zip(costs, points, strict=True)
    )
    return picture(draw, 2.8 + 0.19 * len(points), f"{metric} against{unit}. {said}.")
