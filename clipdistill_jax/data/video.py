"""Frames of a video file, decoded with PyAV in one sequential pass."""

import dataclasses
import io
import math
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import av.error
import numpy as np
from av.stream import Disposition
from PIL import Image

# A file that ends before this share of its stated length is taken for cut short.
MIN_COVERAGE = 0.5


class UnreadableVideo(ValueError):
    """A file from which no clip can be read.

    Attributes:
      path: the file.
      reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both as args, so that it can be pickled
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """How frames are taken from a video.

    Attributes:
      fps: frames kept a second (CLIP4Clip uses 1).
      max_frames: most frames kept of a clip; of more, a uniform choice over the whole clip.
      size: short side of the stored frames in pixels; bicubic, aspect kept.
      store_square: store only the centre square.
      quality: JPEG quality, 1 to 95.
    """

    fps: float | int = 1.0
    max_frames: int = 32
    size: int = 224
    store_square: bool = False
    quality: int = 90

    def __post_init__(self) -> None:
        for name, low, high in (("max_frames", 1, 10_000), ("size", 8, 4096), ("quality", 1, 95)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} must lie between {low} and {high}")
        if not (math.isfinite(self.fps) and 0 < self.fps <= 240):
            raise ValueError(f"fps={self.fps} must be above 0 and at most 240")


@dataclasses.dataclass(frozen=True)
class VideoFrames:
    """Frames of one clip.

    Attributes:
      frames: JPEG bytes, in time order; at least one.
      timestamps: seconds from the first frame, one a frame.
    """

    frames: tuple[bytes, ...]
    timestamps: tuple[float, ...]


def read_frames(path: str | os.PathLike[str], options: VideoOptions) -> VideoFrames:
    """Decodes `options.fps` frames a second as JPEG.

    The frame kept for second k (k = 0, 1/fps, 2/fps, ...) is the first whose time is k or later, counted from
    the first frame. A frame is kept once, also where it is the first after several such k (a gap in a file of
    variable frame rate). Of more than max_frames, those at linspace(0, n-1, max_frames) remain.
    Rotation metadata is applied. Decoding is single-threaded and never seeks: PyAV can hang with frame
    threads, and seeking a frame at a time costs more than decoding all of them.

    Raises:
      UnreadableVideo: no such file, empty, no video in it, nothing decodes, or it is cut short.
    """
    path = os.fspath(path)
    try:
        if os.path.getsize(path) == 0:
            raise UnreadableVideo(path, "the file is empty (0 bytes)")
        # The whitelist keeps a playlist that poses as a video from opening network addresses.
        with av.open(path, options={"protocol_whitelist": "file"}) as container:
            kept = [
                (time, _jpeg(frame, options)) for time, frame in _pick(_decode(container, path), options.fps)
            ]
    except av.error.FFmpegError as error:
        raise UnreadableVideo(path, _reason(error)) from error
    except OSError as error:
        raise UnreadableVideo(path, error.strerror or str(error)) from error
    if not kept:
        raise UnreadableVideo(path, "it has a video stream but no frame can be decoded")
    if len(kept) > options.max_frames:
        keep = np.linspace(0, len(kept) - 1, options.max_frames).astype(int)
        kept = [kept[k] for k in keep]
    return VideoFrames(tuple(jpeg for _, jpeg in kept), tuple(time for time, _ in kept))


def try_read_frames(path: str | os.PathLike[str], options: VideoOptions) -> VideoFrames | UnreadableVideo:
    """`read_frames` that returns the error, for a pool of worker processes."""
    try:
        return read_frames(path, options)
    except UnreadableVideo as error:
        return error


def _reason(error: av.error.FFmpegError) -> str:
    if isinstance(error, av.error.InvalidDataError):
        return "not a video file, or cut short: no video header can be read"
    return f"it cannot be opened: {error.strerror or error}"


def _decode(container: av.container.InputContainer, path: str) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds from the first frame, frame) of all frames that decode; damaged packets are passed over."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams})
        raise UnreadableVideo(path, f"no video stream; the file holds {', '.join(kinds) or 'no stream'}")
    stream = streams[0]
    stream.codec_context.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    rate = stream.average_rate or stream.guessed_rate
    start: float | None = None
    end = 0.0
    for count, frame in enumerate(_frames(container, stream)):
        time = frame.time
        if time is None:  # raw streams have no timestamps: count
            if not rate:
                raise UnreadableVideo(path, "its frames have no timestamps and the file states no frame rate")
            time = count / float(rate)
        if start is None:
            start = time
        yield time - start, frame
        duration = frame.duration * frame.time_base if frame.duration and frame.time_base else Fraction(0)
        end = max(end, time - start + float(duration))
    stated = _stated_length(container, stream)
    if start is not None and end < MIN_COVERAGE * stated:
        raise UnreadableVideo(path, f"cut short: frames end at {end:.1f} s of {stated:.1f} s")


def _stated_length(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Seconds that the header promises; 0 where it says nothing."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else 0.0


def _frames(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError:
            return  # the file ends amid a packet; the caller compares lengths
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            continue
        yield from frames


def _pick(
    frames: Iterator[tuple[float, av.VideoFrame]], fps: float | int
) -> Iterator[tuple[float, av.VideoFrame]]:
    due = 0  # index of the next moment wanted
    for time, frame in frames:
        # Half a millisecond forgives timestamps that containers round to their clock (1 ms in WebM).
        position = (time + 5e-4) * fps
        if position >= due:
            yield time, frame
            due = math.floor(position) + 1


def _jpeg(frame: av.VideoFrame, options: VideoOptions) -> bytes:
    image = frame.to_image()
    if frame.rotation:  # degrees counter-clockwise from stored to shown
        image = image.rotate(frame.rotation, expand=True)
    return stored_jpeg(image, options)


def stored_jpeg(image: Image.Image, options: VideoOptions) -> bytes:
    """An RGB picture as it is stored: short side `options.size`, or the centre square of that."""
    width, height = image.size
    long_side = int(options.size * max(width, height) / min(width, height))  # truncated, as CLIP does
    shape = (options.size, long_side) if width <= height else (long_side, options.size)
    if shape != image.size:
        image = image.resize(shape, Image.Resampling.BICUBIC)
    if options.store_square:
        left, top = (shape[0] - options.size) // 2, (shape[1] - options.size) // 2
        image = image.crop((left, top, left + options.size, top + options.size))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=options.quality)
    return out.getvalue()
