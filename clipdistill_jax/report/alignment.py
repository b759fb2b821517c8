"""Which words a model sees in which frames, and whether students agree with CLIP (CLIPPING, Figure 5)."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from clipdistill_jax.report.figures import Picture, Theme, picture

FRAMES = 12  # frames shown, at most
WORDS = 32  # words shown, at most
# Inches: a cell at most, a map at most, a line of words, the gap between maps, the line below a map.
_CELL, _PANEL, _LINE, _GAP, _FOOT = 0.55, 3.0, 0.17, 0.16, 0.24


class Maps(NamedTuple):
    """Cosines of frames and words, n pairs of a clip and a caption; `mask` is True where both are real."""

    cosines: Float[np.ndarray, "n f w"]
    mask: Bool[np.ndarray, "n f w"]


def frame_word_maps(
    frames: Float[np.ndarray, "n f d"],
    frame_mask: Bool[np.ndarray, "n f"],
    words: Float[np.ndarray, "n w d"],
    word_mask: Bool[np.ndarray, "n w"],
) -> Maps:
    """The cosine of every frame of a clip with every word of its caption; 0 where one of them is not real."""

    def unit(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    mask = frame_mask[:, :, None] & word_mask[:, None, :]
    return Maps(np.where(mask, unit(frames) @ unit(words).swapaxes(1, 2), 0), mask)


def agreement(ours: Maps, theirs: Maps) -> Float[np.ndarray, " n"]:
    """Pearson correlation of two models' maps of each pair, over the cells that are real in both.

    NaN where one of the two is constant there, as on a single cell. The models' joint spaces may differ in
    width: only the cosines are compared.
    """
    mask = ours.mask & theirs.mask
    count = np.maximum(mask.sum((1, 2)), 1)

    def centred(maps: Maps) -> np.ndarray:
        cosines = np.where(mask, maps.cosines.astype(np.float64), 0)
        mean = cosines.sum((1, 2)) / count
        return np.where(mask, cosines - mean[:, None, None], 0)

    a, b = centred(ours), centred(theirs)
    # Cosines have float32's accuracy: a spread below that is none.
    flat = [np.sqrt((x * x).sum((1, 2)) / count) < 1e-6 for x in (a, b)]
    norm = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    either = flat[0] | flat[1]
    return np.where(either, np.nan, (a * b).sum((1, 2)) / np.where(either, 1, norm))


def spread(values: Float[np.ndarray, " n"], count: int) -> Int[np.ndarray, " k"]:
    """Places of `count` values from the highest to the lowest, evenly over their order; NaNs are left out."""
    order = np.argsort(-values, kind="stable")  # NaNs come last
    order = order[: np.isfinite(values).sum()]
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]


def alignment_picture(
    frames: UInt8[np.ndarray, "f h v 3"],
    words: Sequence[str],
    maps: Mapping[str, Float[np.ndarray, "f w"]],
    mask: Bool[np.ndarray, "f w"],
    notes: Mapping[str, str],
) -> Picture:
    """A pair's map by each model, side by side: words as rows, frames as columns with their pictures above.

    Args:
      frames: of the clip, in time order.
      words: of the caption; slots beyond them are not drawn.
      maps: label -> cosines.
      mask: True where a frame and a word are real in every map; frames and words without such are left out.
      notes: label -> a line under the label, or none.
    """
    columns = np.flatnonzero(mask.any(1))
    columns = columns[np.linspace(0, len(columns) - 1, min(FRAMES, len(columns))).astype(int)]
    rows = [int(i) for i in np.flatnonzero(mask.any(0)) if i < len(words)][:WORDS]
    if not len(columns) or not rows:
        raise ValueError("there is nothing to draw: no frame and word that are real in every map")
    said = [words[i] for i in rows]
    cell = min(_CELL, _PANEL / len(columns))
    high, wide = frames.shape[1:3]
    thumb = cell * high / wide
    panel = max(cell * len(columns), 1.65)  # a label needs some room
    left = 0.2 + 0.075 * max(map(len, said))
    width = left + len(maps) * (panel + _GAP)
    body = _LINE * len(rows)
    titles = {
        label: textwrap.wrap(label, int(panel / 0.078), max_lines=2, placeholder="...") for label in maps
    }
    head = 0.26 + 0.15 * max(map(len, titles.values()))
    height = head + thumb + 0.04 + body + _FOOT

    def draw(figure: Figure, theme: Theme) -> None:
        figure.set_layout_engine("none")  # every place below is in inches
        figure.set_size_inches(width, height)
        shades = LinearSegmentedColormap.from_list("shades", [theme.paper, theme.colours[0], theme.ink])
        for i, (label, cosines) in enumerate(maps.items()):
            x = left + i * (panel + _GAP)

            def place(x: float, y: float, wide: float, high: float) -> tuple[float, float, float, float]:
                return x / width, y / height, wide / width, high / height

            axes = figure.add_axes(place(x, _FOOT, cell * len(columns), body))
            shown = cosines[np.ix_(columns, rows)].T
            axes.imshow(shown, cmap=shades, aspect="auto", interpolation="nearest")
            axes.set_yticks(range(len(rows)), said if i == 0 else [""] * len(rows), fontsize=8)
            axes.set_xticks([])
            axes.tick_params(length=0)
            axes.grid(visible=False)
            axes.set_frame_on(False)
            for k, column in enumerate(columns):
                pixels = figure.add_axes(place(x + k * cell, _FOOT + body + 0.04, cell * 0.96, thumb))
                pixels.imshow(frames[column], interpolation="nearest")
                pixels.axis("off")
            top = 1 - 0.03 / height
            figure.text(x / width, top, "\n".join(titles[label]), fontsize=8.5, weight="bold", va="top")
            below = (_FOOT + body + thumb + 0.08) / height
            figure.text(x / width, below, notes.get(label, ""), fontsize=8, color=theme.quiet)
            extent = f"cosine {shown.min():.2f} to {shown.max():.2f}"
            figure.text(x / width, 0.06 / height, extent, fontsize=7, color=theme.quiet)

    best = {
        label: said[int(cosines[np.ix_(columns, rows)].max(0).argmax())] for label, cosines in maps.items()
    }
    told = "; ".join(f"{label}: strongest at “{word}”" for label, word in best.items())
    return picture(draw, height, f"Frame-word cosines of “{' '.join(said)}”. {told}.")
