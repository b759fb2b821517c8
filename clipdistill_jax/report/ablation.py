"""What a sweep came to: mean and deviation over seeds beside CLIPPING's numbers, and which orderings hold."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from clipdistill_jax.report import poster
from clipdistill_jax.sweep import FAILED, ROW, SHARED

# Metrics that are shown and judged -> their heading. The poster gives R@1 alone.
METRICS = {"t2v_R@1": "t2v R@1", "v2t_R@1": "v2t R@1", "t2v_R@10": "t2v R@10", "v2t_R@10": "v2t R@10"}
HOLDS, UNTOLD, REVERSED = "holds", "not told apart", "reversed"
ONE_SEED, NOT_RUN = "one seed", "not run"
NONE = "-"


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric of a row over its seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


Scores = Mapping[str, Mapping[str, Score]]  # row -> metric -> score


def read_sweep(workdir: Path) -> tuple[dict[str, dict[str, Score]], list[str]]:
    """The scores of every row of a sweep, in the poster's order, others behind; and a line for each failure.

    Raises:
      FileNotFoundError: nothing is finished there.
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    for file in sorted((*workdir.glob(f"{SHARED}/{ROW}"), *workdir.glob(f"*/seed*/{ROW}"))):
        said = json.loads(file.read_text())
        found.setdefault(said["row"], []).append(said["test"])
    if not found:
        raise FileNotFoundError(f"{workdir}: no finished row of a sweep ({SHARED}/{ROW}, ROW/seedN/{ROW})")
    known = [row.name for row in poster.ROWS]
    order = sorted(found, key=lambda row: known.index(row) if row in known else len(known))
    scores = {row: {m: Score(tuple(float(test[m]) for test in found[row])) for m in METRICS} for row in order}
    return scores, failed_rows(workdir)


def numbers(scores: Scores) -> dict[str, dict[str, list[float]]]:
    """The scores, json-able: row -> metric -> a value a seed."""
    return {row: {m: list(score.values) for m, score in found.items()} for row, found in scores.items()}


def failed_rows(workdir: Path) -> list[str]:
    """A line for each row of a sweep that failed."""
    lines = []
    for file in sorted((*workdir.glob(f"{SHARED}/{FAILED}"), *workdir.glob(f"*/seed*/{FAILED}"))):
        said = json.loads(file.read_text())
        lines.append(f"{said['row']}, seed {said['seed']} failed: {said['error']}")
    return lines


def pooled_error(a: Sequence[float | int], b: Sequence[float | int]) -> float | None:
    """Standard error of the difference of two means, with one variance for both; None of two single values.

    It is s sqrt(1/n_a + 1/n_b) with s^2 = (sum (a_i - mean a)^2 + sum (b_i - mean b)^2) / (n_a + n_b - 2).
    """
    freedom = len(a) + len(b) - 2
    if not freedom:
        return None
    squares = sum((x - statistics.fmean(group)) ** 2 for group in (a, b) for x in group)
    return math.sqrt(squares / freedom * (1 / len(a) + 1 / len(b)))


def judge(lower: Sequence[float | int], higher: Sequence[float | int]) -> tuple[str, float, float | None]:
    """(verdict, difference of the means, pooled standard error) of the claim that `higher` is above `lower`.

    "holds" where its mean is higher by more than one pooled standard error, "reversed" where it is lower by
    more than that, else "not told apart"; "one seed" where both have one, so that no error is known.
    """
    difference = statistics.fmean(higher) - statistics.fmean(lower)
    error = pooled_error(lower, higher)
    if error is None:
        return ONE_SEED, difference, None
    if abs(difference) <= error:
        return UNTOLD, difference, error
    return HOLDS if difference > 0 else REVERSED, difference, error


