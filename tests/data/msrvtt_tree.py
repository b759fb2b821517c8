"""Writes small MSR-VTT trees with PyAV: moving gradients of a few seconds."""

import csv
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def gradient(t: float, width: int, height: int, hue: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: red grows with x and by 20 levels a second, green with y; blue is the hue."""
    x = np.linspace(0, 100, width)[None, :] + 20 * t
    y = np.linspace(0, 150, height)[:, None]
    image = np.stack(np.broadcast_arrays(x, y, np.full((1, 1), hue % 200 + 20)), axis=-1)
    return image.astype(np.uint8)


def write_video(
    path: Path,
    *,
    seconds: float = 4.0,
    fps: int = 10,
    width: int = 64,
    height: int = 48,
    codec: str | None = None,
    pix_fmt: str | None = None,
    hue: int = 0,
    times: list[float] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes `seconds` of `gradient`; `times` gives frames at those seconds instead (variable frame rate)."""
    codec = codec or {".mp4": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}[path.suffix]
    times = times if times is not None else [k / fps for k in range(round(seconds * fps))]
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = width, height
        stream.pix_fmt = pix_fmt or "yuv420p"
        stream.bit_rate = 2_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000 if codec != "mpeg4" else fps)
        for time in times:
            frame = av.VideoFrame.from_ndarray(gradient(time, width, height, hue), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(time / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        samples = np.zeros((1, int(16000 * seconds)), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def captions_of(k: int) -> list[str]:
    return [
        f"a gradient number {k} moves right",
        f"the {k}th gradient; it moves, slowly",
        f"colours of clip {k}",
    ]


def write_tree(
    root: Path,
    *,
    train: int = 6,
    validation: int = 2,
    test: int = 2,
    delimiter: str = ",",
    list_name: str = "9k",
    size: tuple[int, int] = (64, 48),
) -> Path:
    """An MSR-VTT tree; clip k is video{k}, lasts 3 + k % 6 seconds, and has three captions in the json."""
    videos = root / "videos"
    videos.mkdir(parents=True)
    ids = [f"video{k}" for k in range(train + validation + test)]
    for k, video_id in enumerate(ids):
        suffix = (".mp4", ".webm", ".avi")[k % 3]
        write_video(
            videos / (video_id + suffix), seconds=3 + k % 6, hue=20 * k, width=size[0], height=size[1]
        )
    data = {
        "videos": [{"video_id": i, "url": f"https://example.org/{i}"} for i in ids],
        "sentences": [
            {"video_id": i, "caption": caption} for k, i in enumerate(ids) for caption in captions_of(k)
        ],
    }
    (root / "MSRVTT_data.json").write_text(json.dumps(data))
    write_list(root / f"MSRVTT_train.{list_name}.csv", [[i] for i in ids[:train]], ["video_id"], delimiter)
    columns = ["key", "vid_key", "video_id", "sentence"]

    def rows(start: int, stop: int) -> list[list[str]]:
        return [[f"ret{k}", f"msr{k}", ids[k], captions_of(k)[1]] for k in range(start, stop)]

    if validation:
        write_list(root / "MSRVTT_val.csv", rows(train, train + validation), columns, delimiter)
    write_list(root / "MSRVTT_JSFUSION_test.csv", rows(train + validation, len(ids)), columns, delimiter)
    return root


def write_list(path: Path, rows: list[list[str]], columns: list[str], delimiter: str = ",") -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(rows)
