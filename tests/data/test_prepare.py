"""Preparing a tree: records, manifest, bad media, repeated and interrupted runs."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path, PosixPath

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax import prepare
from clipdistill_jax.data import builder
from clipdistill_jax.data.formats import Clip
from clipdistill_jax.data.index import read_index, read_manifest
from clipdistill_jax.data.prepared import locked
from clipdistill_jax.data.video import UnreadableVideo, VideoFrames, VideoOptions, read_frames
from clipdistill_jax.data.workers import decode_clips
from clipdistill_jax.prepare import TooManyUnreadable, prepare_dataset
from tests.data.msrvtt_tree import captions_of, write_list, write_video

SMALL = VideoOptions(size=48, quality=95)


@pytest.fixture
def copy(tree, tmp_path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "copy"))


def run(source: Path, out: Path, **options) -> dict:
    settings = {"video": SMALL, "workers": 1, "progress": False} | options
    return prepare_dataset("msrvtt", source, out, **settings)


def files_of(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_manifest_and_index(tree, prepared):
    manifest = read_manifest(prepared)
    # Clip k lasts 3 + k % 6 seconds.
    assert manifest["splits"] == {
        "train": {"listed": 6, "clips": 6, "captions": 18, "frames": 3 + 4 + 5 + 6 + 7 + 8},
        "validation": {"listed": 2, "clips": 2, "captions": 2, "frames": 3 + 4},
        "test": {"listed": 3, "clips": 3, "captions": 3, "frames": 5 + 6 + 7},
    }
    assert manifest["options"]["size"] == 48 and manifest["options"]["train"] == "9k"
    assert manifest["source"]["path"] == str(tree.resolve())
    assert manifest["skipped"] == manifest["problems"] == manifest["notes"] == [] and manifest["counts"] == {}
    index = read_index(prepared, "train")
    assert index.video_ids == tuple(f"video{k}" for k in range(6))
    assert index.captions == tuple(tuple(captions_of(k)) for k in range(6))
    assert index.num_frames == (3, 4, 5, 6, 7, 8)
    with pytest.raises(KeyError, match="train, validation, test, not 'val'"):
        read_index(prepared, "val")


def test_records_read_back_with_tfds_alone(tree, prepared):
    tfds = pytest.importorskip("tensorflow_datasets")
    source = tfds.builder_from_directory(prepared / "clips" / "1.0.0").as_data_source("train")
    assert len(source) == 6
    for k, record in enumerate(source):
        path = next((tree / "videos").glob(f"video{k}.*"))
        expected = read_frames(path, SMALL)
        assert record["video_id"] == f"video{k}".encode()
        assert [c.decode() for c in record["captions"]] == captions_of(k)
        np.testing.assert_allclose(record["timestamps"], expected.timestamps, rtol=1e-6)
        images = [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in expected.frames]
        found = [np.asarray(image) for image in record["frames"]]
        assert len(found) == len(images) == 3 + k
        for a, b in zip(found, images, strict=True):
            assert a.shape == (48, 64, 3)
            assert np.abs(a.astype(int) - b).max() <= 2  # their decoder may round otherwise


def test_broken_media_are_skipped_counted_and_listed(copy, tmp_path):
    videos = copy / "videos"
    data = (videos / "video0.mp4").read_bytes()
    (videos / "video0.mp4").write_bytes(data[: len(data) // 2])
    (videos / "video4.webm").write_bytes(b"")
    (videos / "video6.mp4").write_text("no video")
    (videos / "video8.avi").unlink()
    edited = json.loads((copy / "MSRVTT_data.json").read_text())
    edited["sentences"][4]["caption"] = ""
    edited["sentences"][5]["caption"] = "many " * 500
    (copy / "MSRVTT_data.json").write_text(json.dumps(edited))
    manifest = run(copy, tmp_path / "out", max_unreadable=0.4, workers=2)
    assert {split: (n["listed"], n["clips"]) for split, n in manifest["splits"].items()} == {
        "train": (6, 4),
        "validation": (2, 1),
        "test": (3, 2),
    }
    assert manifest["counts"] == {
        "missing_video": 1,
        "unreadable_video": 3,
        "empty_caption": 1,
        "long_caption": 1,
    }
    listed = {(p["split"], Path(p["file"]).name, p["record"]): p["reason"] for p in manifest["skipped"]}
    test_csv = "MSRVTT_JSFUSION_test.csv"
    assert "video8.mp4" in listed.pop(("test", test_csv, "line 2, video_id 'video8'"))
    train_csv = "MSRVTT_train.9k.csv"
    assert "cut short" in listed.pop(("train", "video0.mp4", f"{train_csv}, line 2, video_id 'video0'"))
    assert "empty" in listed.pop(("train", "video4.webm", f"{train_csv}, line 6, video_id 'video4'"))
    assert "not a video" in listed.pop(
        ("validation", "video6.mp4", "MSRVTT_val.csv, line 2, video_id 'video6'")
    )
    assert not listed
    assert sorted(p["kind"] for p in manifest["problems"]) == ["empty_caption", "long_caption"]
    index = read_index(tmp_path / "out", "train")
    assert index.video_ids == ("video1", "video2", "video3", "video5")
    assert index.captions[0][0] == captions_of(1)[0] and len(index.captions[0]) == 2
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_too_many_broken_media_stop_the_job(copy, tmp_path):
    (copy / "videos" / "video1.webm").write_bytes(b"")
    out = tmp_path / "out"
    with pytest.raises(TooManyUnreadable) as caught:
        run(copy, out)
    for part in ("1 of the 11 listed clips", "max_unreadable=0.05", "video1.webm", "line 3", "empty"):
        assert part in str(caught.value)
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="no prepared dataset"):
        read_manifest(out)
    # Missing files are known before anything is decoded.
    (copy / "videos" / "video1.webm").unlink()
    with pytest.raises(TooManyUnreadable, match="line 3, video_id 'video1'.*none of video1.mp4"):
        run(copy, out)
    # The same folder serves once more are allowed.
    assert run(copy, out, max_unreadable=0.1)["splits"]["train"]["clips"] == 5
    with pytest.raises(ValueError, match="max_unreadable=2"):
        run(copy, out, max_unreadable=2)


def test_a_split_without_a_readable_clip(copy, tmp_path):
    for k in (6, 7):
        next((copy / "videos").glob(f"video{k}.*")).write_bytes(b"")
    with pytest.raises(ValueError, match="'validation' has no readable clip"):
        run(copy, tmp_path / "out", max_unreadable=0.5)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_second_call_returns_at_once(copy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = run(copy, out)
    before = files_of(out)

    def fail(*args, **kwargs):
        raise AssertionError("decoded again")

    monkeypatch.setattr(builder, "write_records", fail)
    assert run(copy, out) == first
    assert run(copy, out, workers=3, max_unreadable=1) == first  # these do not change the result
    assert files_of(out) == before
    with pytest.raises(ValueError, match=r"size=48 \(now 64\), quality=95 \(now 90\)"):
        run(copy, out, video=VideoOptions(size=64))
    with pytest.raises(ValueError, match=r"num_validation=500 \(now 1\)"):
        run(copy, out, num_validation=1)
    write_list(copy / "MSRVTT_train.9k.csv", [["video1"], ["video2"]], ["video_id"])
    with pytest.raises(ValueError, match="are not the same as then"):
        run(copy, out)
    shutil.rmtree(copy)  # a training machine may hold the records alone
    assert run(copy, out) == first
    assert files_of(out) == before


def test_formats_and_their_options(tree, prepared, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="'msrvt' is not known: choose one of msrvtt, msvd, didemo"):
        prepare_dataset("msrvt", tree, out)
    with pytest.raises(ValueError, match="'activitynet' has no option 'train' .it has num_validation"):
        prepare_dataset("activitynet", tree, out, train="7k")
    with pytest.raises(FileNotFoundError, match="train_ids.json|train.json"):
        prepare_dataset("activitynet", tree, out)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"format='msrvtt' \(now 'msvd'\)"):
        prepare_dataset("msvd", tmp_path / "gone", prepared, video=SMALL)


def test_two_jobs_share_a_folder(tree, prepared, tmp_path, monkeypatch):
    """The second waits for the first and then takes what that has prepared."""
    out = tmp_path / "out"
    results: list[dict] = []
    with locked(out):
        second = threading.Thread(target=lambda: results.append(run(tree, out)))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        monkeypatch.setattr(builder, "write_records", None)
        shutil.copytree(prepared, out, dirs_exist_ok=True)
    second.join(30)
    assert results == [read_manifest(prepared)]


def test_a_folder_of_something_else_is_left_alone(tree, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        run(tree, tmp_path)
    assert (tmp_path / "clips" / "mine.txt").read_text() == "keep"
    assert list(tmp_path.iterdir()) == [tmp_path / "clips"]


def test_damaged_manifest(tree, tmp_path):
    (tmp_path / "manifest.json").write_text('{"splits": ')
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        run(tree, tmp_path)


def test_killed_run_leaves_nothing_that_is_taken_for_whole(copy, tmp_path):
    """kill -9 in the middle; the decoders end too; the next run starts over and is complete."""
    rows = [[f"video{k}"] for k in range(6)]
    long = write_video(copy / "long.mp4", seconds=5, fps=20)
    for k in range(20, 36):
        shutil.copy(long, copy / "videos" / f"video{k}.mp4")
        rows.append([f"video{k}"])
    data = json.loads((copy / "MSRVTT_data.json").read_text())
    data["sentences"] += [{"video_id": f"video{k}", "caption": f"clip {k}"} for k in range(20, 36)]
    (copy / "MSRVTT_data.json").write_text(json.dumps(data))
    write_list(copy / "MSRVTT_train.9k.csv", rows, ["video_id"])
    out = tmp_path / "out"
    marks = tmp_path / "marks"
    code = f"""
