"""How far combinations of a student's layers give its teacher's layers (CLIPPING, Figures 7 and 8).

Ridge regression fits every teacher layer from all student layers together, and from each of them alone, on
some of the clips. What a fit leaves over is measured on the others.
"""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clipdistill_jax.distill.layers import to_grid
from clipdistill_jax.report.figures import Picture, Theme, legend, picture

RIDGE = 1e-3
_NOISE = 1e-12  # a variance below this share of the mean square is rounding
Layers = Sequence[np.ndarray]  # feature maps [n, f, h, w, C], each with its own h, w and C


def common_grid(layers: Sequence[Any]) -> int:
    """The shortest side of all layers, or of their shapes: no map has to grow."""
    return min(side for layer in layers for side in layer.shape[2:4])


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over rows of student channels x and teacher channels y; rows are cells of real frames.

    Attributes:
      count: rows.
      x, y: sums of the channels.
      xx, xy, yy: sums of their products; of y with itself the squares only.
    """

    count: int
    x: Float[np.ndarray, " s"]
    y: Float[np.ndarray, " t"]
    xx: Float[np.ndarray, "s s"]
    xy: Float[np.ndarray, "s t"]
    yy: Float[np.ndarray, " t"]

    def __add__(self, other: "Moments") -> "Moments":
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Moments(**values)

    def about(
        self, x: Float[np.ndarray, " s"], y: Float[np.ndarray, " t"]
    ) -> tuple[Float[np.ndarray, "s s"], Float[np.ndarray, "s t"], Float[np.ndarray, " t"]]:
        """Mean products of x and x, x and y, y and y, after the given values are taken off."""
        n, mean_x, mean_y = self.count, self.x / self.count, self.y / self.count
        xx = self.xx / n - np.outer(mean_x, x) - np.outer(x, mean_x) + np.outer(x, x)
        xy = self.xy / n - np.outer(mean_x, y) - np.outer(x, mean_y) + np.outer(x, y)
        return xx, xy, self.yy / n - 2 * mean_y * y + y * y


def moments(student: Layers, teacher: Layers, frame_mask: Bool[np.ndarray, "n f"], grid: int) -> Moments:
    """Moments of clips' layers, pooled as the layer terms do; masked frames are left out. They add up."""

    def rows(layers: Layers) -> np.ndarray:
        pooled = (np.asarray(to_grid(jnp.asarray(layer), grid, grid)) for layer in layers)
        cells = [layer[frame_mask].reshape(-1, layer.shape[-1]) for layer in pooled]
        return np.concatenate(cells, -1).astype(np.float64)

    x, y = rows(student), rows(teacher)
    return Moments(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y * y).sum(0))


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """M teacher layers from N student layers, shallow to deep. Residuals are 1 - R^2 on clips not fitted on.

    Attributes:
      residual: from all student layers together.
      single: from each student layer alone.
      nearest: for each teacher layer the student layer that alone fits best, on the clips fitted on.
      weights: norm of each student layer's weights in the fit from all, measured by the spread of what they
        multiply: |x W| / |y|, both without their means. 1 = it adds as much as the teacher layer has; layers
        that take back each other's share can have more.
    """

    residual: Float[np.ndarray, " m"]
    single: Float[np.ndarray, "m n"]
    nearest: Int[np.ndarray, " m"]
    weights: Float[np.ndarray, "m n"]

    @property
    def best_single(self) -> Float[np.ndarray, " m"]:
        """Residual from the `nearest` student layer alone: one layer to one layer (OL2OL), at its best."""
        return self.single[np.arange(len(self.nearest)), self.nearest]


def reconstruct(
    fitted: Moments, held: Moments, student: Sequence[int], teacher: Sequence[int], ridge: float = RIDGE
) -> Reconstruction:
    """Fits every teacher layer on one set of clips and measures what is left on another.

    Args:
      fitted: moments of the clips to fit on.
      held: of the others.
      student: channels of each student layer.
      teacher: channels of each teacher layer.
      ridge: penalty on squared weights, as a share of a student channel's mean variance.

    Raises:
      ValueError: a teacher layer does not vary over the clips, so there is nothing to explain.
    """
    centre = fitted.x / fitted.count, fitted.y / fitted.count
    xx, xy, yy = fitted.about(*centre)
    held_xx, held_xy, held_yy = held.about(*centre)
    total = _by_layer(held.about(held.x / held.count, held.y / held.count)[2], teacher)
    variance = _by_layer(yy, teacher)
    least = _NOISE * _by_layer(fitted.yy / fitted.count, teacher)
    for m in np.flatnonzero((variance <= least) | (total <= least)):
        raise ValueError(f"teacher layer {m} is the same on all clips and frames")
    # Every layer is scaled to a mean variance of 1, so that one penalty suits all; a dead one stays as it is.
    mean = _by_layer(np.diag(xx), student) / np.array(student)
    least = _NOISE * _by_layer(np.diag(fitted.xx) / fitted.count, student) / np.array(student)
    x_scale = np.repeat(1 / np.sqrt(np.where(mean > least, mean, 1)), student)
    y_scale = np.repeat(1 / np.sqrt(variance / np.array(teacher)), teacher)
    total = total * np.array(teacher) / variance
    xx, held_xx = (a * x_scale[:, None] * x_scale for a in (xx, held_xx))
    xy, held_xy = (a * x_scale[:, None] * y_scale for a in (xy, held_xy))
    yy, held_yy = (a * y_scale**2 for a in (yy, held_yy))

    def solve(part: slice) -> np.ndarray:
        penalty = ridge * np.eye(part.stop - part.start)
        return np.linalg.solve(xx[part, part] + penalty, xy[part])

    def left(w: np.ndarray, part: slice, xx: np.ndarray, xy: np.ndarray, yy: np.ndarray) -> np.ndarray:
        squares = yy - 2 * (w * xy[part]).sum(0) + (w * (xx[part, part] @ w)).sum(0)
        return _by_layer(squares, teacher)

    ends = np.cumsum(student).tolist()
    everything = slice(0, ends[-1])
    joint = solve(everything)
    single, on_fitted, sizes = [], [], []
    for start, end in zip([0, *ends], ends, strict=False):
        part = slice(start, end)
        w = solve(part)
        single.append(left(w, part, held_xx, held_xy, held_yy) / total)
        on_fitted.append(left(w, part, xx, xy, yy))
        share = joint[part]
        size = _by_layer((share * (xx[part, part] @ share)).sum(0), teacher)
        sizes.append(np.maximum(size, 0))  # of a dead layer it is rounding
    return Reconstruction(
        residual=left(joint, everything, held_xx, held_xy, held_yy) / total,
        single=np.stack(single, -1),
        nearest=np.argmin(on_fitted, 0),
        weights=np.sqrt(np.stack(sizes, -1) / np.array(teacher)[:, None]),
    )