def score_cells(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the first table."""
    published = {row.name: row for row in poster.ROWS}
    headings = ["row", "seeds", *METRICS.values(), "poster t2v R@1", "poster v2t R@1", "poster's tables"]
    rows = []
    for name, metrics in scores.items():
        seeds = len(next(iter(metrics.values())).values)
        cells = [name, str(seeds), *(str(metrics[m]) for m in METRICS)]
        row = published.get(name)
        said = (row.t2v, row.v2t) if row else (None, None)
        cells += [NONE if value is None else f"{value:.1f}" for value in said]
        rows.append([*cells, ", ".join(row.tables) if row else NONE])
    return headings, rows


def ordering_cells(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the second table: a claim of the poster a row, with a verdict for each metric."""
    published = {row.name: row for row in poster.ROWS}
    rows = []
    for claim in poster.ORDERINGS:
        gap = published[claim.higher].t2v - published[claim.lower].t2v
        cells = [f"{claim.lower} < {claim.higher}", claim.table, f"{gap:+.1f}"]
        for metric in METRICS:
            if claim.lower not in scores or claim.higher not in scores:
                cells.append(NOT_RUN)
                continue
            cells.append(verdict_cell(scores[claim.lower][metric], scores[claim.higher][metric]))
        rows.append(cells)
    return ["ordering", "of", "poster t2v", *METRICS.values()], rows


def summary(scores: Scores) -> list[str]:
    """A sentence a metric: how many orderings hold, are not told apart, are reversed; and what that means."""
    pairs = [(c.lower, c.higher) for c in poster.ORDERINGS if c.lower in scores and c.higher in scores]
    lines = [f"{heading}: {tally(scores, metric, pairs, 'poster')}" for metric, heading in METRICS.items()]
    once = (
        "The teacher is trained once, so its own deviation is not known; the data is the same for all seeds."
    )
    return [*lines, f"{what_holds('poster')} {once}"]


def verdict_cell(lower: Score, higher: Score) -> str:
    """The verdict on a claim with the difference and its error, e.g. "holds (+1.4 ± 0.8)"."""
    verdict, difference, error = judge(lower.values, higher.values)
    return f"{verdict} ({difference:+.1f}" + (")" if error is None else f" ± {error:.1f})")


def tally(scores: Scores, metric: str, pairs: Iterable[tuple[str, str]], source: str) -> str:
    """How many orderings of a source, (lower, higher) rows that are there, have each verdict."""
    by: dict[str, list[str]] = {HOLDS: [], UNTOLD: [], REVERSED: [], ONE_SEED: []}
    for lower, higher in pairs:
        verdict, *_ = judge(scores[lower][metric].values, scores[higher][metric].values)
        by[verdict].append(f"{lower} < {higher}")
    holding, untold, reversed_ = (len(by[verdict]) for verdict in (HOLDS, UNTOLD, REVERSED))
    if not holding + untold + reversed_:
        return "one seed does not tell which orderings hold."
    named = f": {', '.join(by[REVERSED])}" if reversed_ else ""
    return (
        f"of the {source}'s {holding + untold + reversed_} orderings {holding} hold{'s' * (holding == 1)}, "
        f"{untold} {'is' if untold == 1 else 'are'} not told apart, "
        f"{reversed_} {'is' if reversed_ == 1 else 'are'} reversed{named}."
    )


def what_holds(source: str) -> str:
    """What the verdicts mean, of orderings that a source claims."""
    return (
        f"An ordering holds where the means differ as the {source}'s do by more than one pooled standard "
        "error, and is reversed where they differ the other way by more than that. One standard error is a "
        "low bar: with three seeds more than a third of the pairs that do not differ pass it, one way or the "
        "other."
    )


def report(workdir: Path) -> tuple[list[Table], list[str]]:
    """The tables and lines of a sweep; writes them to workdir/ablation.md too.

    Raises:
      FileNotFoundError: nothing is finished there.
    """
    scores, failures = read_sweep(workdir)
    parts = [
        ("Rows: mean ± deviation over seeds, in percent", *score_cells(scores)),
        ("Orderings of the poster", *ordering_cells(scores)),
    ]
    lines = [*summary(scores), *failures]
    written = [f"{title}\n\n{markdown_table(headings, rows)}" for title, headings, rows in parts]
    (workdir / "ablation.md").write_text("\n\n".join([*written, *lines]) + "\n", encoding="utf-8")
    return [rich_table(*part) for part in parts], lines


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown, words in its first column."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('<', '&lt;') for cell in cells)} |"

    return "\n".join(line(row) for row in (headings, [":--"] + ["--:"] * (len(headings) - 1), *rows))


def rich_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The same for the terminal."""
    made = Table(title=title)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        made.add_row(*row)
    return made
