"""What CLIP-TD's methods came to over seeds, beside the paper's numbers, and which of its orderings hold."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from clipdistill_jax.report import paper_tables
from clipdistill_jax.report.ablation import (
    NONE,
    Score,
    Scores,
    failed_rows,
    markdown_table,
    rich_table,
    tally,
    verdict_cell,
    what_holds,
)
from clipdistill_jax.report.answers import OVERALL
from clipdistill_jax.report.paper_tables import PaperTable
from clipdistill_jax.sweep import ROW

FILE = "clip_td.md"
_RESULT, _CONFIG = "result.json", "config.json"


def read_methods(
    workdir: Path, table: PaperTable
) -> tuple[dict[str, dict[str, Score]], int | None, list[str]]:
    """The scores of every method, how many shots they had, and a line for each failure.

    Args:
      workdir: of a sweep (METHOD/seedN/row.json), of one run whose stages are methods (METHOD/result.json),
        or a folder of such runs, one a seed (seedN/METHOD/result.json).
      table: sets the order; other methods come behind.

    Returns:
      Method -> metric -> score; shots, 0 for all questions and None where no config says it; failures.

    Raises:
      FileNotFoundError: nothing that answers questions is finished there.
      ValueError: the methods had different shots.
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    shots: dict[int, str] = {}
    for name, stage, test, config in _finished(workdir):
        if "accuracy" not in test:
            continue
        found.setdefault(name, []).append(test)
        settings = config.get("stages", {}).get(stage, {})
        if "protocol" in settings:
            shots[0 if settings["protocol"] == "full" else int(settings["shots"])] = name
    if not found:
        raise FileNotFoundError(
            f"{workdir}: no finished method (METHOD/seedN/{ROW}, METHOD/{_RESULT} or seedN/METHOD/{_RESULT})"
        )
    if len(shots) > 1:
        said = ", ".join(f"{name} {count or 'all'}" for count, name in sorted(shots.items()))
        raise ValueError(f"{workdir}: the methods learned from different numbers of questions: {said}")
    known = [row.name for row in table.rows]
    order = sorted(found, key=lambda name: known.index(name) if name in known else len(known))
    metrics = [
        metric for metric in OVERALL if all(metric in test for tests in found.values() for test in tests)
    ]
    if len(metrics) == 2 and all(test[metrics[0]] == test[metrics[1]] for t in found.values() for test in t):
        del metrics[0]  # questions of one kind: all of them is the same
    scores = {
        name: {m: Score(tuple(float(test[m]) for test in found[name])) for m in metrics} for name in order
    }
    return scores, next(iter(shots), None), failed_rows(workdir)


def _finished(workdir: Path) -> list[tuple[str, str, Mapping[str, float], Mapping[str, Any]]]:
    """(method, its stage, test metrics, config) of each result; a sweep's are named by their row."""
    made = []
    for file in sorted(workdir.glob(f"*/seed*/{ROW}")):
        said = json.loads(file.read_text())
        made.append((said["row"], said["stage"], said["test"], said.get("config") or {}))
    for file in sorted((*workdir.glob(f"*/{_RESULT}"), *workdir.glob(f"seed*/*/{_RESULT}"))):
        said, config = json.loads(file.read_text()), file.with_name(_CONFIG)
        settings = json.loads(config.read_text()) if config.exists() else {}
        made.append((said["stage"], said["stage"], said["test"], settings))
    return made


def score_cells(scores: Scores, table: PaperTable) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the first table."""
    metrics = list(next(iter(scores.values())))
    tables = {row.name: ", ".join(row.tables) for row in table.rows}
    headings = ["method", "seeds", *(OVERALL[m] for m in metrics), *(f"paper, {c}" for c in table.columns)]
    rows = []
    for name, found in scores.items():
        values = [table.value(name, column) for column in table.columns]
        published = [NONE if value is None else f"{value:.2f}" for value in values]
        seeds = str(len(found[metrics[0]].values))
        rows.append([name, seeds, *(str(found[m]) for m in metrics), *published, tables.get(name, NONE)])
    return [*headings, "paper's tables"], rows


def ordering_cells(scores: Scores, table: PaperTable, column: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the second table: a claim of the paper a row, with a verdict for each metric.

    Claims about methods that are not there are left out.
    """
    metrics, rows = list(next(iter(scores.values()))), []
    for claim, gap in _claims(scores, table, column):
        cells = [f"{claim.lower} < {claim.higher}", claim.claim, f"{gap:+.2f}"]
        rows.append(
            [*cells, *(verdict_cell(scores[claim.lower][m], scores[claim.higher][m]) for m in metrics)]
        )
    return ["ordering", "claim", f"paper, {column}", *(OVERALL[m] for m in metrics)], rows


def _claims(scores: Scores, table: PaperTable, column: str) -> list[tuple[paper_tables.Ordering, float]]:
    """The paper's orderings of methods that are there, each with the gap in a column of its table."""
    found = []
    for claim in paper_tables.ORDERINGS:
        low, high = (table.value(name, column) for name in (claim.lower, claim.higher))
        if low is not None and high is not None and {claim.lower, claim.higher} <= scores.keys():
            found.append((claim, high - low))
    return found


def summary(scores: Scores, table: PaperTable, column: str) -> list[str]:
    """A sentence a metric: how many orderings hold, are not told apart, are reversed; and what that means."""
    pairs = [(claim.lower, claim.higher) for claim, _ in _claims(scores, table, column)]
    lines = [f"{OVERALL[m]}: {tally(scores, m, pairs, 'paper')}" for m in next(iter(scores.values()))]
    once = "The paper gives one number a method, so its own deviation is not known."
    return [*lines, f"{what_holds('paper')} {once}"]


def report(workdir: Path, name: str) -> tuple[list[Table], list[str]]:
    """The tables and lines of the methods in a folder; writes them to workdir/clip_td.md too.

    Args:
      workdir: as for `read_methods`.
      name: of the paper's table, a key of `paper_tables.TABLES`.

    Raises:
      FileNotFoundError, ValueError: as `read_methods`; there is no such table.
    """
    if name not in paper_tables.TABLES:
        raise ValueError(f"there is no table {name!r}; there is {', '.join(paper_tables.TABLES)}")
    table = paper_tables.TABLES[name]
    scores, shots, failures = read_methods(workdir, table)
    column = table.column(shots or 0)
    parts: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        (f"Mean ± deviation over seeds, in percent, beside {table.title}", *score_cells(scores, table)),
        ("Orderings of the paper", *ordering_cells(scores, table, column)),
    ]
    missing = [row.name for row in table.rows if row.name not in scores]
    lines = [*summary(scores, table, column), _said(shots, table, column), *failures]
    if missing:
        lines.append(f"Not run, of the paper's methods: {', '.join(missing)}.")
    written = [f"{title}\n\n{markdown_table(headings, rows)}" for title, headings, rows in parts]
    (workdir / FILE).write_text("\n\n".join([*written, *lines]) + "\n", encoding="utf-8")
    return [rich_table(*part) for part in parts], lines


def _said(shots: int | None, table: PaperTable, column: str) -> str:
    if shots is None:
        return (
            f"No config says how many questions were learned from; the paper's column {column!r} is compared."
        )
    had, theirs = (f"{n:,} questions of each group" if n else "all" for n in (shots, table.columns[column]))
    return f"Each method learned from {had}; the paper's column {column!r} ({theirs}) is compared."