import os, sys, time
from clipdistill_jax.data import builder
write = builder.write_records
def slow(*args, on_clip, **kwargs):
    def marked(split, clip, decoded):
        on_clip(split, clip, decoded)
        print(clip.video_id, file=open({str(marks)!r}, "a"))
        if open({str(marks)!r}).read().count("\\n") == 3:
            time.sleep(60)  # in the middle, when the signal comes
    write(*args, on_clip=marked, **kwargs)
builder.write_records = slow
from clipdistill_jax.prepare import main
if __name__ == "__main__":
    options = ["--size=48", "--quality=95", "--workers=2"]
    sys.exit(main(["--format=msrvtt", "--source={copy}", "--out={out}", *options]))
"""
    script = tmp_path / "job.py"
    script.write_text(code)
    job = subprocess.Popen([sys.executable, str(script)], cwd=Path(prepare.__file__).parents[1])
    deadline = time.monotonic() + 60
    while not marks.exists() or marks.read_text().count("\n") < 3:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    decoders = descendants(job.pid)
    assert decoders
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="stopped|no prepared dataset"):
        read_index(out, "train")
    while any(Path(f"/proc/{pid}").exists() for pid in decoders):
        assert time.monotonic() < deadline, "decoders outlive the killed job"
        time.sleep(0.05)
    manifest = run(copy, out, workers=2)
    assert manifest["splits"]["train"]["clips"] == 22
    assert [p.name for p in (out / "clips").iterdir()] == ["1.0.0"]


def descendants(pid: int) -> list[int]:
    """Live processes below `pid`, however deep."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, last = [], [pid]
    while last:
        last = [child for child, parent in parents.items() if parent in last]
        found += last
    return found


