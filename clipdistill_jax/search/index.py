"""Embeds the videos of a folder, those that are new or changed, and drops those that are gone."""

import dataclasses
import io
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clipdistill_jax.data.formats import Clip
from clipdistill_jax.data.index import write_json
from clipdistill_jax.data.plan import FrameChoice
from clipdistill_jax.data.progress import progress_bar
from clipdistill_jax.data.video import UnreadableVideo, VideoFrames, VideoOptions
from clipdistill_jax.data.workers import available_cores, decode_clips
from clipdistill_jax.export import ExportedModel
from clipdistill_jax.search import shards
from clipdistill_jax.search.shards import Clips

SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov")
SHARD = 128  # clips a shard: what a killed run can lose


class Video(NamedTuple):
    """A file of the folder: path under it with slashes, bytes, time of the last change in nanoseconds."""

    file: str
    size: int
    mtime: int


class Skipped(NamedTuple):
    """A file (or a link) that is not in the index, and why."""

    file: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Indexed:
    """What an index command did.

    Attributes:
      total: clips in the index now.
      new: of these, embedded by this command.
      dropped: clips taken out, because their files are gone or were changed.
      skipped: files left out.
    """

    total: int
    new: int
    dropped: int
    skipped: tuple[Skipped, ...]


def list_videos(root: Path) -> tuple[list[Video], list[Skipped]]:
    """Videos under a folder in the order of their names, and the links that were not followed.

    A video is a regular file that ends as one of `SUFFIXES`, in any case of letters. Links are never
    followed, so nothing outside the folder is read.
    """
    videos: list[Video] = []
    skipped: list[Skipped] = []

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped(os.path.relpath(error.filename, root), f"cannot be listed: {error.strerror}"))

    for where, folders, names in os.walk(root, onerror=unreadable, followlinks=False):
        here = Path(where).relative_to(root)
        links = [name for name in folders if Path(where, name).is_symlink()]
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            found = Path(where, name).lstat()
            if stat.S_ISREG(found.st_mode):
                videos.append(Video((here / name).as_posix(), found.st_size, found.st_mtime_ns))
            elif stat.S_ISLNK(found.st_mode):
                links.append(name)
            else:
                skipped.append(Skipped((here / name).as_posix(), "not a regular file"))
        reason = "a symbolic link, which is not followed"
        skipped += [Skipped((here / name).as_posix(), reason) for name in links]
    return sorted(videos), skipped


def build_index(
    model: ExportedModel,
    model_folder: Path,
    videos: Path,
    out: Path,
    *,
    batch_size: int = 16,
    workers: int | None = None,
    shard_size: int = SHARD,
    progress: bool = True,
) -> Indexed:
    """Brings an index up to date with a folder of videos. Killed at any time, the same call goes on.

    Args:
      model: embeds the clips.
      model_folder: where it was read from, for queries.
      videos: the folder, searched with the folders in it.
      out: folder of the index; made when missing.
      batch_size: clips embedded at a time.
      workers: decoding processes; one a core when None.
      shard_size: clips a file of the index.
      progress: show a progress bar on stderr.

    Raises:
      FileNotFoundError: there is no such folder of videos.
      ValueError: `out` is something else, or an index of another model or folder.
    """
    root, out = videos.expanduser().resolve(), out.expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{videos}: no such folder of videos")
    if batch_size < 1 or (workers is not None and workers < 1):
        raise ValueError(f"batch_size and workers are at least 1; got {batch_size} and {workers}")
    told = {"folder": str(model_folder.expanduser().resolve())}
    told |= {name: model.config[name] for name in ("fingerprint", "video")}
    with shards.locked(out):
        shards.write_manifest(out, {"model": told, "videos": str(root)})
        listed, skipped = list_videos(root)
        kept, dropped = _drop_stale(out, set(listed))
        todo = [video for video in listed if video not in kept]
        new = 0
        rows: list[_Row] = []
        with progress_bar("embedding clips", len(todo), show=progress) as advance:
            for row in _embed(model, root, todo, batch_size, workers or available_cores()):
                if isinstance(row, Skipped):
                    skipped.append(row)
                else:
                    rows.append(row)
                advance(len(skipped))
                if len(rows) == shard_size:
                    shards.append_shard(out, _clips(rows))
                    new, rows = new + len(rows), []
        if rows:
            shards.append_shard(out, _clips(rows))
        new += len(rows)
        write_json(out / shards.SKIPPED, [_shown(found)._asdict() for found in skipped])
    return Indexed(len(kept) + new, new, dropped, tuple(skipped))


