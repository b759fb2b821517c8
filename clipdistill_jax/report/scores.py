"""What a stage's scores.npz says: which clips a caption finds, and whether it prefers its own to its twin."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Preference(NamedTuple):
    """One caption of a motion pair each: its index, its pair, which clip of the pair is its own (0 or 1), and
    1 where it scores its own clip above the twin, 0 where below, 0.5 at a tie."""

    text: Int[np.ndarray, " m"]
    pair: Int[np.ndarray, " m"]
    side: Int[np.ndarray, " m"]
    right: Float[np.ndarray, " m"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of every test caption against every test clip.

    Attributes:
      scores: higher is a better match.
      video_ids: the data set's name of each clip.
      captions: the text of each row.
      clip_of_text: the right clip of each row.
      pairs: clips that differ only in motion; may be none.
      kinds: what each pair differs in.
    """

    scores: Float[np.ndarray, "t v"]
    video_ids: list[str]
    captions: list[str]
    clip_of_text: Int[np.ndarray, " t"]
    pairs: Int[np.ndarray, "n 2"]
    kinds: list[str]

    def ranks(self) -> Float[np.ndarray, " t"]:
        """Rank of each caption's right clip, 1 = first; ties at the mean of their places."""
        right = self.scores[np.arange(len(self.scores)), self.clip_of_text][:, None]
        return 1 + (self.scores > right).sum(1) + ((self.scores == right).sum(1) - 1) / 2

    def best(self, text: int, count: int) -> list[int]:
        """The clips that a caption scores highest, best first."""
        return [int(clip) for clip in np.argsort(-self.scores[text], kind="stable")[:count]]

    def twins(self) -> Int[np.ndarray, " v"]:
        """The twin of each clip, -1 where it has none."""
        twin = np.full(len(self.video_ids), -1)
        twin[self.pairs[:, 0]], twin[self.pairs[:, 1]] = self.pairs[:, 1], self.pairs[:, 0]
        return twin

    def preference(self) -> Preference:
        """How the captions of the motion pairs choose between the two clips of their pair."""
        place = np.full((len(self.video_ids), 2), -1)  # clip -> its pair, its side
        for side in (0, 1):
            place[self.pairs[:, side], 0], place[self.pairs[:, side], 1] = np.arange(len(self.pairs)), side
        text = np.flatnonzero(place[self.clip_of_text, 0] >= 0)
        pair, side = place[self.clip_of_text[text]].T
        own, rival = (self.scores[text, self.pairs[pair, which]] for which in (side, 1 - side))
        return Preference(text, pair, side, (own > rival) + 0.5 * (own == rival))


def read_scores(path: Path) -> Scores | None:
    """The scores that a stage wrote; None where there is no such file."""
    if not path.exists():
        return None
    with np.load(path) as file:
        return Scores(
            scores=file["scores"],
            video_ids=[str(name) for name in file["video_ids"]],
            captions=[str(said) for said in file["captions"]],
            clip_of_text=file["clip_of_text"],
            pairs=file["pairs"].reshape(-1, 2),
            kinds=[str(kind) for kind in file["pair_kinds"]],
        )
