"""The written report: complete, self-contained, and whole where pieces of the run are missing."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.report import figures
from clipdistill_jax.report.page import write_report
from tests.report import fake_run

HEADINGS = [
    "Accuracy and cost",
    "Training",
    "Motion pairs",
    "Queries and what they find",
    "How the run was made",
]
VOID = {"meta", "img", "source", "link", "br"}


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append((self._open[-1] if self._open else "", data))

    def of(self, tag):
        return [data for inside, data in self.text if inside == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    settings, results = fake_run.write(workdir)
    said = write_report(settings, workdir, results, fake_run.frames_of)
    return workdir, results, said, (workdir / "report.html").read_text(encoding="utf-8")


def test_all_sections_and_every_number(written):
    _, results, _, text = written
    page = Page(text)
    assert page.of("h2") == HEADINGS
    shown = page.of("td")
    for result in results.values():
        assert f"{result['test']['t2v_R@10']:.1f}" in shown and f"{result['test']['v2t_MdR']:.1f}" in shown
    everything = " ".join(data for _, data in page.text)
    launch = fake_run.launch()
    said = [launch["command"], "1 x cpu on 1 host", "jax 0.10.2", '"image_size": 32', "How to read it"]
    assert [words for words in said if words not in everything] == []


def test_the_page_needs_nothing_but_itself(written):
    *_, text = written
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    keys = ("src", "srcset", "href", "poster", "data")
    sources = [a[key] for _, a in page.tags for key in keys if key in a]
    assert len(sources) > 50 and all(source.startswith("data:image/png;base64,") for source in sources)
    styles = "".join(page.of("style"))
    assert "url(" not in styles and "@import" not in styles
    assert not re.search(r"https?:|file:", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))


def test_every_picture_decodes_and_has_its_size_and_words(written):
    *_, text = written
    pictures = [a for tag, a in Page(text).tags if tag == "img"]
    for attributes in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))
        assert image.size == (int(attributes["width"]), int(attributes["height"]))
        assert image.convert("RGB").getextrema() != ((0, 0),) * 3 and attributes["alt"]


def test_panels_of_the_losses(written):
    captions = Page(written[-1]).of("figcaption")
    assert captions[2:9] == [
        "Task loss, teacher model",
        "Task loss, student model",
        *(f"Term: {term}" for term in fake_run.TERMS),
        "Sum: task loss and weighted terms",
        "Validation while training",
    ]
    alts = [a["alt"] for tag, a in Page(written[-1]).tags if tag == "img"]
    (together,) = [alt for alt in alts if alt.startswith("Task loss, student")]
    assert "alone" in together and "distilled" in together


def test_the_gallery_outlines_the_right_clips(written):
    workdir, results, _, text = written
    boxes = text.split('<section class="query">')[1:]
    assert len(boxes) == 6 and sum("Motion pair; what differs" in box for box in boxes) == 2
    first = boxes[0]  # the best rank of the distilled student, last in the box
    last_model = first.split("<strong>")[-1]
    assert last_model.startswith("Student MobileViTv2-0.5, distilled") and "place 1 of 48" in last_model
    assert last_model.index("strip right") == last_model.index("strip ") and 'class="score"' in last_model
    assert all("strip twin" in box for box in boxes[4:])


def test_what_main_prints(written):
    workdir, _, said, _ = written
    lines = said.splitlines()
    assert max(map(len, lines[:-1])) <= 100
    assert lines[-1] == f"The report: {workdir / 'report.html'}"
    assert "gained" in said or "lost" in said


def test_markdown_holds_the_table_and_the_gain(written):
    workdir, results, *_ = written
    text = (workdir / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(results) and "compared with Student MobileViTv2-0.5, alone" in text


def two_stages(folder, pairs):
    """(config, results) of a run of the students alone, of which one has lost its log: few pictures."""
    settings, results = fake_run.write(folder, clips=12, pairs=pairs)
    (folder / "distilled/metrics.jsonl").unlink()
    names = ("student", "distilled")
    settings["stages"] = {name: settings["stages"][name] for name in names}
    return settings, {name: results[name] for name in names}


def test_what_is_written_is_escaped_and_torn_logs_are_read(tmp_path):
    settings, results = two_stages(tmp_path / "run", pairs=1)
    settings["stages"]["student"]["title"] = "<script>alert(1)</script> & co"
    settings["note"] = "</pre><img src=http://example.org/x.png>"
    for name in results:
        arrays = fake_run.scores(name, 12, 1)
        arrays["captions"] = np.array(["<b>bold</b> \"quoted\" 'text' $a_b$"] * 12)
        np.savez(tmp_path / "run" / name / "scores.npz", **arrays)
    with (tmp_path / "run/student/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 625, "train/task_loss": None}) + '\n{"step": 650, "train/ta')
    with (tmp_path / "run/student/launches.jsonl").open("a") as file:
        file.write('{"time": ')
    write_report(settings, tmp_path / "run", results, fake_run.frames_of)
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert page.of("h2") == HEADINGS
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script> & co" in page.of("th")
    assert all(a.get("src", "data:").startswith("data:") for _, a in page.tags)


def test_a_title_with_dollars_is_not_mathematics(tmp_path):
    figures.curves([figures.Line(r"a $\frac{1$ b", 0, [1, 2, 3], [3.0, 2.0, 1.0])], "cost, $", "alt")


def test_a_run_without_motion_pairs_frames_or_validation(tmp_path):
    settings, results = two_stages(tmp_path / "run", pairs=0)
    (tmp_path / "run/student/scores.npz").unlink()
    write_report(settings, tmp_path / "run", results)
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert page.of("h2") == ["Accuracy and cost", "Training", "How the run was made"]


def test_a_run_of_which_only_the_results_are_left(tmp_path):
    settings = fake_run.config()
    results = {name: fake_run.result(name, fake_run.scores(name)) for name in ("teacher", "distilled")}
    said = write_report(settings, tmp_path, results)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.of("h2") == ["Accuracy and cost", "How the run was made"]
    assert "gained" not in said and "lost" not in said


def test_a_light_and_a_dark_picture():
    line = figures.Line("a stage", 0, [1, 2, 3], [3.0, 2.0, 1.0])
    picture = figures.curves([line], "loss, nats", "falling")
    for image, paper in ((picture.light, (255, 255, 255)), (picture.dark, (27, 30, 35))):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))
        assert pixels.shape == (picture.height, picture.width, 3)
        drawn = (pixels != paper).any(-1)
        assert tuple(pixels[0, 0]) == paper and 0.01 < drawn.mean() < 0.2
