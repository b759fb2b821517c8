"""The table of a run: one row a stage, as markdown, as plain text, and in cells for the page."""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "-"
PLAIN_WIDTH = 100
_RECALLS = ("R@1", "R@5", "R@10", "MdR")
_DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}
_PARTS = ("vision", "text", "temporal")
_SHORT = {"text to video": "t2v", "video to text": "v2t", "Parameters": "Params"}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: the heading that it shares with its neighbours ("" = none), its own, and its cells."""

    group: str
    name: str
    cells: list[str]

    @property
    def heading(self) -> str:
        """Both headings in one, in short."""
        return f"{_SHORT.get(self.group, self.group)} {self.name}".strip()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two stages that train the same model, without and with a teacher.

    Attributes:
      alone, distilled, teacher: names of stages.
      differences: what else their configs differ in.
    """

    alone: str
    distilled: str
    teacher: str
    differences: tuple[str, ...]


def humanize(count: float | int) -> str:
    """1234567 -> "1.23M"."""
    for unit, size in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if count < 999.5 * size or unit == "G":
            return f"{count / size:.3g}{unit}"
    raise AssertionError


def gflops(count: float | int) -> str:
    """FLOPs in units of 1e9, with three digits and no exponent."""
    value = count / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-4 else f"{value:.6f}"


def title(stages: Mapping[str, Any], name: str) -> str:
    """What people call a stage: its `title`, or its name."""
    return stages.get(name, {}).get("title") or name


def columns(
    stages: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], starts: Mapping[str, int]
) -> list[Column]:
    """The table, column by column.

    Args:
      stages: the config's `stages`.
      results: of each stage, as `run.run_stage` gives them; their order is that of the rows.
      starts: how often each stage was started. The minutes of one that was resumed get a "+": they are those
        of its last start.
    """
    rows = [(name, result, result["test"], result["sizes"]) for name, result in results.items()]
    made = [
        Column("", "Stage", [title(stages, name) for name in results]),
        Column("", "Learned from", [_teacher(stages, name) for name in results]),
        *(
            Column("Parameters", part, [_count(sizes["parameters"].get(part)) for *_, sizes in rows])
            for part in _PARTS
        ),
        Column("Parameters", "total", [_count(sizes["total"]) for *_, sizes in rows]),
        Column("GFLOPs", "a clip", [gflops(sizes["flops_clip"]) for *_, sizes in rows]),
        *(
            Column(group, name, [f"{test[f'{prefix}_{name}']:.1f}" for _, _, test, _ in rows])
            for prefix, group in _DIRECTIONS.items()
            for name in _RECALLS
        ),
    ]
    if any("motion_pairs" in test for _, _, test, _ in rows):
        cells = [f"{test['motion_pairs']:.1f}" if "motion_pairs" in test else NONE for _, _, test, _ in rows]
        made.append(Column("Motion", "pairs %", cells))
    return [*made, Column("Training", "minutes", minutes(results, starts))]


def minutes(results: Mapping[str, Mapping[str, Any]], starts: Mapping[str, int]) -> list[str]:
    """How long each stage trained, as `columns` says."""
    return [f"{r['seconds'] / 60:.1f}" + "+" * (starts.get(name, 1) > 1) for name, r in results.items()]


def _teacher(stages: Mapping[str, Any], name: str) -> str:
    teacher = stages.get(name, {}).get("teacher")
    return title(stages, teacher) if teacher else NONE


def _count(value: float | int | None) -> str:
    return NONE if value is None else humanize(value)


def markdown(table: Sequence[Column]) -> str:
    """The table in markdown, as GitHub reads it."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    words = 2  # columns of words; the others are numbers
    rules = [":--" if i < words else "--:" for i in range(len(table))]
    rows = zip(*(map(escape, column.cells) for column in table), strict=True)
    return "\n".join(line(row) for row in ([escape(c.heading) for c in table], rules, *rows))


def escape(text: str) -> str:
    """Text that markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(text.split()))