def _drop_stale(out: Path, listed: set[Video]) -> tuple[set[Video], int]:
    """Takes clips out of the shards whose files are not as listed: (those that stay, how many went).

    A shard that cannot be read is removed: its clips are embedded again.
    """
    kept: set[Video] = set()
    dropped = 0
    for leavings in out.glob("shard-*.npz.partial"):
        leavings.unlink()
    for path in shards.shards(out):
        try:
            clips = shards.read_shard(path)
        except ValueError:
            logging.warning("%s is damaged: its clips are embedded again", path)
            path.unlink()
            continue
        found = list(map(Video, clips.path.tolist(), clips.size.tolist(), clips.mtime.tolist()))
        stay = [i for i, video in enumerate(found) if video in listed and video not in kept]
        if not stay:
            path.unlink()
        elif len(stay) < len(found):
            shards.write_shard(path, clips.take(np.array(stay)))
        kept.update(found[i] for i in stay)
        dropped += len(found) - len(stay)
    return kept, dropped


class _Row(NamedTuple):
    video: Video
    seconds: float
    vector: np.ndarray
    thumbnail: bytes


def _clips(rows: Sequence[_Row]) -> Clips:
    return Clips(
        path=np.array([row.video.file for row in rows]),
        size=np.array([row.video.size for row in rows], np.int64),
        mtime=np.array([row.video.mtime for row in rows], np.int64),
        seconds=np.array([row.seconds for row in rows], np.float32),
        vector=np.stack([row.vector for row in rows]).astype(np.float32),
        thumbnail=tuple(row.thumbnail for row in rows),
    )


def _embed(
    model: ExportedModel, root: Path, todo: Sequence[Video], batch_size: int, workers: int
) -> Iterator[_Row | Skipped]:
    """A row for each video that can be read, in batches of one shape; the frames as in evaluation."""
    said = model.config["video"]
    size, count = said["image_size"], said["num_frames"]
    options = VideoOptions(said["fps"], said["max_frames"], size, store_square=True)
    clips = [Clip(video.file, root / video.file, (), video.file) for video in todo]
    batch: list[tuple[Video, VideoFrames]] = []
    decoding = zip(todo, decode_clips(clips, options, workers=workers), strict=True)
    for video, (_, decoded) in decoding:
        if isinstance(decoded, UnreadableVideo):
            yield Skipped(video.file, decoded.reason)
            continue
        batch.append((video, decoded))
        if len(batch) == batch_size:
            yield from _encode(model, root, batch, batch_size, count, size)
            batch = []
    if batch:
        yield from _encode(model, root, batch, batch_size, count, size)


def _encode(
    model: ExportedModel,
    root: Path,
    batch: Sequence[tuple[Video, VideoFrames]],
    batch_size: int,
    count: int,
    size: int,
) -> Iterator[_Row]:
    stored = np.array([len(found.frames) for _, found in batch])
    rows = np.arange(len(batch))
    chosen = FrameChoice(stored, count).choose(rows, rows)
    frames = np.zeros((batch_size, count, size, size, 3), np.uint8)  # the last batch is filled up
    frame_mask = np.zeros((batch_size, count), bool)
    frame_mask[: len(batch)] = chosen >= 0
    for row, (_, found) in enumerate(batch):
        for place in np.flatnonzero(chosen[row] >= 0):
            frames[row, place] = _pixels(found.frames[chosen[row, place]])
    vectors = np.asarray(model.encode_video(frames, frame_mask))
    for row, (video, found) in enumerate(batch):
        used = chosen[row][chosen[row] >= 0]
        seconds = _seconds(root / video.file, found)
        yield _Row(video, seconds, vectors[row], found.frames[used[len(used) // 2]])


def _pixels(jpeg: bytes) -> UInt8[np.ndarray, "h w 3"]:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def _seconds(path: Path, found: VideoFrames) -> float:
    """The length that the file states, or where it states none the time of the last frame kept."""
    stated: Any = None
    try:
        with av.open(os.fspath(path), options={"protocol_whitelist": "file"}) as container:
            stated = container.duration
    except (av.error.FFmpegError, OSError):
        pass  # it was readable a moment ago; its vector is good
    return max((stated or 0) / av.time_base, found.timestamps[-1])


def _shown(found: Skipped) -> Skipped:
    return Skipped(shown(found.file), found.reason)


def shown(file: str) -> str:
    """A file's name as text that can be printed: bytes that are no UTF-8 become replacement characters."""
    return os.fsencode(file).decode("utf-8", "replace")
