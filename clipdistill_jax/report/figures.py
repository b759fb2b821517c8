"""Figures of a run as PNG, each drawn for a light and for a dark page.

Narrow on purpose: a phone shows a figure at its full width, a wide screen several side by side. Colours are
those of Okabe and Ito (2008, "Color Universal Design"), lighter on dark; line styles and markers repeat what
they say.
"""

import base64
import dataclasses
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clipdistill_jax.report.scores import Scores

WIDTH = 4.6  # inches
DPI = 170
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1)))
CHANCE = 50.0


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    paper: str
    ink: str
    quiet: str
    grid: str
    colours: tuple[str, ...]

    def colour(self, index: int) -> str:
        """The colour of the stage at this place in the run."""
        return self.colours[index % len(self.colours)]


LIGHT = Theme(
    *("#ffffff", "#23262b", "#5d646e", "#e3e5e8"),
    ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b07d00", "#555b66"),
)
DARK = Theme(
    *("#1b1e23", "#e4e6ea", "#a3aab5", "#343941"),
    ("#56b4e9", "#f08a3c", "#2fc79a", "#e59ac4", "#e8c547", "#b9bec7"),
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure: PNG in base64 for a light and a dark page, size in pixels, and what it shows in words."""

    light: str
    dark: str
    width: int
    height: int
    alt: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve. `index` is the stage's place in the run: it sets colour and style in every figure."""

    label: str
    index: int
    x: Sequence[float | int]
    y: Sequence[float | int]


def curves(lines: Sequence[Line], ylabel: str, alt: str) -> Picture:
    """Values over training steps."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for line in lines:
            (drawn,) = axes.plot(line.x, line.y, label=line.label, lw=1.6, color=theme.colour(line.index))
            drawn.set_linestyle(LINES[line.index % len(LINES)])
            if len(line.x) < 3:
                drawn.set_marker("o")
        axes.set_xlabel("training step")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend(figure)

    return picture(draw, 2.6 + 0.19 * len(lines), alt)


def pair_bars(stages: Mapping[str, Scores], index: Mapping[str, int]) -> Picture:
    """How often a caption prefers its own clip to the twin, by what the twins differ in.

    Args:
      stages: label -> scores, which have pairs.
      index: label -> the stage's place in the run.
    """
    shares: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for label, scores in stages.items():
        preference = scores.preference()
        kinds = np.array(scores.kinds)[preference.pair]
        groups = {kind: kinds == kind for kind in sorted(set(scores.kinds))}
        groups = {"all": np.ones(len(kinds), bool), **groups}
        shares[label] = {kind: 100 * float(preference.right[where].mean()) for kind, where in groups.items()}
        counts |= {kind: int(where.sum()) for kind, where in groups.items()}
    thick = 0.8 / len(shares)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for row, (label, share) in enumerate(shares.items()):
            y = [list(counts).index(kind) + (row - (len(shares) - 1) / 2) * thick for kind in share]
            colour = theme.colour(index[label])
            bars = axes.barh(y, list(share.values()), 0.86 * thick, label=label, color=colour)
            clear = {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.6}  # of the line at 50
            axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=7, color=theme.quiet, bbox=clear)
        axes.axvline(CHANCE, color=theme.ink, lw=1, ls=(0, (4, 3)))
        axes.text(CHANCE, -0.62, "chance 50", ha="center", va="bottom", fontsize=8, color=theme.quiet)
        axes.set_yticks(range(len(counts)), [f"{kind}\n{count} captions" for kind, count in counts.items()])
        axes.set_ylim(len(counts) - 0.45, -0.6)
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel("captions that prefer their own clip to its twin, %")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        legend(figure)

    said = "; ".join(
        f"{label}: {', '.join(f'{k} {v:.0f}%' for k, v in share.items())}" for label, share in shares.items()
    )
    bars = len(counts) * len(shares)
    height = 1.3 + 0.19 * len(shares) + max(0.16 * bars, 0.45 * len(counts))
    return picture(draw, height, f"Motion pairs by kind. {said}.")


def confusion(scores: Scores) -> np.ndarray:
    """[2, 2] percent: of the captions of the pairs' first (second) clips, how many prefer first, second."""
    preference = scores.preference()
    own = [100 * float(preference.right[preference.side == side].mean()) for side in (0, 1)]
    return np.array([[own[0], 100 - own[0]], [100 - own[1], own[1]]])


def pair_confusion(stages: Mapping[str, Scores]) -> Picture:
    """The `confusion` of each stage: captions of first and second clips against the clip they prefer."""
    tables = {label: confusion(scores) for label, scores in stages.items()}
    rows = -(-len(tables) // 2)

    def draw(figure: Figure, theme: Theme) -> None:
        shades = LinearSegmentedColormap.from_list("shades", [theme.paper, theme.colours[0]])
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes in grid.flat[len(tables) :]:
            axes.set_visible(False)
        for axes, (label, table) in zip(grid.flat, tables.items(), strict=False):
            axes.imshow(table, cmap=shades, vmin=0, vmax=130)
            for (row, column), value in np.ndenumerate(table):
                weight = "bold" if row == column else "normal"
                axes.text(column, row, f"{value:.0f}%", ha="center", va="center", fontsize=11, weight=weight)
            axes.set_title(textwrap.fill(label, 26), fontsize=9)
            axes.set_xticks((0, 1), ("1st clip", "2nd clip"))
            axes.set_yticks((0, 1), ("of 1st", "of 2nd"))
            axes.set_xlabel("preferred")
            axes.set_ylabel("caption")
            axes.grid(visible=False)
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)

    said = "; ".join(f"{label}: own clip {t[0, 0]:.0f}% and {t[1, 1]:.0f}%" for label, t in tables.items())
    return picture(draw, 2.35 * rows, f"Captions of the first and the second clips of the pairs. {said}.")


def legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", frameon=False, borderpad=0, handlelength=2.4)


def picture(draw: Callable[[Figure, Theme], None], height: float, alt: str) -> Picture:
    images: list[str] = []
    for theme in (LIGHT, DARK):
        with matplotlib.rc_context(_settings(theme)):
            figure = Figure((WIDTH, height), DPI, layout="constrained")
            draw(figure, theme)
            out = io.BytesIO()
            figure.savefig(out, format="png")
            images.append(base64.b64encode(out.getvalue()).decode())
            size = figure.canvas.get_width_height()
    return Picture(images[0], images[1], *size, alt)


def _settings(theme: Theme) -> dict[Any, Any]:
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper)
    quiet = dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), theme.quiet)
    return {
        **paper,
        **quiet,
        "text.color": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.parse_math": False,  # a title may hold a dollar sign
        "font.size": 9.0,
        "legend.fontsize": 8.5,
        "xtick.labelsize": 8.0,
        "ytick.labelsize": 8.0,
    }
