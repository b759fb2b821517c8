"""What CLIP-TD's methods came to over seeds, beside the paper's numbers, and which of its orderings hold."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
_KINDS = frozenset(("Q->A", "QA->R"))  # metrics of VCR's questions of one kind


class Result(NamedTuple):
    """What a method came to with a seed: its folder, test metrics, the run's config and that of its stage."""

    method: str
    seed: int
    folder: Path
    test: Mapping[str, float]
    config: Mapping[str, Any]
    stage: Mapping[str, Any]


class Methods(NamedTuple):
    """What is found in a folder.

    Attributes:
      table: of the paper, to stand beside.
      scores: method -> metric -> score, in the table's order; other methods behind.
      shots: that all learned from; 0 for all questions, None where no config says it.
      failures: a line for each row of a sweep that failed.
    """

    table: PaperTable
    scores: dict[str, dict[str, Score]]
    shots: int | None
    failures: list[str]


def read_methods(workdir: Path, name: str = "") -> Methods:
    """The scores of every method.

    A stage that answers questions is a method: that of its title where this is one of the paper's, else that
    of the sweep's row, or its own name. Models of one method and seed for different questions, as VL-BERT's
    two of VCR, make one row.

    Args:
      workdir: of a sweep (METHOD/seedN/row.json), of a run (STAGE/result.json), or a folder of runs
        (RUN/STAGE/result.json, or METHOD/seedN/STAGE/result.json).
      name: of the paper's table, a key of `paper_tables.TABLES`; "" takes that of the data and the student.

    Raises:
      FileNotFoundError: nothing that answers questions is finished there.
      ValueError: there is no such table; the methods had different shots or models, or have no metric in
        common; two results are of one method and seed.
    """
    found = _finished(workdir)
    if not found:
        raise FileNotFoundError(
            f"{workdir}: no finished method ({ROW}, or {_RESULT} of a stage that answers questions)"
        )
    tests: dict[str, list[Mapping[str, float]]] = {}
    seen: dict[tuple[Any, ...], Path] = {}
    shots: dict[int, str] = {}
    models: dict[str, str] = {}
    for result in found:
        method, kinds = result.method, _KINDS.intersection(result.test)
        other = seen.setdefault((method, result.seed, kinds), result.folder)
        if other != result.folder:
            raise ValueError(
                f"{other} and {result.folder} are both of the method {method!r} and the seed {result.seed}: "
                "report them apart, or let the title of its stage name another method"
            )
        tests.setdefault(method, []).append(result.test)
        if "protocol" in result.stage:
            shots[0 if result.stage["protocol"] == "full" else int(result.stage["shots"])] = method
        if model := _model(result):
            models[model] = method
    if len(shots) > 1:
        said = ", ".join(f"{method} {count or 'all'}" for count, method in sorted(shots.items()))
        raise ValueError(f"{workdir}: the methods learned from different numbers of questions: {said}")
    if len(models) > 1:
        said = ", ".join(f"{method} {model}" for model, method in sorted(models.items()))
        raise ValueError(f"{workdir}: the methods are those of different models: {said}")
    table = _table(name, next(iter(models), ""))
    known = [row.name for row in table.rows]
    order = sorted(tests, key=lambda name: known.index(name) if name in known else len(known))
    metrics = _metrics(list(tests.values()))
    if not metrics:
        raise ValueError(f"{workdir}: the methods have no metric in common")
    scores = {
        method: {m: Score(tuple(float(test[m]) for test in tests[method] if m in test)) for m in metrics}
        for method in order
    }
    return Methods(table, scores, next(iter(shots), None), failed_rows(workdir))


def _finished(workdir: Path) -> list[Result]:
    """The results that answer questions, of a sweep and of runs."""
    made = []
    for file in sorted(workdir.glob(f"*/seed*/{ROW}")):
        said = json.loads(file.read_text())
        made.append(_result(said["row"], file.parent, said, said.get("config") or {}))
    for pattern in ("*", "*/*", "*/*/*"):
        for file in sorted(workdir.glob(f"{pattern}/{_RESULT}")):
            if (file.parents[1] / ROW).exists():
                continue  # the sweep's row says the same
            said, config = json.loads(file.read_text()), file.with_name(_CONFIG)
            settings = json.loads(config.read_text()) if config.exists() else {}
            made.append(_result(said["stage"], file.parent, said, settings))
    return [result for result in made if "accuracy" in result.test]


def _result(name: str, folder: Path, said: Mapping[str, Any], config: Mapping[str, Any]) -> Result:
    stage = config.get("stages", {}).get(said["stage"], {})
    methods = {row.name for table in paper_tables.TABLES.values() for row in table.rows}
    title = stage.get("title", "")
    method = title if title in methods else name
    return Result(method, said["seed"], folder, said["test"], config, stage)


def _model(result: Result) -> str:
    """Data and student, such as vcr/villa_large; "" where no config says it."""
    if "student" not in result.config:
        return ""
    student = result.config["student"]
    kind = "villa" if result.stage.get("adversarial") else student["kind"]
    size = f"_{student['preset']}" if student.get("preset") else ""
    return f"{result.config['data']['format']}/{kind}{size}"


def _table(name: str, model: str) -> PaperTable:
    """The table of that name; or of a model, where the paper has none VL-BERT's, which has the most rows."""
    tables = paper_tables.TABLES
    if name and name not in tables:
        raise ValueError(f"there is no table {name!r}; there is {', '.join(tables)}")
    task = model.partition("/")[0] or "vcr"
    keys = (name, model, model.rpartition("_")[0], f"{task}/vl_bert")
    return tables[next(key for key in keys if key in tables)]


def _metrics(tests: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    """Those that every method has; "accuracy" only where it is of questions of the same kinds, not of one."""
    every = [test for found in tests for test in found]
    mixed = len({kind in test for kind in _KINDS for test in every}) > 1
    common = [m for m in OVERALL if all(any(m in test for test in found) for found in tests)]
    return [m for m in common if m != "accuracy" or not mixed]


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
    """A sentence a metric: how many orderings hold, are not told apart, are reversed; and what that means.

    Nothing where no two methods are there that the paper orders.
    """
    pairs = [(claim.lower, claim.higher) for claim, _ in _claims(scores, table, column)]
    if not pairs:
        return []
    lines = [f"{OVERALL[m]}: {tally(scores, m, pairs, 'paper')}" for m in next(iter(scores.values()))]
    once = "The paper gives one number a method, so its own deviation is not known."
    return [*lines, f"{what_holds('paper')} {once}"]


def report(workdir: Path, name: str = "") -> tuple[list[Table], list[str]]:
    """The tables and lines of the methods in a folder; writes them to workdir/clip_td.md too.

    Args:
      workdir, name: as for `read_methods`.

    Raises:
      FileNotFoundError, ValueError: as `read_methods`.
    """
    table, scores, shots, failures = read_methods(workdir, name)
    column = table.column(shots or 0)
    parts: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        (f"Mean ± deviation over seeds, in percent, beside {table.title}", *score_cells(scores, table)),
    ]
    headings, rows = ordering_cells(scores, table, column)
    parts += [("Orderings of the paper", headings, rows)] if rows else []
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
