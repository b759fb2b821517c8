"""Queries of the test split with the clips that each model finds."""

import base64
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clipdistill_jax.report.scores import Scores

FramesOf = Callable[[int], np.ndarray]  # clip -> uint8 [frames, height, width, 3], in time order

FOUND = 3  # clips shown of each model
FRAMES = 4  # frames shown of a clip
SIDE = 80  # pixels, at most
SINGLES = 4  # queries outside of the motion pairs


@dataclasses.dataclass(frozen=True)
class Strip:
    """A clip as a row of frames: PNG in base64, its size, and what it is: "right", "twin" or neither."""

    clip: str
    image: str
    width: int
    height: int
    role: str
    score: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one model finds for a query; `own` and `twin` are its scores of the pair, where there is one."""

    model: str
    rank: str
    found: list[Strip]
    own: str
    twin: str


@dataclasses.dataclass(frozen=True)
class Query:
    """A caption, what its motion pair differs in ("" = no pair), its clip, the twin, what the models find."""

    caption: str
    kind: str
    clips: list[Strip]
    answers: list[Answer]


def gallery(stages: Mapping[str, Scores], frames_of: FramesOf) -> list[Query]:
    """Queries chosen by the last of the models, and what all of them find.

    Args:
      stages: label -> scores, all of the same split.
      frames_of: the frames of a clip by its index.
    """
    last = list(stages.values())[-1]
    twins = last.twins()
    images: dict[int, tuple[str, int, int]] = {}

    def strip(clip: int, role: str, score: str = "") -> Strip:
        if clip not in images:
            images[clip] = film(frames_of(clip))
        return Strip(last.video_ids[clip], *images[clip], role=role, score=score)

    made = []
    for text, kind in choose(last):
        right = int(last.clip_of_text[text])
        twin = int(twins[right])
        roles = {right: "right", **({twin: "twin"} if twin >= 0 else {})}
        answers = []
        for label, scores in stages.items():
            said = [f"{score:.2f}" for score in scores.scores[text]]
            found = [strip(clip, roles.get(clip, ""), said[clip]) for clip in scores.best(text, FOUND)]
            rank = f"{scores.ranks()[text]:g}"
            answers.append(Answer(label, rank, found, said[right], said[twin] if twin >= 0 else ""))
        clips = [strip(clip, role) for clip, role in roles.items()]
        made.append(Query(last.captions[text], kind, clips, answers))
    return made


def choose(scores: Scores) -> Iterator[tuple[int, str]]:
    """Captions to show, each with what its motion pair differs in ("" for those outside of the pairs).

    Those outside are spread evenly over the order of their ranks, first and last included. Of the pairs, the
    first caption that prefers its own clip and the first of another pair, if possible of another kind, that
    prefers the twin; where there are no such captions, others.
    """
    preference = scores.preference()
    ranks = scores.ranks()
    outside = np.setdiff1d(np.arange(len(ranks)), preference.text)
    order = outside[np.argsort(ranks[outside], kind="stable")]
    places = np.linspace(0, len(order) - 1, min(SINGLES, len(order))).astype(int)
    yield from ((int(text), "") for text in order[places])
    kinds = [scores.kinds[pair] for pair in preference.pair]
    told: list[int] = []
    for wanted in (1.0, 0.0):
        pairs, known = preference.pair[told], {kinds[i] for i in told}
        rest = [i for i, pair in enumerate(preference.pair) if pair not in pairs]
        misfit = [(preference.right[i] != wanted, kinds[i] in known, i) for i in rest]
        told += [i for *_, i in sorted(misfit)[:1]]
    yield from ((int(preference.text[i]), kinds[i]) for i in told)


def film(frames: UInt8[np.ndarray, "f h w 3"]) -> tuple[str, int, int]:
    """Some frames of a clip, evenly spread, side by side: (PNG in base64, width, height)."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).astype(int)]
    small = []
    for frame in chosen:
        image = Image.fromarray(frame)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.append(image)
    width, height = small[0].size
    gap = max(2, width // 24)
    row = Image.new("RGBA", (len(small) * (width + gap) - gap, height))
    for i, image in enumerate(small):
        row.paste(image, (i * (width + gap), 0))
    out = io.BytesIO()
    row.save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode(), *row.size


def prepared_frames(prepared: Path, split: str = "test") -> FramesOf:
    """Frames from the records that `clipdistill_jax.prepare` wrote."""
    # TensorFlow reads the records; it is imported only where there are some.
    from clipdistill_jax.data.graph import import_tensorflow, open_records

    tf = import_tensorflow()
    records = open_records(prepared, split)

    def frames_of(clip: int) -> np.ndarray:
        (serialized,) = records.__getitems__([clip])
        stored = tf.train.Example.FromString(serialized).features.feature["frames"].bytes_list.value
        chosen = [stored[i] for i in np.linspace(0, len(stored) - 1, min(FRAMES, len(stored))).astype(int)]
        return np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in chosen])

    return frames_of
