"""The table: numbers, layouts, and what it says distillation did."""

import copy

import pytest

from clipdistill_jax.report import table
from tests.report import fake_run


@pytest.fixture
def run():
    stages = fake_run.config()["stages"]
    return stages, {name: fake_run.result(name, fake_run.scores(name)) for name in stages}


def cells(columns):
    return {column.heading: column.cells for column in columns}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (999_600, "1M"), (1_234_567, "1.23M"), (151_277_313, "151M")],
)
def test_humanize(count, text):
    assert table.humanize(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(1.23e7, "0.0123"), (4.4e9, "4.4"), (1.2345e12, "1,234"), (2e3, "0.000002")]
)
def test_gflops(count, text):
    assert table.gflops(count) == text


def test_numbers_are_those_of_the_results(run):
    stages, results = run
    found = cells(table.columns(stages, results, {}))
    assert found["Stage"] == [stage["title"] for stage in stages.values()]
    assert found["Learned from"] == ["-", "-", "-", "Teacher (CLIP4Clip, seqTransf)"]
    for short in ("t2v", "v2t"):
        for metric in ("R@1", "R@5", "R@10", "MdR"):
            said = [float(cell) for cell in found[f"{short} {metric}"]]
            expected = [result["test"][f"{short}_{metric}"] for result in results.values()]
            assert said == pytest.approx(expected, abs=0.05001), (short, metric)
    assert found["Params temporal"] == ["-", "-", "98.8k", "98.8k"]
    assert found["Params total"] == ["8.11M", "8.11M", "1.79M", "1.79M"]
    assert found["GFLOPs a clip"] == ["0.19", "0.19", "0.0123", "0.0123"]
    assert found["Training minutes"] == ["1.5"] * 4
    assert [float(cell) for cell in found["Motion pairs %"]] == pytest.approx(
        [result["test"]["motion_pairs"] for result in results.values()], abs=0.05001
    )


def test_minutes_of_a_resumed_stage_are_marked(run):
    stages, results = run
    minutes = cells(table.columns(stages, results, {"student": 2, "teacher": 1}))["Training minutes"]
    assert [cell.endswith("+") for cell in minutes] == [False, False, True, False]


def test_without_motion_pairs_there_is_no_such_column(run):
    stages, results = run
    for result in results.values():
        result["test"].pop("motion_pairs")
    assert "Motion pairs %" not in cells(table.columns(stages, results, {}))


def test_a_stage_without_title_goes_by_its_name(run):
    stages, results = run
    del stages["teacher"]["title"]
    found = cells(table.columns(stages, results, {}))
    assert found["Stage"][1] == "teacher" and found["Learned from"][3] == "teacher"


def test_markdown_is_a_table_whatever_the_titles_hold(run):
    stages, results = run
    stages["student"]["title"] = "a|b *c*\n<d> `e`_f_ [g]"
    lines = table.markdown(table.columns(stages, results, {})).splitlines()
    bars = {line.replace(r"\|", "").count("|") for line in lines}
    assert len(lines) == 6 and bars == {18}
    assert lines[4].startswith(r"| a\|b \*c\* \<d\> \`e\`\_f\_ \[g\] | - | 1.23M | 457k | 98.8k |")


def test_plain_table_fits_and_keeps_all_of_long_titles(run):
    stages, results = run
    stages["distilled"]["title"] = "A student of a very long name, one that is distilled with every term"
    text = table.plain_table(table.columns(stages, results, {}))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    width = lines[1].index("total") - 1
    assert stages["distilled"]["title"] in " ".join(line[:width].strip() for line in lines)
    row = next(line for line in lines if line.startswith("Teacher"))
    test = results["teacher"]["test"]
    keys = [f"{way}_{k}" for way in ("t2v", "v2t") for k in ("R@1", "R@5", "R@10", "MdR")]
    assert row.split()[-11:] == ["8.11M", "0.19", *(f"{test[key]:.1f}" for key in [*keys, "motion_pairs"])]


def test_numbers_stand_under_their_headings(run):
    lines = table.plain_table(table.columns(*run, {})).splitlines()
    ends = {len(line) for line in (lines[0], lines[1], lines[2])}
    assert len(ends) == 1 and lines[0].endswith("Motion") and lines[1].endswith("pairs %")


def test_gain_says_gained_lost_and_unchanged(run):
    stages, results = run
    before, after = results["student"]["test"], results["distilled"]["test"]
    before |= {"t2v_R@1": 10.0, "t2v_R@10": 40.0, "v2t_R@1": 8.0, "v2t_R@10": 30.0}
    after |= {"t2v_R@1": 12.5, "t2v_R@10": 36.75, "v2t_R@1": 8.01, "v2t_R@10": 30.2}
    (line,) = table.gain_lines(stages, results)
    assert "text to video R@1 gained 2.5 points (10.0 to 12.5), R@10 lost 3.2 points (40.0 to 36.8)" in line
    assert "video to text R@1 unchanged (8.0 to 8.0), R@10 gained 0.2 points (30.0 to 30.2)" in line
    assert line.startswith("Student MobileViTv2-0.5, distilled (taught by Teacher (CLIP4Clip, seqTransf))")
    assert "differ" not in line


def test_gain_names_what_else_differs(run):
    stages, results = run
    stages["distilled"]["steps"] = 1200
    (line,) = table.gain_lines(stages, results)
    assert line.endswith("The two also differ in: steps.")


def test_no_gain_line_where_there_is_nothing_to_compare(run):
    stages, results = run
    assert table.gain_lines(stages, {name: r for name, r in results.items() if name != "student"}) == []
    other = copy.deepcopy(stages)
    other["student"]["temporal"] = "meanP"
    assert table.gain_lines(other, results) == []


def test_the_nearest_of_several_students_is_compared(run):
    stages, results = run
    stages = {"longer": {**stages["student"], "steps": 6000}, **stages}
    found = table.comparisons(stages, {"longer": results["student"], **results})
    assert found == [table.Comparison("student", "distilled", "teacher", ())]
