"""Figures that are made apart from a run, kept in its folder until the page shows them."""

import base64
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipdistill_jax.report.figures import Picture

FOLDER = "figures"
_LIST = "figures.json"


@dataclasses.dataclass(frozen=True)
class Panel:
    """A figure with its heading; not `shown` where the page draws the same itself."""

    heading: str
    picture: Picture
    shown: bool = True


@dataclasses.dataclass(frozen=True)
class Section:
    """Figures under a heading, with what they show in a sentence; `wide` ones have a row of their own."""

    heading: str
    text: str
    panels: Sequence[Panel]
    wide: bool = False


def write_sections(workdir: Path, sections: Sequence[Section], fingerprints: Mapping[str, str]) -> list[Path]:
    """Writes figures for the page to show: WORKDIR/figures/NAME.png, NAME-dark.png and figures.json.

    Args:
      workdir: the run's folder.
      sections: in the order to show.
      fingerprints: stage -> fingerprint of its result, of all that the figures show.

    Returns:
      The PNG files for a light page.
    """
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / _LIST).unlink(missing_ok=True)  # written last, so that it speaks of whole files only
    for old in folder.glob("[0-9][0-9]-*.png"):
        old.unlink()
    told: list[dict[str, Any]] = []
    files: list[Path] = []
    for section in sections:
        panels = []
        for panel in section.panels:
            name = f"{len(files) + 1:02d}-{re.sub('[^a-z0-9]+', '-', section.heading.lower()).strip('-')}"
            for suffix, image in (("", panel.picture.light), ("-dark", panel.picture.dark)):
                (folder / f"{name}{suffix}.png").write_bytes(base64.b64decode(image))
            size = {"width": panel.picture.width, "height": panel.picture.height}
            said = {"heading": panel.heading, "alt": panel.picture.alt, "shown": panel.shown}
            panels.append({"name": name, **said, **size})
            files.append(folder / f"{name}.png")
        told.append({**dataclasses.asdict(section), "panels": panels})
    value = {"fingerprints": dict(fingerprints), "sections": told}
    (folder / _LIST).write_text(json.dumps(value, indent=1), encoding="utf-8")
    return files


def read_sections(workdir: Path, results: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """What `write_sections` wrote; nothing where a stage has other weights by now."""
    file = workdir / FOLDER / _LIST
    if not file.exists():
        return []
    value = json.loads(file.read_text(encoding="utf-8"))
    for stage, fingerprint in value["fingerprints"].items():
        if results.get(stage, {}).get("fingerprint") != fingerprint:
            return []

    def image(name: str) -> str:
        return base64.b64encode((file.parent / f"{name}.png").read_bytes()).decode()

    def panel(said: dict[str, Any]) -> Panel:
        name, size = said["name"], (said["width"], said["height"])
        return Panel(said["heading"], Picture(image(name), image(f"{name}-dark"), *size, said["alt"]))

    return [
        Section(**{**said, "panels": [panel(p) for p in said["panels"] if p.get("shown", True)]})
        for said in value["sections"]
    ]
