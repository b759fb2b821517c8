"""Figures kept in a run's folder: read back as they were, shown on the page, not once they are outdated."""

import dataclasses
import json

from clipdistill_jax.report import figures
from clipdistill_jax.report.page import write_report
from clipdistill_jax.report.sections import Panel, Section, read_sections, write_sections
from tests.report import fake_run


def sections():
    line = figures.Line("a stage", 0, [1, 2, 3], [3.0, 2.0, 1.0])
    first, second = (figures.curves([line], name, f"{name} & more") for name in ("this", "that"))
    return [
        Section("Frame-word maps", "What <these> show.", [Panel("“a <b> c”", first)], wide=True),
        Section("Layers", "What those show.", [Panel("one", second), Panel("two", first)]),
    ]


def test_they_read_back_as_they_were_written(tmp_path):
    files = write_sections(tmp_path, sections(), {"student": "abc"})
    names = ["01-frame-word-maps", "02-layers", "03-layers"]
    assert [file.stem for file in files] == names
    assert sorted(file.name for file in (tmp_path / "figures").glob("*.png")) == sorted(
        f"{name}{theme}.png" for name in names for theme in ("", "-dark")
    )
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert read_sections(tmp_path, {"student": {"fingerprint": "abc"}}) == sections()
    again = write_sections(tmp_path, sections()[1:], {"student": "abc"})
    assert {file.stem.removesuffix("-dark") for file in (tmp_path / "figures").glob("*.png")} == {
        file.stem for file in again
    }  # none of the first time


def test_a_figure_that_the_page_draws_itself_is_a_file_only(tmp_path):
    section = sections()[1]
    one, two = section.panels
    both = dataclasses.replace(section, panels=[one, dataclasses.replace(two, shown=False)])
    assert len(write_sections(tmp_path, [both], {})) == 2
    assert read_sections(tmp_path, {}) == [dataclasses.replace(section, panels=[one])]


def test_figures_of_other_weights_are_not_shown(tmp_path):
    write_sections(tmp_path, sections(), {"student": "abc", "teacher": "def"})
    assert read_sections(tmp_path, {"student": {"fingerprint": "abc"}}) == []
    again = {"student": {"fingerprint": "abc"}, "teacher": {"fingerprint": "new"}}
    assert read_sections(tmp_path, again) == []
    assert read_sections(tmp_path / "elsewhere", again) == []


def test_the_page_shows_them(tmp_path):
    # Of a run that left no more than results: the page draws little of its own.
    settings, name = fake_run.config(), "student"
    results = {name: fake_run.result(name, fake_run.scores(name, clips=12, pairs=1))}
    prints = {name: result["fingerprint"] for name, result in results.items()}
    write_sections(tmp_path, sections(), prints)
    write_report(settings, tmp_path, results)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Frame-word maps</h2>" in page and "What &lt;these&gt; show." in page
    assert "“a &lt;b&gt; c”" in page and page.count('class="wide"') == 1
    image = json.loads((tmp_path / "figures" / "figures.json").read_text())["sections"][0]["panels"][0]
    assert f'width="{image["width"]}" height="{image["height"]}" alt="this &amp; more"' in page
    results["student"]["fingerprint"] = "another"
    write_report(settings, tmp_path, results)
    assert "Frame-word maps" not in (tmp_path / "report.html").read_text(encoding="utf-8")
