"""A cache is whole, right and this run's, or it is refused: kills, damage, hosts, other facts."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from clipdistill_jax.distill.cache import TeacherCache, build_cache, cache_spec, join_cached
from clipdistill_jax.distill.cache_files import CacheError
from clipdistill_jax.models.features import Features

CLIPS, SAID = 22, 2  # SAID captions a clip


def expected_vectors(kind, ids):
    """Vectors that tell their own id."""
    x = np.sin(ids[:, None] * 7.0 + np.arange(4)).astype(np.float32)
    if kind == "captions":
        return {"text": x}
    return {"frames": np.stack([x, -x], 1), "frame_mask": np.stack([x[:, 0] > 9, x[:, 0] < 9], 1), "video": x}


def fake_vectors(asked=None, die=None):
    """Vectors by id. `asked` collects the ids; `die` is called before step 5 of the captions."""

    def make(kind):
        def run(ids):
            for step, row in enumerate(ids):
                if die and kind == "captions" and step == 5:
                    die()
                if asked is not None:
                    asked.setdefault(kind, []).extend(row[row >= 0].tolist())
                yield expected_vectors(kind, row)

        return run

    return {kind: make(kind) for kind in ("clips", "captions")}


def fake_spec(**changes):
    x = {k: v for kind in ("clips", "captions") for k, v in expected_vectors(kind, np.arange(2)).items()}
    settings = dict(
        fingerprint="f00d",
        data={"num_frames": 2, "manifest": "abc"},
        clips=CLIPS,
        captions=CLIPS * SAID,
        frame_sampling="uniform",
        fields=tuple(x),
        dtype="float32",
    )
    return cache_spec(changes.pop("features", Features(**x)), **{**settings, **changes})


SPEC = fake_spec()
STEPS = dict(batch_size=4, steps_per_file=2)  # files of 8 ids


def check_whole(folder):
    example_id = np.random.default_rng(0).permutation(CLIPS * SAID).astype(np.int32)
    found = TeacherCache(folder, SPEC, name="clip").lookup(example_id // SAID, example_id)
    expected = expected_vectors("clips", example_id // SAID) | expected_vectors("captions", example_id)
    assert found.keys() == {f"clip/{name}" for name in expected}
    for name, x in expected.items():
        np.testing.assert_array_equal(found[f"clip/{name}"], x)


def die_half_way(folder):
    build_cache(Path(folder), SPEC, fake_vectors(die=lambda: os.kill(os.getpid(), signal.SIGKILL)), **STEPS)


def test_a_killed_build_goes_on_where_it_was(tmp_path):
    folder = tmp_path / "cache"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('case', {__file__!r})\n"
        "case = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(case)\n"
        f"case.die_half_way({str(folder)!r})\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == -signal.SIGKILL
    assert len(list(folder.glob("clips-*.arrayrecord"))) == 3
    assert len(list(folder.glob("captions-*.arrayrecord"))) == 2  # 16 captions; steps 4 and 5 are lost
    assert len(list(folder.glob("*.partial"))) == 1
    with pytest.raises(CacheError, match="28 of 44 captions are missing"):
        TeacherCache(folder, SPEC)

    asked = {}
    build_cache(folder, SPEC, fake_vectors(asked), **STEPS)
    assert asked == {"captions": list(range(16, 44))}
    assert not list(folder.glob("*.partial"))
    check_whole(folder)
    build_cache(folder, SPEC, fake_vectors(again := {}), **STEPS)
    assert again == {}


def test_a_file_cut_short_is_written_again(tmp_path):
    build_cache(tmp_path, SPEC, fake_vectors(), **STEPS)
    path = tmp_path / "clips-000000008-000000016.arrayrecord"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CacheError, match="8 of 22 clips are missing: build it again"):
        TeacherCache(tmp_path, SPEC)
    asked = {}
    build_cache(tmp_path, SPEC, fake_vectors(asked), **STEPS)
    assert asked == {"clips": list(range(8, 16))}
    check_whole(tmp_path)


def test_a_damaged_record_is_named(tmp_path):
    build_cache(tmp_path, SPEC, fake_vectors(), **STEPS)
    path = tmp_path / "captions-000000008-000000016.arrayrecord"
    damaged = bytearray(path.read_bytes())
    at = damaged.find(expected_vectors("captions", np.array([11]))["text"].tobytes()[:8])
    damaged[at if at > 0 else len(damaged) // 3] ^= 255
    path.write_bytes(damaged)
    ids = np.arange(8, 16, dtype=np.int32)
    with pytest.raises(CacheError, match=r"captions-000000008-000000016\S* is damaged: remove it"):
        TeacherCache(tmp_path, SPEC).lookup(ids, ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "beef"}, "fingerprint is 'f00d', not 'beef'"),
        ({"data": {"num_frames": 3, "manifest": "abc"}}, "num_frames is 2, not 3"),
        ({"data": {"num_frames": 2, "manifest": "abd"}}, "manifest is 'abc', not 'abd'"),
        ({"data": {"num_frames": 2}}, "manifest is 'abc', not None"),
        ({"clips": CLIPS - 1}, "clips is 22, not 21"),
        ({"captions": 45}, "captions is 44, not 45"),
        ({"dtype": "bfloat16"}, r"clips/frames is 'float32\[2, 4\]', not 'bfloat16\[2, 4\]'"),
        ({"fields": ("frames", "frame_mask", "video")}, r"captions/text is 'float32\[4\]', not None"),
    ],
)
def test_another_cache_is_refused_by_name_and_lies_elsewhere(tmp_path, changes, message):
    build_cache(tmp_path, SPEC, fake_vectors(), **STEPS)
    other = fake_spec(**changes)
    assert other.folder(tmp_path) != SPEC.folder(tmp_path)
    with pytest.raises(CacheError, match=message):
        TeacherCache(tmp_path, other)
    with pytest.raises(CacheError, match=message):
        build_cache(tmp_path, other, fake_vectors(), **STEPS)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="holds no cache"):
        build_cache(tmp_path, SPEC, fake_vectors(), **STEPS)
    (tmp_path / "cache.json").write_text('{"format": 1, "fac')
    with pytest.raises(CacheError, match=r"cache.json cannot be read"):
        build_cache(tmp_path, SPEC, fake_vectors(), **STEPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_sampling": "random"}, "frame_sampling is 'random'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"fields": ("frames", "words")}, "field 'words' is not given by the model"),
        ({"features": Features(tokens=np.zeros((2, 3, 4))), "fields": ("tokens",)}, "'tokens' is not kept"),
    ],
)
def test_what_cannot_be_cached(changes, message):
    with pytest.raises(ValueError, match=message):
        fake_spec(**changes)


class Hosts:
    """Threads that wait for each other as hosts do."""

    def __init__(self, count):
        self.barrier, self.said = threading.Barrier(count, timeout=60), None

    def agree(self, host, value):
        if host == 0:
            self.said = value
        self.barrier.wait()
        said = self.said
        self.barrier.wait()
        return said


def build_on(folder, count, asked):
    hosts, failed = Hosts(count), []

    def run(host):
        try:
            build_cache(
                folder,
                SPEC,
                fake_vectors(asked[host]),
                process_index=host,
                process_count=count,
                agree=lambda value: hosts.agree(host, value),
                **STEPS,
            )
        except BaseException as error:
            failed.append(error)
            hosts.barrier.abort()

    threads = [threading.Thread(target=run, args=(host,)) for host in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_two_hosts_make_one_cache(tmp_path):
    asked = [{}, {}]
    build_on(tmp_path, 2, asked)
    for kind, size in (("clips", CLIPS), ("captions", CLIPS * SAID)):
        ours, theirs = (set(a[kind]) for a in asked)
        assert not ours & theirs and ours | theirs == set(range(size))
        assert abs(len(ours) - len(theirs)) <= 4  # the last file's rows may all be one host's
    check_whole(tmp_path)


def test_another_number_of_hosts_goes_on(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path, SPEC, fake_vectors(die=stop), **STEPS)
    assert not list(tmp_path.glob("*.partial"))  # there was time to clean up
    asked = [{}, {}]
    build_on(tmp_path, 2, asked)
    assert sorted(asked[0]["captions"] + asked[1]["captions"]) == list(range(16, 44))
    assert "clips" not in asked[0] | asked[1]
    check_whole(tmp_path)


def test_one_host_of_two_does_not_make_a_whole_cache(tmp_path):
    with pytest.raises(CacheError, match="of 22 clips are missing"):
        build_cache(tmp_path, SPEC, fake_vectors(), process_index=0, process_count=2, **STEPS)


@pytest.mark.parametrize(("clip_id", "shown"), [([0, 22], "22"), ([-1, 3], "-1")])
def test_ids_outside_the_cache_are_refused(tmp_path, clip_id, shown):
    build_cache(tmp_path, SPEC, fake_vectors(), **STEPS)
    with pytest.raises(CacheError, match=f"the batch has the id {shown}, the cache 22 clips"):
        TeacherCache(tmp_path, SPEC).lookup(np.array(clip_id), np.array([0, 1]))


def test_vectors_that_are_not_finite_or_of_another_shape_are_refused(tmp_path):
    def broken(change):
        def run(ids):
            for row in ids:
                yield change(row, expected_vectors("clips", row))

        return {**fake_vectors(), "clips": run}

    def nan(row, found):
        found["video"][row == 13] = np.nan
        return found

    with pytest.raises(CacheError, match="video of id 13 is not finite"):
        build_cache(tmp_path / "a", SPEC, broken(nan), **STEPS)
    wide = broken(lambda row, found: found | {"video": np.zeros((len(row), 5), np.float32)})
    with pytest.raises(CacheError, match=r"video came as \(4, 5\)"):
        build_cache(tmp_path / "b", SPEC, wide, **STEPS)
    with pytest.raises(CacheError, match="the clips ended before id 7"):
        build_cache(tmp_path / "c", SPEC, {**fake_vectors(), "clips": lambda ids: []}, **STEPS)


def test_closing_joined_batches_closes_the_batches(tmp_path):
    build_cache(tmp_path, SPEC, fake_vectors(), **STEPS)
    closed = []

    def batches():
        try:
            while True:
                yield {"clip_id": np.array([1, 1]), "example_id": np.array([3, 2])}
        finally:
            closed.append(True)

    joined = join_cached(batches(), [TeacherCache(tmp_path, SPEC)])
    np.testing.assert_array_equal(
        next(joined)["teacher/text"], expected_vectors("captions", np.array([3, 2]))["text"]
    )
    joined.close()
    assert closed
