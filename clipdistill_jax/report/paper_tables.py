"""The numbers that CLIP-TD (Wang et al. 2022) published, from its tables; all on validation, in percent.

Rows are named as the METHOD of configs/clip_td. VCR's numbers are of Q->A: Table 7 has the same as "Q2A".
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Row:
    """A trained model.

    Attributes:
      name: of the method.
      label: what the paper says of it.
      values: accuracy in each of the table's columns.
      tables: where it stands. The tables agree wherever a row stands in several.
    """

    name: str
    label: str
    values: tuple[float, ...]
    tables: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """The rows of one student on one task.

    Attributes:
      title: of both.
      columns: training questions of each column -> shots that are drawn of each group; 0 is all.
    """

    title: str
    columns: Mapping[str, int]
    rows: tuple[Row, ...]

    def column(self, shots: int) -> str:
        """The column with so many shots; of numbers that the paper has not, the next above."""
        exact = {count: name for name, count in self.columns.items()}
        above = sorted(count for count in exact if count >= shots)
        return exact[shots] if shots in exact else exact[above[0]] if above else exact[0]

    def value(self, name: str, column: str) -> float | None:
        """A row's accuracy; None where the paper has no such row."""
        found = [row for row in self.rows if row.name == name]
        return found[0].values[list(self.columns).index(column)] if found else None


@dataclasses.dataclass(frozen=True)
class Ordering:
    """A claim of the paper: method `higher` is right more often than method `lower`."""

    lower: str
    higher: str
    claim: str


_VCR = {"700": 100, "7000": 1000, "full": 0}  # 100 and 1000 questions of each of seven categories
_SNLI_VE = {"3,000": 1000, "30,000": 10_000, "full": 0}  # pairs of each of three labels
_VQA = {"100": 100, "1,000": 1000, "full": 0}


def _rows(tables: str, **values: tuple[float, float, float]) -> tuple[Row, ...]:
    labels = {"baseline": "Baseline", "naive": "Naive VL", "clip_td": "CLIP-TD"}
    return tuple(Row(name, labels[name], found, (tables,)) for name, found in values.items())


