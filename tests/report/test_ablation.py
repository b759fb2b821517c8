"""The report of a sweep on made-up results: means, deviations, orderings with their edge cases."""

import json
import math

import numpy as np
import pytest

from clipdistill_jax.report import poster
from clipdistill_jax.report.__main__ import main
from clipdistill_jax.report.ablation import (
    HOLDS,
    NOT_RUN,
    ONE_SEED,
    REVERSED,
    UNTOLD,
    Score,
    judge,
    ordering_cells,
    pooled_error,
    read_sweep,
    report,
    score_cells,
)


def test_the_posters_tables_agree_with_themselves():
    names = [row.name for row in poster.ROWS]
    assert len(set(names)) == len(names)
    by_name = {row.name: row for row in poster.ROWS}
    for claim in poster.ORDERINGS:
        lower, higher = by_name[claim.lower], by_name[claim.higher]
        assert lower.t2v < higher.t2v and lower.v2t < higher.v2t
    # The sums of Table 2 that its Table 1 prints: to 0.1M where a reading exists.
    printed = poster.READINGS["as printed"]
    for (text, temporal), total in poster.TOTALS.items():
        parts = ["vision", text, *(["temporal"] if temporal else [])]
        agrees = abs(sum(printed[part].parameters for part in parts) - total) < 0.15e6
        assert agrees == ((text, temporal) != ("clip", False))


def test_the_pooled_error_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 1, 3), rng.normal(4, 1, 5)
    listed = a.tolist(), b.tolist()
    variance = (a.var(ddof=1) * 2 + b.var(ddof=1) * 4) / 6
    assert pooled_error(*listed) == pytest.approx(math.sqrt(variance * (1 / 3 + 1 / 5)), rel=1e-12)
    # A group of one has no variance of its own; the other's is taken.
    assert pooled_error(listed[0], [5.0]) == pytest.approx(a.std(ddof=1) * math.sqrt(1 / 3 + 1), rel=1e-12)
    assert pooled_error([1.0], [5.0]) is None


@pytest.mark.parametrize(
    "lower, higher, verdict",
    [
        ([1, 2, 3], [4, 5, 6], HOLDS),
        ([4, 5, 6], [1, 2, 3], REVERSED),
        ([1, 2, 3], [1.5, 2.5, 3.5], UNTOLD),  # 0.5 apart, error 0.82
        ([1, 2, 3], [1, 2, 3], UNTOLD),
        ([2, 2, 2], [2, 2, 2], UNTOLD),  # no deviation and no difference
        ([2, 2, 2], [2.1, 2.1, 2.1], HOLDS),  # no deviation, any difference is more
        ([1], [9], ONE_SEED),  # one seed each: nothing is known of the deviation
        ([1, 2, 3], [9], HOLDS),  # the teacher is trained once
        ([0, 2], [1, 3], UNTOLD),  # 1 apart, error sqrt(2)
    ],
)
def test_verdicts(lower, higher, verdict):
    said, difference, error = judge(lower, higher)
    assert difference == pytest.approx(np.mean(higher) - np.mean(lower), abs=1e-12)
    assert said == verdict and (error is None) == (len(lower) == len(higher) == 1)


def test_the_edge_is_not_more():
    # Deviations 0 and 2: pooled variance 1, error sqrt(1 * (1/2 + 1/2)) = 1, exactly.
    assert pooled_error([3.0, 3.0], [3.0, 5.0]) == 1.0
    assert judge([3.0, 3.0], [3.0, 5.0])[0] == UNTOLD
    assert judge([3.0, 3.0], [3.0 + 2**-20, 5.0 + 2**-20])[0] == HOLDS
    assert judge([3.0, 5.0], [3.0 - 2**-20, 3.0 - 2**-20])[0] == REVERSED


def test_how_a_score_is_written():
    assert str(Score((1.0, 2.0, 3.0))) == "2.0 ± 1.0"
    assert str(Score((2.25,))) == "2.2"


def put(workdir, row, seed, recall):
    folder = workdir / "shared" if row == "teacher" else workdir / row / f"seed{seed}"
    folder.mkdir(parents=True)
    keys = ("t2v_R@1", "v2t_R@1", "t2v_R@10", "v2t_R@10")
    test = {key: recall + i for i, key in enumerate(keys)} | {"t2v_MdR": 5.0}
    (folder / "row.json").write_text(json.dumps({"row": row, "seed": seed, "test": test}))


@pytest.fixture
def swept(tmp_path):
    put(tmp_path, "teacher", 0, 20.0)
    for seed, (alone, t, t_s) in enumerate([(1.0, 3.0, 2.0), (1.2, 3.2, 2.2), (1.1, 3.1, 2.1)]):
        put(tmp_path, "alone", seed, alone)
        put(tmp_path, "T", seed, t)
        put(tmp_path, "T_S", seed, t_s)
    put(tmp_path, "ours", 0, 9.0)
    folder = tmp_path / "T_S_TAB" / "seed1"
    folder.mkdir(parents=True)
    failed = {"row": "T_S_TAB", "seed": 1, "error": "RuntimeError: exit status 1"}
    (folder / "failed.json").write_text(json.dumps(failed))
    return tmp_path


def test_rows_stand_in_the_posters_order_with_its_numbers(swept):
    scores, failures = read_sweep(swept)
    assert list(scores) == ["teacher", "alone", "T", "T_S", "ours"]
    assert failures == ["T_S_TAB, seed 1 failed: RuntimeError: exit status 1"]
    headings, rows = score_cells(scores)
    assert all(len(row) == len(headings) for row in rows)
    assert rows[0][:3] == ["teacher", "1", "20.0"] and rows[0][6:8] == ["44.5", "42.2"]
    assert rows[1][:4] == ["alone", "3", "1.1 ± 0.1", "2.1 ± 0.1"] and rows[1][6:8] == ["25.7", "24.5"]
    assert rows[4][6:] == ["-", "-", "-"]


def test_orderings_are_judged_where_both_rows_ran(swept):
    headings, rows = ordering_cells(read_sweep(swept)[0])
    assert all(len(row) == len(headings) for row in rows) and len(rows) == len(poster.ORDERINGS)
    said = {row[0]: row for row in rows}
    assert said["alone < T"][2] == "+3.1"
    assert said["alone < T"][3] == f"{HOLDS} (+2.0 ± 0.1)"
    assert said["T < T_S"][3] == f"{REVERSED} (-1.0 ± 0.1)"
    assert set(said["T_S < T_S_SAB"][3:]) == {NOT_RUN}


def test_the_command_says_it_plainly(swept, capsys):
    assert main(["ablation", f"--workdir={swept}", f"--json={swept / 'out.json'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "of the poster's 2 orderings 1 holds, 0 are not told apart, 1 is reversed: T < T_S." in said
    assert "T_S_TAB, seed 1 failed" in said
    numbers = json.loads((swept / "out.json").read_text())
    assert numbers["rows"]["alone"]["t2v_R@1"] == [1.0, 1.2, 1.1]
    markdown = (swept / "ablation.md").read_text()
    assert "| alone | 3 | 1.1 ± 0.1 |" in markdown and "alone &lt; T" in markdown


def test_a_folder_without_a_sweep(tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        report(tmp_path)
    assert main(["ablation", f"--workdir={tmp_path}"]) == 1
    assert "no finished row of a sweep" in capsys.readouterr().err
    assert main(["ablation", f"--workdir={tmp_path}", "--config.seed=1"]) == 1
    assert "unexpected argument" in capsys.readouterr().err