class CrashOnArrival(str):
    """A path that ends the process which unpickles it, as a crash in a decoder does."""

    def __reduce__(self):
        return os._exit, (1,)


class CrashPath(PosixPath):
    def __fspath__(self) -> str:
        return CrashOnArrival(str(self))


def test_a_crash_of_the_decoder_costs_one_clip(tree):
    paths = [tree / "videos" / "video0.mp4", CrashPath("/crash.mp4"), tree / "videos" / "video3.mp4"]
    clips = [Clip(f"video{k}", path, ("x",), f"line {k}") for k, path in enumerate(paths)]
    found = list(decode_clips(clips, SMALL, workers=2))
    assert [clip.video_id for clip, _ in found] == ["video0", "video1", "video2"]
    good, crashed, other = (decoded for _, decoded in found)
    assert isinstance(good, VideoFrames) and isinstance(other, VideoFrames)
    assert isinstance(crashed, UnreadableVideo) and "crashed" in str(crashed)


def test_decoding_does_not_depend_on_the_number_of_workers(tree):
    clips = [
        Clip(f"{k}", next((tree / "videos").glob(f"video{k}.*")), ("x",), f"line {k}") for k in range(11)
    ]
    one, three = (list(decode_clips(clips, SMALL, workers=w)) for w in (1, 3))
    assert one == three


def test_workers_import_no_tensorflow():
    code = (
        "import sys, clipdistill_jax.prepare, clipdistill_jax.data.workers\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'jax', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    root = Path(prepare.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_command_line(copy, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--format=msrvtt", f"--source={copy}", f"--out={out}", "--size=48", "--workers=1"]
    (copy / "videos" / "video1.webm").write_bytes(b"")
    assert prepare.main(command) == 1
    error = capsys.readouterr().err
    assert "error: 1 of the 11 listed clips" in error and "video1.webm" in error
    assert prepare.main([*command, "--max_unreadable=0.2"]) == 0
    told = capsys.readouterr()
    assert "train: 5 clips, 15 captions" in told.out and "1 of 6 left out" in told.out
    assert "1 x unreadable_video" in told.out and "the file is empty" in told.out
    assert "preparing clips: 11/11" in told.err and "/s" in told.err
    with pytest.raises(SystemExit):
        prepare.main(["--format=msrvtt", "--source=x"])
    with pytest.raises(SystemExit):
        prepare.main(["--format=msrvt", "--source=x", "--out=y"])
    assert "choose from" in capsys.readouterr().err
    other = [f"--source={tmp_path / 'none'}", f"--out={tmp_path / 'other'}"]
    assert prepare.main(["--format=lsmdc", "--train=9k", *other]) == 1
    assert "the format 'lsmdc' has no option 'train'" in capsys.readouterr().err
    assert prepare.main(["--format=msrvtt", *other]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
