"""Which words targeted distillation chooses and why: the scores of a text's words (CLIP-TD, Figure 2)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from clipdistill_jax.distill.tokens import choose_words, shares, visual_relevance
from clipdistill_jax.report.figures import Picture, Theme, legend, picture
from clipdistill_jax.report.sections import Panel, Section
from clipdistill_jax.report.table import Column

WORDS = 32  # words shown, at most
_LINE = 0.2  # inches


@dataclasses.dataclass(frozen=True)
class WordScores:
    """The words of a text with what they are chosen by.

    Attributes:
      words: as they are said.
      relevance: S_vr / |S_vr|_1, each word's share in the visual relevance.
      importance: S_si / |S_si|_1, its share in the importance.
      chosen: which are distilled.
    """

    words: tuple[str, ...]
    relevance: Float[np.ndarray, " w"]
    importance: Float[np.ndarray, " w"]
    chosen: Bool[np.ndarray, " w"]

    @property
    def total(self) -> Float[np.ndarray, " w"]:
        """S, the sum of both (eq. 5)."""
        return self.relevance + self.importance


def score_words(
    words: Sequence[str],
    image: Float[np.ndarray, " d"],
    vectors: Float[np.ndarray, "slots d"],
    word_mask: Bool[np.ndarray, " slots"],
    importance: Float[np.ndarray, " slots"],
    count: int = 2,
    content_only: bool = False,
) -> WordScores:
    """The scores of a text's words, as the term `tokens` has them.

    Args:
      words: of the text (`split_words`); those without a vector, cut off by the tokenizer, are left out.
      image: the teacher's image vector.
      vectors: the teacher's word vectors, in as many slots as a batch has.
      word_mask: which slots hold a word that both models have.
      importance: of the words, in slots.
      count, content_only: as of the term.
    """
    mask = jnp.asarray(word_mask)[None]
    given = jnp.asarray(importance)[None]
    if content_only:
        mask = mask & (given > 0)
    relevance = shares(visual_relevance(jnp.asarray(image)[None], jnp.asarray(vectors)[None], mask), mask)
    matter = shares(given, mask)
    places, real = choose_words(relevance + matter, mask, count)
    chosen = np.zeros(len(word_mask), bool)
    chosen[np.asarray(places[0])[np.asarray(real[0])]] = True
    slots = [i for i in np.flatnonzero(word_mask).tolist() if i < len(words)]
    return WordScores(
        words=tuple(words[i] for i in slots),
        relevance=np.asarray(relevance[0])[slots],
        importance=np.asarray(matter[0])[slots],
        chosen=chosen[slots],
    )


def write_words(path: Path, examples: Mapping[str, WordScores]) -> None:
    """Writes the scores of some examples, by heading, for the page: a stage's words.npz."""
    lengths = [len(scores.words) for scores in examples.values()]

    def joined(name: str, dtype: Any) -> np.ndarray:
        return np.array([x for scores in examples.values() for x in getattr(scores, name)], dtype)

    np.savez_compressed(
        path,
        headings=np.array(list(examples), str),
        lengths=np.array(lengths, np.int32),
        words=joined("words", str),
        relevance=joined("relevance", np.float32),
        importance=joined("importance", np.float32),
        chosen=joined("chosen", bool),
    )


def read_words(path: Path) -> dict[str, WordScores]:
    """What `write_words` wrote; empty where there is no such file."""
    if not path.exists():
        return {}
    with np.load(path) as file:
        names = ("words", "relevance", "importance", "chosen")
        parts = {name: np.split(file[name], np.cumsum(file["lengths"])[:-1]) for name in names}
        headings = [str(heading) for heading in file["headings"]]
    return {
        heading: WordScores(
            words=tuple(str(word) for word in parts["words"][k]),
            relevance=parts["relevance"][k],
            importance=parts["importance"][k],
            chosen=parts["chosen"][k],
        )
        for k, heading in enumerate(headings)
    }


def token_table(scores: WordScores) -> list[Column]:
    """A row a word, in the order of the text; `report.table.markdown` writes it."""

    def cells(values: np.ndarray) -> list[str]:
        return [f"{value:.3f}" for value in values]

    return [
        Column("", "Word", list(scores.words)),
        Column("", "Selected", ["yes" if chosen else "" for chosen in scores.chosen]),
        Column("", "Visual relevance", cells(scores.relevance)),
        Column("", "Importance", cells(scores.importance)),
        Column("", "Sum", cells(scores.total)),
    ]


def token_picture(scores: WordScores) -> Picture:
    """A bar a word, from top to bottom: its visual relevance, then its importance; chosen ones in bold.

    Raises:
      ValueError: the text has no words.
    """
    count = min(len(scores.words), WORDS)
    if not count:
        raise ValueError("there is nothing to draw: the text has no words")
    rows = range(count)
    said = [
        f"{word}  •" if chosen else word for word, chosen in zip(scores.words, scores.chosen, strict=True)
    ]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        first, second = scores.relevance[:count], scores.importance[:count]
        edge: dict[str, Any] = {"edgecolor": theme.paper, "linewidth": 0.0}
        axes.barh(rows, first, 0.72, label="visual relevance", color=theme.colours[0], **edge)
        axes.barh(
            rows, second, 0.72, left=first, label="importance", color=theme.colours[1], hatch="////", **edge
        )
        axes.set_yticks(rows, said[:count])
        for label, chosen in zip(axes.get_yticklabels(), scores.chosen, strict=False):
            label.set_color(theme.ink if chosen else theme.quiet)
            label.set_fontweight("bold" if chosen else "normal")
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the text's words, summed; • selected")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        legend(figure)

    ranked = np.argsort(-scores.total, kind="stable")
    chosen = [f"“{scores.words[i]}” ({scores.total[i]:.2f})" for i in ranked if scores.chosen[i]]
    alt = f"Word scores of “{' '.join(scores.words[:count])}”. Selected: {', '.join(chosen) or 'none'}."
    return picture(draw, 1.1 + _LINE * count, alt)


def token_section(examples: Mapping[str, WordScores]) -> Section:
    """The pictures of some examples, by heading."""
    text = (
        "How to read it: a word's bar is its share in how close the words are to the image for CLIP, and its "
        "share in how much they matter in the text by YAKE; the words with the longest bars are selected, "
        "and the student's vectors of these are drawn to CLIP's."
    )
    panels = [Panel(heading, token_picture(scores)) for heading, scores in examples.items()]
    return Section("Selected words", text, panels)