def plain_table(table: Sequence[Column], width: int = PLAIN_WIDTH) -> str:
    """The table for a terminal: the columns that fit `width`, names too long for it on several lines."""
    shown = [c for c in table if c.name not in ("Learned from", *_PARTS, "minutes")]
    numbers = shown[1:]
    # A gap before each group of columns.
    opens = [i == 0 or c.group != numbers[i - 1].group for i, c in enumerate(numbers)]
    widths = [max(map(len, (c.name, *c.cells))) + 1 + new for c, new in zip(numbers, opens, strict=True)]
    groups = [c.group for c in numbers]
    for i, group in enumerate(groups):
        if groups.count(group) == 1:
            groups[i] = _SHORT.get(group, group)
            widths[i] = max(widths[i], len(groups[i]) + 2)
    spans = _spans(groups, widths)
    room = max(width - sum(widths), 8)
    names = [textwrap.wrap(name, room) or [""] for name in shown[0].cells]
    first = max(map(len, ("Stage", *(part for name in names for part in name))))
    lines = [
        " " * first + "".join(f"{group:>{size}}" for group, size in spans),
        f"{'Stage':<{first}}" + _row([c.name for c in numbers], widths),
    ]
    for i, (head, *rest) in enumerate(names):
        lines += [f"{head:<{first}}" + _row([c.cells[i] for c in numbers], widths), *rest]
    return "\n".join(line.rstrip() for line in lines)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _spans(groups: Sequence[str], widths: Sequence[int]) -> list[tuple[str, int]]:
    """Each run of columns of one group, with its width."""
    runs = itertools.groupby(zip(groups, widths, strict=True), key=lambda item: item[0])
    return [(group, sum(width for _, width in run)) for group, run in runs]


def comparisons(stages: Mapping[str, Any], results: Mapping[str, Any]) -> list[Comparison]:
    """For each stage with a teacher, the stage that trains the same model alone, if there is one.

    The same model: equal `model`, `temporal` and `num_frames`. Of several, the one whose config is nearest.
    """
    alike = ("model", "temporal", "num_frames")
    found = []
    for name in results:
        stage = stages.get(name, {})
        if not stage.get("teacher"):
            continue
        near = [
            (_differences(stages[other], stage), other)
            for other in results
            if other in stages
            and not stages[other].get("teacher")
            and all(stages[other].get(field) == stage.get(field) for field in alike)
        ]
        if near:
            differences, alone = min(near, key=lambda item: len(item[0]))
            found.append(Comparison(alone, name, stage["teacher"], differences))
    return found


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    fields = (a.keys() | b.keys()) - {"title", "teacher", "terms"}
    return tuple(sorted(field for field in fields if a.get(field) != b.get(field)))


def gain_lines(stages: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each comparison: what the teacher gained or lost in R@1 and R@10, both ways."""
    lines = []
    for pair in comparisons(stages, results):
        before, after = results[pair.alone]["test"], results[pair.distilled]["test"]
        said = [
            f"{way} " + ", ".join(change(f"{prefix}_{k}", k, before, after) for k in ("R@1", "R@10"))
            for prefix, way in _DIRECTIONS.items()
        ]
        line = (
            f"{title(stages, pair.distilled)} (taught by {title(stages, pair.teacher)}) compared with "
            f"{title(stages, pair.alone)}: {'; '.join(said)}."
        )
        if pair.differences:
            line += f" The two also differ in: {', '.join(pair.differences)}."
        lines.append(line)
    return lines


def change(key: str, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What became of a metric: "R@1 gained 1.2 points (10.0 to 11.2)"."""
    was, now = round(before[key], 1), round(after[key], 1)  # as in the table
    by = round(now - was, 1)
    said = f"{'gained' if by > 0 else 'lost'} {abs(by):.1f} points" if by else "unchanged"
    return f"{name} {said} ({was:.1f} to {now:.1f})"