def _by_layer(values: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Sums of the last axis over each layer's channels."""
    return np.add.reduceat(values, [0, *np.cumsum(widths)[:-1]], axis=-1)


def halves(clips: int, twins: Int[np.ndarray, "k 2"]) -> Bool[np.ndarray, " {clips}"]:
    """True for the clips to fit on: the first half; of twins, which show the same frames, both go together.

    Raises:
      ValueError: one of the two halves is empty.
    """
    fit = np.arange(clips) < (clips + 1) // 2
    near = twins[(twins < clips).all(1)]
    fit[near[:, 1]] = fit[near[:, 0]]
    if fit.all() or not fit.any():
        raise ValueError(f"{clips} clips cannot be split into clips to fit on and clips to measure on")
    return fit


def residual_bars(students: Mapping[str, Reconstruction], index: Mapping[str, int]) -> Picture:
    """Residuals by teacher layer: a bar a student for all of its layers, a mark for the best of them alone.

    Args:
      students: label -> reconstruction, of the same teacher.
      index: label -> the stage's place in the run, which sets its colour.
    """
    thick = 0.8 / len(students)
    count = len(next(iter(students.values())).residual)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        for row, (label, found) in enumerate(students.items()):
            x = 1 + np.arange(count) + (row - (len(students) - 1) / 2) * thick
            axes.bar(x, found.residual, 0.86 * thick, label=label, color=theme.colour(index[label]))
            reach = 0.43 * thick
            marked = "best single layer (one to one)" if row == len(students) - 1 else "_"
            axes.hlines(found.best_single, x - reach, x + reach, color=theme.ink, lw=1.8, label=marked)
        axes.axhline(1, color=theme.quiet, lw=1, ls=(0, (4, 3)))
        highest = max(float(found.best_single.max()) for found in students.values())
        axes.set_ylim(0, max(1.05, 1.05 * highest))
        axes.set_xlim(0.4, count + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("layer of the teacher, shallow to deep")
        axes.set_ylabel("left unexplained, 1 - R²")
        axes.grid(axis="x", visible=False)
        legend(figure)

    said = "; ".join(
        f"{label}: {found.residual.mean():.2f} from all layers, {found.best_single.mean():.2f} from the best"
        for label, found in students.items()
    )
    height = 2.6 + 0.19 * (len(students) + 1)
    return picture(draw, height, f"Unexplained share of each teacher layer. On average {said}.")


def weight_maps(students: Mapping[str, Reconstruction]) -> Picture:
    """Norms of the weights by teacher layer (rows) and student layer (columns), one map a student."""
    per_row = 2
    rows = -(-len(students) // per_row)
    count, layers = next(iter(students.values())).weights.shape
    highest = max(float(found.weights.max()) for found in students.values())
    high = max(0.75 + 0.2 * count, 1.8)

    def draw(figure: Figure, theme: Theme) -> None:
        shades = LinearSegmentedColormap.from_list("shades", [theme.paper, theme.colours[0]])
        grid = figure.subplots(rows, per_row, squeeze=False)
        for axes in grid.flat[len(students) :]:
            axes.set_visible(False)
        for axes, (label, found) in zip(grid.flat, students.items(), strict=False):
            axes.imshow(found.weights, cmap=shades, vmin=0, vmax=1.3 * highest, aspect="auto")
            for (m, n), value in np.ndenumerate(found.weights):
                axes.text(n, m, f"{value:.2f}", ha="center", va="center", fontsize=7)
            axes.set_title(textwrap.fill(label, 26), fontsize=9)
            axes.set_xticks(range(layers), [str(n) for n in range(layers)])
            axes.set_yticks(range(count), [str(m + 1) for m in range(count)])
            axes.set_xlabel("student's stage")
            axes.set_ylabel("teacher's layer")
            axes.grid(visible=False)
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)

    said = "; ".join(
        f"{label}: most weight on stage {int(found.weights.mean(0).argmax())}"
        for label, found in students.items()
    )
    return picture(draw, high * rows, f"Norms of the weights of each student layer. {said}.")
