"""Finds the clips of an index that fit a text best."""

import base64
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from rich.table import Table
from rich.text import Text

from clipdistill_jax.export import load_exported
from clipdistill_jax.search import shards
from clipdistill_jax.search.index import shown


class Hit(NamedTuple):
    """A clip that was found.

    Attributes:
      rank: 1 is the best.
      score: cosine of text and clip.
      file: path under the folder of videos.
      path: the whole path.
      seconds: length of the clip.
      thumbnail: JPEG of its middle frame.
    """

    rank: int
    score: float
    file: str
    path: Path
    seconds: float
    thumbnail: bytes


def find(index: Path, text: str, top: int = 5, model: Path | None = None) -> list[Hit]:
    """The clips with the highest cosine to a text, best first; equal ones in the order of the index.

    Args:
      index: folder of the index.
      text: the query.
      top: how many clips at most.
      model: folder of the exported model; None takes the one that made the index from where it was.

    Raises:
      FileNotFoundError: no index or no model there.
      ValueError: an empty text, `top` below 1, another model, a damaged or an empty index.
    """
    if not text.strip():
        raise ValueError("the query is empty: say what to look for")
    if top < 1:
        raise ValueError(f"top is {top}; it must be at least 1")
    index = index.expanduser()
    manifest = shards.read_manifest(index)
    made_with = manifest["model"]
    folder = model or Path(made_with["folder"])
    try:
        loaded = load_exported(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. {index} was made with the model in {made_with['folder']}; where it lies now: --model"
        ) from error
    if loaded.config["fingerprint"] != made_with["fingerprint"]:
        raise ValueError(
            f"{index} was made with the model {made_with['fingerprint']}; {folder} holds "
            f"{loaded.config['fingerprint']}. Give the model that made the index, or index again"
        )
    paths = shards.shards(index)
    if not paths:
        raise ValueError(f"{index} holds no clips: run the index command again, it says what it skipped")
    (query,) = loaded.encode_sentences([text])
    scores = [shards.read_vectors(path) @ query for path in paths]
    return _hits(paths, scores, top, Path(manifest["videos"]))


def _hits(paths: Sequence[Path], scores: Sequence[np.ndarray], top: int, root: Path) -> list[Hit]:
    """The best of all shards; only shards with a hit are read whole."""
    flat, ends = np.concatenate(scores), np.cumsum([len(part) for part in scores])
    opened: dict[int, shards.Clips] = {}
    hits = []
    for rank, i in enumerate(np.argsort(-flat, kind="stable")[:top], start=1):
        shard = int(np.searchsorted(ends, i, side="right"))
        clips = opened.get(shard) or opened.setdefault(shard, shards.read_shard(paths[shard]))
        row = int(i - ends[shard])  # negative: counted from the shard's end
        file, seconds = str(clips.path[row]), float(clips.seconds[row])
        hits.append(Hit(rank, float(flat[i]), file, root / file, seconds, clips.thumbnail[row]))
    return hits


def as_table(text: str, hits: Sequence[Hit]) -> Table:
    """Hits as a table for the terminal."""
    table = Table(title=Text(text))
    for name in ("rank", "score", "file", "length"):
        table.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for hit in hits:
        table.add_row(str(hit.rank), f"{hit.score:.3f}", Text(shown(hit.file)), clock(hit.seconds))
    return table


def as_json(text: str, hits: Sequence[Hit]) -> dict[str, Any]:
    """Hits without their thumbnails, json-able."""
    names = ("rank", "score", "file", "seconds")
    return {"query": text, "hits": [{name: getattr(hit, name) for name in names} for hit in hits]}


def as_page(text: str, hits: Sequence[Hit]) -> str:
    """Hits as an HTML page with thumbnails; one file, nothing outside it but links to the videos."""
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    rows = [
        {
            "rank": hit.rank,
            "score": f"{hit.score:.3f}",
            "file": shown(hit.file),
            "uri": hit.path.as_uri(),
            "length": clock(hit.seconds),
            "image": base64.b64encode(hit.thumbnail).decode(),
        }
        for hit in hits
    ]
    return environment.from_string(template).render(query=text, hits=rows)


def clock(seconds: float) -> str:
    """75.2 -> "1:15", 3675 -> "1:01:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
