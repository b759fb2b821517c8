"""Frames of video files: which, how large, and what is refused."""

import io
import pickle
import shutil
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.data.video import (
    UnreadableVideo,
    VideoOptions,
    read_frames,
    try_read_frames,
)
from tests.data.msrvtt_tree import gradient, write_audio, write_video

SMALL = VideoOptions(size=48, quality=95)


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(np.float32)


def reason(path: Path, options: VideoOptions = SMALL) -> str:
    with pytest.raises(UnreadableVideo) as caught:
        read_frames(path, options)
    assert caught.value.path == str(path)
    return caught.value.reason


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi"])
def test_one_frame_a_second_in_order(tmp_path, suffix):
    path = write_video(tmp_path / f"clip{suffix}", seconds=4.5, fps=10)
    clip = read_frames(path, SMALL)
    assert np.allclose(clip.timestamps, [0, 1, 2, 3, 4], atol=2e-3)
    for time, jpeg in zip(clip.timestamps, clip.frames, strict=True):
        image = pixels(jpeg)
        assert image.shape == (48, 64, 3)
        # A frame one second off differs by 20 levels; chroma subsampling and the codec cost a few.
        assert np.abs(image - gradient(time, 64, 48)).mean() < 5


def test_other_rates(tmp_path):
    path = write_video(tmp_path / "clip.mp4", seconds=3, fps=10)
    assert np.allclose(read_frames(path, VideoOptions(fps=2, size=48)).timestamps, np.arange(6) / 2)
    assert np.allclose(read_frames(path, VideoOptions(fps=0.5, size=48)).timestamps, [0, 2])
    assert (
        len(read_frames(path, VideoOptions(fps=240, size=48, max_frames=100)).frames) == 30
    )  # all there are


def test_first_frame_at_or_after_each_second(tmp_path):
    times = [0.0, 0.4, 0.9, 1.3, 1.4, 2.0, 5.5, 5.6, 6.0, 6.1]
    path = write_video(tmp_path / "clip.mp4", times=times)
    clip = read_frames(path, SMALL)
    # Nothing lies in seconds 3 and 4; the frame at 5.5 is the first after them and is kept once.
    assert np.allclose(clip.timestamps, [0.0, 1.3, 2.0, 5.5, 6.0], atol=2e-3)
    for time, jpeg in zip([0.0, 1.3, 2.0, 5.5, 6.0], clip.frames, strict=True):
        assert np.abs(pixels(jpeg) - gradient(time, 64, 48)).mean() < 5


def test_long_clips_are_thinned_over_their_whole_length(tmp_path):
    path = write_video(tmp_path / "clip.mp4", seconds=10, fps=5)
    clip = read_frames(path, VideoOptions(size=48, max_frames=4))
    assert np.allclose(clip.timestamps, [0, 3, 6, 9])
    assert len(read_frames(path, VideoOptions(size=48, max_frames=10)).frames) == 10
    assert np.allclose(read_frames(path, VideoOptions(size=48, max_frames=1)).timestamps, [0])


@pytest.mark.parametrize(
    ("width", "height", "square", "expected"),
    [
        (64, 48, False, (42, 32)),
        (48, 64, False, (32, 42)),
        (64, 48, True, (32, 32)),
        (16, 16, False, (32, 32)),
        (100, 30, False, (106, 32)),
    ],
)
def test_short_side(tmp_path, width, height, square, expected):
    path = write_video(tmp_path / "clip.mp4", seconds=1, width=width, height=height)
    clip = read_frames(path, VideoOptions(size=32, store_square=square))
    assert Image.open(io.BytesIO(clip.frames[0])).size == expected


def test_centre_square_is_the_middle(tmp_path):
    path = write_video(tmp_path / "clip.mp4", seconds=1, width=96, height=48)
    square = read_frames(path, VideoOptions(size=48, store_square=True, quality=95))
    # The second encoding of the same pixels starts its 8 x 8 blocks elsewhere: a few levels.
    assert np.abs(pixels(square.frames[0]) - gradient(0, 96, 48)[:, 24:72]).mean() < 5


@pytest.mark.parametrize(("degrees", "turns"), [(90, -1), (180, 2), (270, 1)])
def test_rotation_metadata(tmp_path, degrees, turns):
    """A phone's clip: stored lying, to be shown turned clockwise by `degrees`."""
    path = write_video(tmp_path / "clip.mp4", seconds=1)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 32 + 4  # version and flags, times and ids, layer and volume
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one = 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    at = data.index(identity, at - 8)
    data[at : at + 36] = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    image = pixels(read_frames(path, SMALL).frames[0])
    expected = np.rot90(gradient(0, 64, 48), turns)
    assert image.shape == expected.shape
    assert np.abs(image - expected).mean() < 5