# The teacher is CLIP B/32 in VCR's first two tables, else B/16.
TABLES = {
    "vcr/vl_bert": PaperTable(
        "VCR, VL-BERT",
        _VCR,
        (
            Row("baseline", "no distillation", (30.85, 57.59, 76.02), ("Table 1", "Table 8")),
            Row("naive_v", "Naive Vision (V)", (40.13, 55.23, 76.28), ("Table 2",)),
            Row("naive_l", "Naive Language (L)", (44.07, 57.86, 76.57), ("Table 2",)),
            Row("naive", "Naive VL, weight 0.05", (45.18, 58.91, 76.74), ("Table 1", "Table 2", "Table 8")),
            Row("naive_w1", "Naive VL, weight 1.0", (35.39, 58.57, 76.4), ("Table 8",)),
            Row("naive_w05", "Naive VL, weight 0.5", (37.20, 58.96, 76.42), ("Table 8",)),
            Row("naive_w01", "Naive VL, weight 0.1", (40.47, 58.72, 76.62), ("Table 8",)),
            Row("naive_w001", "Naive VL, weight 0.01", (42.31, 58.65, 76.23), ("Table 8",)),
            Row("rts", "VL Random Token Selective, 2", (40.21, 57.24, 75.34), ("Table 2", "Table 8")),
            Row("ts", "VL Token Selective, 2", (46.28, 59.68, 77.08), ("Table 2", "Table 8")),
            Row("ts_1", "VL Token Selective, 1", (45.24, 58.88, 76.71), ("Table 8",)),
            Row("ts_3", "VL Token Selective, 3", (45.84, 59.07, 76.87), ("Table 8",)),
            Row("cw", "VL Confidence Weighted, all choices", (46.54, 58.93, 76.84), ("Table 2", "Table 8")),
            Row("cw_correct", "VL Confidence Weighted, correct only", (46.14, 58.27, 76.66), ("Table 8",)),
            Row("stage2", "2nd-stage Pretraining", (38.32, 58.13, 76.38), ("Table 8",)),
            Row("af", "VL Adaptive Finetune", (46.02, 59.23, 76.93), ("Table 2", "Table 8")),
            Row("clip_td", "VL AF + TS + CW", (46.74, 59.98, 77.24), ("Table 1", "Table 2", "Table 8")),
        ),
    ),
    "vcr/uniter_base": PaperTable(
        "VCR, UNITER base",
        _VCR,
        _rows(
            "Table 1",
            baseline=(31.31, 57.02, 74.23),
            naive=(39.32, 57.23, 75.21),
            clip_td=(45.58, 58.42, 76.35),
        ),
    ),
    "vcr/uniter_large": PaperTable(
        "VCR, UNITER large",
        _VCR,
        _rows("Table 1", baseline=(31.43, 58.24, 76.67), clip_td=(46.23, 59.47, 77.05)),
    ),
    "vcr/villa": PaperTable(
        "VCR, VILLA",
        _VCR,
        _rows("Table 1", baseline=(34.84, 59.13, 78.27), clip_td=(46.95, 60.13, 78.86)),
    ),
    "snli_ve/vl_bert": PaperTable(
        "SNLI-VE, VL-BERT",
        _SNLI_VE,
        _rows(
            "Table 5",
            baseline=(53.28, 62.31, 74.66),
            naive=(56.02, 64.92, 75.08),
            clip_td=(56.78, 65.37, 75.75),
        ),
    ),
    "snli_ve/uniter_base": PaperTable(
        "SNLI-VE, UNITER base",
        _SNLI_VE,
        _rows(
            "Table 5",
            baseline=(57.13, 65.52, 78.53),
            naive=(58.24, 66.01, 78.95),
            clip_td=(58.27, 66.16, 78.96),
        ),
    ),
    "snli_ve/uniter_large": PaperTable(
        "SNLI-VE, UNITER large",
        _SNLI_VE,
        _rows(
            "Table 5",
            baseline=(58.36, 66.23, 79.02),
            naive=(58.95, 67.74, 80.08),
            clip_td=(59.42, 68.34, 80.14),
        ),
    ),
    "snli_ve/villa": PaperTable(
        "SNLI-VE, VILLA",
        _SNLI_VE,
        _rows("Table 5", baseline=(58.47, 67.16, 79.64), clip_td=(59.65, 68.43, 80.67)),
    ),
    "vqa/vl_bert": PaperTable(
        "VQA, VL-BERT",
        _VQA,
        _rows(
            "Table 6",
            baseline=(35.33, 63.29, 69.05),
            naive=(36.83, 64.43, 70.22),
            clip_td=(37.12, 65.71, 71.42),
        ),
    ),
    "vqa/uniter_large": PaperTable(
        "VQA, UNITER large",
        _VQA,
        _rows(
            "Table 6",
            baseline=(36.46, 64.43, 71.26),
            naive=(38.95, 65.17, 71.56),
            clip_td=(39.75, 65.93, 71.94),
        ),
    ),
    "vqa/villa": PaperTable(
        "VQA, VILLA",
        _VQA,
        _rows("Table 6", baseline=(37.18, 65.75, 72.11), clip_td=(40.16, 66.93, 73.02)),
    ),
}

# Each holds in every column of every table that has both rows, to the paper's last digit.
ORDERINGS = (
    Ordering("baseline", "naive", "distillation helps"),
    Ordering("baseline", "naive_l", "distillation helps"),
    Ordering("naive_v", "naive_l", "language gives more than vision (5.1)"),
    Ordering("naive_v", "naive", "both are better than one (5.1)"),
    Ordering("naive_l", "naive", "both are better than one (5.1)"),
    Ordering("rts", "ts", "selected words, not random ones (5.1)"),
    Ordering("ts_1", "ts", "two words are best (9.2)"),
    Ordering("ts_3", "ts", "two words are best (9.2)"),
    Ordering("cw_correct", "cw", "all choices, not the right one alone (9.2)"),
    Ordering("naive", "ts", "each component helps (5.1)"),
    Ordering("naive", "cw", "each component helps (5.1)"),
    Ordering("naive", "af", "each component helps (5.1)"),
    Ordering("baseline", "stage2", "Table 8"),
    Ordering("stage2", "af", "Table 8"),
    Ordering("ts", "clip_td", "together they are best (5.1)"),
    Ordering("cw", "clip_td", "together they are best (5.1)"),
    Ordering("af", "clip_td", "together they are best (5.1)"),
    Ordering("naive", "clip_td", "CLIP-TD is better than naive distillation (5.1)"),
    Ordering("baseline", "clip_td", "CLIP-TD is better than no distillation (5.1)"),
)
