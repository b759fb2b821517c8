"""An index over a folder of small videos: complete, resumable, honest; queries against brute force."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax import export
from clipdistill_jax.data.shapes.drawing import render, write_clip
from clipdistill_jax.data.shapes.world import Scene, Thing, WorldConfig
from clipdistill_jax.data.video import VideoOptions, read_frames
from clipdistill_jax.export import export_stage, load_exported
from clipdistill_jax.search import shards
from clipdistill_jax.search.__main__ import main
from clipdistill_jax.search.index import build_index
from clipdistill_jax.search.query import clock, find
from tests.fake_stage import write_stage
from tests.tiny_config import get_config

QUERY = "a red circle moves left"
GOOD = ["a.mp4", "deep/b.MP4", "deep/er/c & <i>\"d'.mp4", os.fsdecode(b"caf\xe9.mp4"), "f.mp4"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of an exported tiny CLIP."""
    workdir = tmp_path_factory.mktemp("run")
    write_stage(workdir, get_config(), "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "compare", lambda *args: {})  # test_export has it
        export_stage(workdir / "alone", workdir / "model")
    return workdir / "model"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six videos, one of them cut short; links to a seventh outside; a file that is no video."""
    base = tmp_path_factory.mktemp("source")
    root, world = base / "videos", WorldConfig(size=32, fps=4, seconds=3)
    for seed, name in enumerate([*GOOD, "cut.mp4"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shape = ("circle", "square", "triangle", "cross")[seed % 4]
        scene = Scene(name, (Thing("red", shape, ("left",)), Thing("blue", "square", ("grow",))), seed)
        frames = render(scene, np.linspace(0, 1, 4 + 2 * seed), world)
        write_clip(root / "new.mp4", frames, world.fps)
        (root / "new.mp4").rename(root / name)
    (root / "cut.mp4").write_bytes((root / "cut.mp4").read_bytes()[:700])
    (root / "notes.txt").write_text("no video")
    (base / "outside").mkdir()
    shutil.copy(root / "a.mp4", base / "outside" / "secret.mp4")
    (root / "link.mp4").symlink_to(base / "outside" / "secret.mp4")
    (root / "linked").symlink_to(base / "outside")
    return root


@pytest.fixture
def videos(source, tmp_path):
    """A copy of the videos that a test may change."""
    return shutil.copytree(source, tmp_path / "videos", symlinks=True)


def run(exported, videos, out, model=None, **kwargs):
    settings = {"batch_size": 2, "workers": 1, "shard_size": 2, "progress": False, **kwargs}
    return build_index(model or load_exported(exported), exported, videos, out, **settings)


def contents(out):
    """file -> (vector, seconds, thumbnail) of an index."""
    found = {}
    for path in shards.shards(out):
        clips = shards.read_shard(path)
        for i, file in enumerate(clips.path.tolist()):
            assert file not in found
            found[file] = (clips.vector[i], clips.seconds[i], clips.thumbnail[i])
    return found


@pytest.fixture(scope="module")
def index(exported, source, tmp_path_factory):
    """An index of the source, and what the command said."""
    out = tmp_path_factory.mktemp("index") / "index"
    return out, run(exported, source, out)


def brute_force(exported, root):
    """file -> (cosine to QUERY, middle frame), one clip at a time, with frames chosen here."""
    model, found = load_exported(exported), {}
    (text,) = model.encode_sentences([QUERY])
    for file in GOOD:
        jpegs = read_frames(root / file, VideoOptions(fps=1.0, size=16, store_square=True)).frames
        count = min(len(jpegs), 2)  # the model takes two frames
        used = [jpegs[i] for i in np.linspace(0, len(jpegs) - 1, count).astype(int)]
        frames = np.zeros((1, 2, 16, 16, 3), np.uint8)
        frames[0, :count] = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in used]
        video = np.asarray(model.encode_video(frames, np.arange(2)[None] < count))[0]
        found[file] = (float(np.dot(video.astype(np.float64), text)), used[count // 2])
    return found


def test_every_readable_video_is_there_and_the_others_are_named(index):
    out, done = index
    assert (done.total, done.new, done.dropped) == (5, 5, 0)
    assert sorted(contents(out)) == sorted(GOOD)
    reasons = dict(done.skipped)
    assert set(reasons) == {"cut.mp4", "link.mp4", "linked"}
    assert "cut short" in reasons["cut.mp4"]
    assert "not followed" in reasons["link.mp4"] and "not followed" in reasons["linked"]
    assert {entry["file"] for entry in json.loads((out / "skipped.json").read_text())} == set(reasons)


def test_ranking_is_brute_force_ranking(exported, source, index):
    expected = brute_force(exported, source)
    hits = find(index[0], QUERY, top=10)
    assert [hit.file for hit in hits] == sorted(expected, key=lambda file: -expected[file][0])
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.file][0], abs=2e-6)  # float32 against float64
        assert hit.thumbnail == expected[hit.file][1]
        frames = 4 + 2 * GOOD.index(hit.file)
        assert hit.seconds == pytest.approx(frames / 4, abs=0.02)  # four frames a second
    assert find(index[0], QUERY, top=2) == hits[:2]


def test_a_second_run_embeds_nothing(exported, source, index, tmp_path):
    out = shutil.copytree(index[0], tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in shards.shards(out)}

    def fail(*args):
        pytest.fail("embedded again")

    model = dataclasses.replace(load_exported(exported), encode_video=fail)
    done = run(exported, source, out, model)
    assert (done.total, done.new, done.dropped, len(done.skipped)) == (5, 0, 0, 3)
    assert {path: path.stat().st_mtime_ns for path in shards.shards(out)} == before


def test_a_run_that_is_stopped_goes_on(exported, source, index, tmp_path):
    model, calls = load_exported(exported), []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return model.encode_video(*args)

    out = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        run(exported, source, out, dataclasses.replace(model, encode_video=stops))
    assert len(contents(out)) == 2
    (out / "shard-000001.npz.partial").write_bytes(b"half a shard")
    done = run(exported, source, out)
    assert (done.total, done.new) == (5, 3)
    assert sorted(path.name for path in out.glob("shard*")) == [f"shard-00000{i}.npz" for i in range(3)]
    whole, resumed = contents(index[0]), contents(out)
    assert resumed.keys() == whole.keys()
    for file, (vector, _, thumbnail) in resumed.items():
        np.testing.assert_allclose(vector, whole[file][0], atol=1e-6)
        assert thumbnail == whole[file][2]


def test_changed_and_deleted_files(exported, videos, tmp_path):
    out = tmp_path / "index"
    run(exported, videos, out)
    shutil.copy(videos / "f.mp4", videos / "a.mp4")
    (videos / GOOD[3]).unlink()
    done = run(exported, videos, out)
    assert (done.total, done.new, done.dropped) == (4, 1, 2)
    found = contents(out)
    assert sorted(found) == sorted(set(GOOD) - {GOOD[3]})
    np.testing.assert_allclose(found["a.mp4"][0], found["f.mp4"][0], atol=1e-6)
    assert found["a.mp4"][2] == found["f.mp4"][2]


def test_a_damaged_shard_is_named_and_mended(exported, source, index, tmp_path):
    out = shutil.copytree(index[0], tmp_path / "index")
    path = shards.shards(out)[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path} is damaged.*index command again"):
        find(out, QUERY)
    done = run(exported, source, out)
    assert (done.total, done.new) == (5, 2)
    assert len(find(out, QUERY, top=9)) == 5


def test_the_query_command(index, tmp_path, capsys):
    out, page = index[0], tmp_path / "page.html"
    query = "<script>alert(1)</script> red & round"
    assert main(["query", str(out), query, "--top=5", f"--html={page}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["query"] == query and sorted(hit["file"] for hit in said["hits"]) == sorted(GOOD)
    html = page.read_text()
    assert "<script>" not in html and "<i>" not in html and "&lt;script&gt;alert(1)" in html
    images = re.findall(r'data:image/jpeg;base64,([^"]+)"', html)
    assert [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images] == [(16, 16)] * 5
    assert main(["query", str(out), QUERY, "--top=1"]) == 0
    table = capsys.readouterr().out
    (best,) = find(out, QUERY, top=1)
    assert f"{best.score:.3f}" in table and clock(best.seconds) in table


def test_the_index_command(exported, videos, tmp_path, capsys):
    out = tmp_path / "index"
    command = ["index", str(exported), str(videos), f"--out={out}", "--workers=1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "5 clips, 5 of them new" in said and "3 skipped" in said and "cut.mp4: " in said
    assert main(command) == 0
    assert "5 clips, 0 of them new" in capsys.readouterr().out


def test_a_model_that_was_moved_or_changed(exported, index, tmp_path):
    out, moved = shutil.copytree(index[0], tmp_path / "index"), tmp_path / "moved"
    shutil.copytree(exported, moved)
    manifest = json.loads((out / "index.json").read_text())
    manifest["model"]["folder"] = str(tmp_path / "nowhere")
    (out / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(FileNotFoundError, match="where it lies now: --model"):
        find(out, QUERY)
    assert len(find(out, QUERY, model=moved)) == 5
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "fingerprint": "another"}))
    with pytest.raises(ValueError, match="made with the model"):
        find(out, QUERY, model=moved)
    with pytest.raises(ValueError, match="made with another model"):
        run(moved, Path(manifest["videos"]), out)


def test_mistakes_are_told(exported, source, index, tmp_path, capsys):
    out, mine = str(index[0]), tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    for words, message in [
        (["query", out, "  "], "the query is empty"),
        (["query", out, QUERY, "--top=0"], "at least 1"),
        (["query", str(mine), QUERY], "holds no index"),
        (["index", str(mine), str(source), f"--out={tmp_path / 'x'}"], "not an exported model"),
        (["index", str(exported), str(tmp_path / "none"), f"--out={tmp_path / 'x'}"], "no such folder"),
        (["index", str(exported), str(source), f"--out={mine}"], "holds no index"),
        (["index", str(exported), str(mine), f"--out={out}"], "is an index of"),
        (["index", str(exported), str(source), f"--out={out}", "--batch_size=0"], "at least 1"),
    ]:
        assert main(words) == 1
        assert message in capsys.readouterr().err
    assert os.listdir(mine) == ["file"] and not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    assert run(exported, tmp_path / "empty", tmp_path / "y").total == 0
    with pytest.raises(ValueError, match="holds no clips"):
        find(tmp_path / "y", QUERY)