def test_grey_and_other_pixel_formats(tmp_path):
    grey = write_video(tmp_path / "grey.mp4", seconds=1, pix_fmt="gray")
    image = pixels(read_frames(grey, SMALL).frames[0])
    assert np.ptp(image, axis=-1).max() == 0
    luma = gradient(0, 64, 48) @ np.array([0.299, 0.587, 0.114])
    shown = np.clip((luma - 16) * 255 / 219, 0, 255)  # the stream is marked as of video range
    assert np.abs(image[..., 0] - shown).mean() < 5
    full = write_video(tmp_path / "full.mp4", seconds=1, pix_fmt="yuv444p")
    assert np.abs(pixels(read_frames(full, SMALL).frames[0]) - gradient(0, 64, 48)).mean() < 5


def test_no_timestamps(tmp_path):
    """A raw stream under another name: frames are counted at the rate the stream states."""
    path = write_video(tmp_path / "clip.mp4", seconds=3, fps=25)
    raw = tmp_path / "raw.mp4"
    with av.open(str(path)) as source, av.open(str(raw), "w", format="h264") as sink:
        stream = source.streams.video[0]
        out = sink.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = out
                sink.mux(packet)
    clip = read_frames(raw, SMALL)
    assert len(clip.frames) == 3
    assert np.allclose(clip.timestamps, [0, 1, 2], atol=0.05)


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    write_audio(path)
    assert "no video stream" in reason(path)
    assert "audio" in reason(path)


def test_unreadable_files(tmp_path):
    good = write_video(tmp_path / "good.mp4", seconds=4, fps=10)
    data = good.read_bytes()

    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    assert "empty" in reason(file("empty.mp4", b""))
    assert "not a video file, or cut short" in reason(file("truncated.mp4", data[: len(data) // 2]))
    assert "not a video file" in reason(file("text.mp4", b"these are no moving pictures\n" * 50))
    assert "not a video file" in reason(file("noise.mp4", np.random.default_rng(0).bytes(5000)))
    assert "No such file" in reason(tmp_path / "missing.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert "directory" in reason(tmp_path / "folder.mp4")
    playlist = f"#EXTM3U\n#EXTINF:4,\nfile://{good}\n#EXT-X-ENDLIST\n"
    assert reason(file("list.mp4", playlist.encode()))


def test_file_cut_short_behind_its_header(tmp_path):
    """With the index in front the file opens and plays until the cut."""
    flags = {"movflags": "faststart"}
    path = write_video(tmp_path / "clip.mp4", seconds=10, fps=10, container_options=flags, options={"g": "5"})
    data = path.read_bytes()
    start = data.index(b"mdat")
    whole = read_frames(path, SMALL)
    early = tmp_path / "early.mp4"
    early.write_bytes(data[: start + (len(data) - start) // 5])
    assert "cut short: frames end at" in reason(early)
    assert "of 10.0 s" in reason(early)
    late = tmp_path / "late.mp4"
    late.write_bytes(data[: start + (len(data) - start) * 9 // 10])
    assert 7 <= len(read_frames(late, SMALL).frames) < len(whole.frames) == 10


def test_damage_inside_is_passed_over(tmp_path):
    path = write_video(tmp_path / "clip.mp4", seconds=6, fps=10, options={"g": "5"})
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + 2000
    data[middle : middle + 300] = bytes(300)
    path.write_bytes(data)
    clip = read_frames(path, SMALL)
    assert 4 <= len(clip.frames) <= 6
    assert list(clip.timestamps) == sorted(set(clip.timestamps))


def test_error_travels_between_processes(tmp_path):
    error = try_read_frames(tmp_path / "none.mp4", SMALL)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, UnreadableVideo)
    assert (copy.path, copy.reason, str(copy)) == (error.path, error.reason, str(error))
    assert str(error) == f"{tmp_path / 'none.mp4'}: {error.reason}"


@pytest.mark.parametrize(
    "bad", [{"fps": 0}, {"fps": float("nan")}, {"max_frames": 0}, {"size": 0}, {"quality": 101}]
)
def test_options_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VideoOptions(**bad)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("lion.mp4", 9), ("parakeet.mp4", 9), ("bikes.mp4", 10), ("bigbuckbunny.mp4", 6), ("gradio_b.avi", 6)],
)
def test_real_clips(shared_data, tmp_path, name, seconds):
    path = tmp_path / name  # the samples are read-only
    shutil.copy(shared_data / "clips" / name, path)
    options = VideoOptions(size=64, quality=95)
    clip = read_frames(path, options)
    assert np.allclose(clip.timestamps, np.arange(seconds), atol=1e-3)
    # The same frames, found by counting in a plain decode of the file.
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        wanted = {round(k * rate): k for k in range(seconds)}
        for count, frame in enumerate(container.decode(video=0)):
            if count in wanted:
                image = frame.to_image()
                short = min(image.size)
                size = tuple(int(64 * side / short) for side in image.size)
                expected = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
                found = pixels(clip.frames[wanted[count]])
                assert found.shape == expected.shape
                assert np.abs(found - expected).mean() < 4  # JPEG's own loss at quality 95
