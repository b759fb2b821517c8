"""CLIP-TD's methods over seeds beside its tables: the figures' consistency, each layout, the verdicts."""

import json
import shutil
from pathlib import Path

import pytest

from clipdistill_jax import commands
from clipdistill_jax.report import paper_tables
from clipdistill_jax.report.__main__ import main
from clipdistill_jax.report.ablation import HOLDS, REVERSED
from clipdistill_jax.report.clip_td import ordering_cells, read_methods, report, score_cells, summary
from tests.report import fake_questions

CONFIGS = Path(__file__).parents[2] / "configs" / "clip_td"
TABLE = paper_tables.TABLES["vcr/vl_bert"]


def test_the_papers_orderings_hold_in_its_own_tables():
    judged = set()
    for table in paper_tables.TABLES.values():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names) and all(len(row.values) == 3 for row in table.rows)
        for claim in paper_tables.ORDERINGS:
            for column in table.columns:
                low, high = table.value(claim.lower, column), table.value(claim.higher, column)
                if low is not None and high is not None:
                    judged.add(claim)
                    assert low < high, (table.title, column, claim)
    assert judged == set(paper_tables.ORDERINGS)


@pytest.mark.parametrize(
    "shots, column", [(0, "full"), (1, "700"), (100, "700"), (101, "7000"), (9999, "full")]
)
def test_the_column_of_so_many_shots(shots, column):
    assert TABLE.column(shots) == column


def put(workdir, method, seed, share, shots=20):
    folder = workdir / method / f"seed{seed}"
    folder.mkdir(parents=True)
    test = {"accuracy": share - 5, "Q->A": share, "QA->R": share - 10, "Q->AR": share / 2, "Q->A/role": 1.0}
    settings = {"stages": {"student": {"protocol": "low_shot", "shots": shots}}}
    said = {"row": method, "seed": seed, "stage": "student", "test": test, "config": settings}
    (folder / "row.json").write_text(json.dumps(said))
    (folder / "student").mkdir()
    (folder / "student" / "result.json").write_text(json.dumps(said))  # as the run leaves it


@pytest.fixture
def swept(tmp_path):
    for seed in range(3):
        put(tmp_path, "clip_td", seed, 50.0 + seed)
        put(tmp_path, "naive", seed, 30.0 + seed)
        put(tmp_path, "baseline", seed, 40.0 + seed)
    put(tmp_path, "ours", 0, 77.0)
    failed = tmp_path / "ts" / "seed1"
    failed.mkdir(parents=True)
    (failed / "failed.json").write_text(json.dumps({"row": "ts", "seed": 1, "error": "OSError: full"}))
    return tmp_path


def test_methods_stand_in_the_papers_order_with_its_numbers(swept):
    table, scores, shots, failures = read_methods(swept)
    assert table == TABLE and list(scores) == ["baseline", "naive", "clip_td", "ours"] and shots == 20
    assert failures == ["ts, seed 1 failed: OSError: full"]
    headings, rows = score_cells(scores, TABLE)
    assert headings[2:6] == ["all", "Q→A", "QA→R", "Q→AR"]
    assert rows[0] == [
        *("baseline", "3", "36.0 ± 1.0", "41.0 ± 1.0", "31.0 ± 1.0", "20.5 ± 0.5"),
        *("30.85", "57.59", "76.02", "Table 1, Table 8"),
    ]
    assert rows[3][6:] == ["-", "-", "-", "-"]


def test_orderings_are_judged_where_both_methods_ran(swept):
    scores = read_methods(swept).scores
    headings, rows = ordering_cells(scores, TABLE, "700")
    assert all(len(row) == len(headings) for row in rows)
    said = {row[0]: row for row in rows}
    assert list(said) == ["baseline < naive", "naive < clip_td", "baseline < clip_td"]
    # Deviation 1 of both: pooled error sqrt(2/3) = 0.8.
    assert said["baseline < clip_td"][2:5] == ["+15.89", f"{HOLDS} (+10.0 ± 0.8)", f"{HOLDS} (+10.0 ± 0.8)"]
    assert said["baseline < naive"][4] == f"{REVERSED} (-10.0 ± 0.8)"
    _, fewer = ordering_cells(scores, paper_tables.TABLES["vcr/villa"], "full")
    assert [row[:3] for row in fewer] == [
        ["baseline < clip_td", "CLIP-TD is better than no distillation (5.1)", "+0.59"]
    ]


def test_questions_of_one_kind_have_one_column(tmp_path):
    for name, share in (("baseline", 31.0), ("naive", 45.0)):
        folder = tmp_path / name / "seed0"
        folder.mkdir(parents=True)
        said = {"row": name, "seed": 0, "stage": name, "test": {"accuracy": share, "Q->A": share}}
        (folder / "row.json").write_text(json.dumps(said))
    scores = read_methods(tmp_path).scores
    assert {name: list(found) for name, found in scores.items()} == {"baseline": ["Q->A"], "naive": ["Q->A"]}
    _, ((*_, verdict),) = ordering_cells(scores, TABLE, "700")
    assert verdict == "one seed (+14.0)"
    assert summary(scores, TABLE, "700")[0] == "Q→A: one seed does not tell which orderings hold."


def test_the_command_says_it_plainly(swept, capsys):
    assert main(["clip_td", f"--workdir={swept}", f"--json={swept / 'out.json'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Q→A: of the paper's 3 orderings 2 hold, 0 are not told apart, 1 is reversed: baseline < naive."
        in said
    )
    assert "ts, seed 1 failed" in said
    assert "20 questions of each group; the paper's column '700' (100 questions of each group)" in said
    numbers = json.loads((swept / "out.json").read_text())
    assert numbers["rows"]["naive"]["Q->A"] == [30, 31, 32] and numbers["shots"] == 20
    markdown = (swept / "clip_td.md").read_text(encoding="utf-8")
    assert "| clip_td | 3 | 46.0 ± 1.0 | 51.0 ± 1.0 |" in markdown and "naive &lt; clip_td" in markdown


def test_one_run_and_a_folder_of_runs_are_read_too(tmp_path):
    for seed in (0, 1):
        fake_questions.write(tmp_path / f"seed{seed}", seed)
    _, both, shots, _ = read_methods(tmp_path)
    assert list(both) == list(fake_questions.STAGES) and shots == 20  # the pretraining stage answers nothing
    one = read_methods(tmp_path / "seed1").scores
    for name in fake_questions.STAGES:
        assert len(both[name]["Q->AR"].values) == 2
        assert one[name]["Q->AR"].values == both[name]["Q->AR"].values[1:]


def train(run, argument, task="vcr", seed=42, **test):
    """A finished run of configs/clip_td; only its last stage answers questions."""
    config = commands.read_config(f"{CONFIGS}/{task}.py:{argument}", [f"--config.seed={seed}"])
    for stage in config["stages"]:
        (run / stage).mkdir(parents=True)
        (run / stage / "config.json").write_text(json.dumps(config))
        result = {"stage": stage, "seed": seed, "test": test if stage == "finetune" else {}}
        (run / stage / "result.json").write_text(json.dumps(result))


def test_runs_on_real_data_are_named_by_their_method(tmp_path):
    answers, rationales = {"accuracy": 50.0, "Q->A": 50.0}, {"accuracy": 40.0, "QA->R": 40.0}
    for seed in (0, 1):
        for method in ("clip_td", "baseline"):
            student = f"vl_bert_large,{method},100,questions"
            train(tmp_path / f"{method}_{seed}", f"{student}=qa", seed=seed, **answers)
            train(tmp_path / method / f"seed{seed}", f"{student}=qar", seed=seed, **rationales)
    table, scores, shots, _ = read_methods(tmp_path)
    assert table == TABLE and shots == 100 and list(scores) == ["baseline", "clip_td"]
    two = {name: score.values for name, score in scores["clip_td"].items()}
    assert two == {"Q->A": (50.0, 50.0), "QA->R": (40.0, 40.0)}
    one = read_methods(tmp_path / "clip_td_0")
    assert list(one.scores) == ["clip_td"] and list(one.scores["clip_td"]) == ["Q->A"]
    tables, lines = report(tmp_path / "clip_td_0")
    assert len(tables) == 1 and not any("ordering" in line for line in lines)  # of one method there is none


@pytest.mark.parametrize(
    "task, student, name",
    [
        ("vcr", "uniter_base", "vcr/uniter_base"),
        ("snli_ve", "uniter_large", "snli_ve/uniter_large"),
        ("vqa", "villa_large", "vqa/villa"),
        ("vqa", "uniter_base", "vqa/vl_bert"),  # the paper has no UNITER base there
    ],
)
def test_the_table_is_that_of_the_data_and_the_student(tmp_path, task, student, name):
    train(tmp_path / "run", f"{student},ts,full", task, accuracy=60.0)
    found = read_methods(tmp_path)
    assert found.table == paper_tables.TABLES[name] and found.shots == 0
    assert read_methods(tmp_path, "snli_ve/villa").table == paper_tables.TABLES["snli_ve/villa"]


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    train(tmp_path / "a", "uniter_base,ts,100", accuracy=60.0)
    train(tmp_path / "b", "villa_base,cw,100", accuracy=60.0)
    with pytest.raises(ValueError, match="different models: ts vcr/uniter_base, cw vcr/villa_base"):
        read_methods(tmp_path)
    shutil.rmtree(tmp_path / "b")
    train(tmp_path / "c", "uniter_base,ts,100", accuracy=61.0)
    with pytest.raises(
        ValueError, match="a/finetune and .*c/finetune are both of the method 'ts' and the seed 42"
    ):
        read_methods(tmp_path)


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no finished method"):
        report(tmp_path)
    put(tmp_path, "naive", 0, 30.0, shots=20)
    assert main(["clip_td", f"--workdir={tmp_path}", "--table=vcr/bert"]) == 1
    assert "there is no table 'vcr/bert'; there is vcr/vl_bert" in capsys.readouterr().err
    put(tmp_path, "ts", 0, 30.0, shots=100)
    with pytest.raises(ValueError, match="different numbers of questions: naive 20, ts 100"):
        report(tmp_path)
