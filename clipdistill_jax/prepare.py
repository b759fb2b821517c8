"""Reads a raw dataset once and writes records that training reads at random.

python -m clipdistill_jax.prepare --format=msrvtt --source=DIR --out=DIR
python -m clipdistill_jax.prepare regions --help    # features of boxes in images
"""

import argparse
import dataclasses
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill_jax.data import index as files
from clipdistill_jax.data.formats import FORMATS, Clip, ClipSplits, Problem, reader, reader_options
from clipdistill_jax.data.prepared import is_prepared, locked, same_manifest
from clipdistill_jax.data.progress import progress_bar
from clipdistill_jax.data.video import UnreadableVideo, VideoFrames, VideoOptions
from clipdistill_jax.data.workers import available_cores

LAYOUT = 1  # raised when newer code no longer reads what older code prepared
_UNREADABLE = ("missing_video", "unreadable_video")


class TooManyUnreadable(ValueError):
    """More of the listed media are missing or broken than `max_unreadable` allows."""


def prepare_dataset(
    format: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    video: VideoOptions | None = None,
    workers: int | None = None,
    max_unreadable: float | int = 0.05,
    progress: bool = True,
    **options_of_reader: Any,
) -> dict[str, Any]:
    """Prepares the raw tree of a dataset, or finds it prepared.

    Args:
      format: a name of `data.formats.FORMATS`.
      source: the raw tree, see the format's module. Where `out` is prepared already it may be absent.
      out: folder of the result: clips/ (TFDS, ArrayRecord), index/ (captions), manifest.json (written last).
      video: how frames are taken; `VideoOptions()` when None.
      workers: decoding processes; one a core when None.
      max_unreadable: largest fraction of the listed clips that may be missing or broken.
      progress: show a progress bar on stderr, or a line every half minute where that is no terminal.
      options_of_reader: what the format's reader takes, e.g. `num_validation` of MSR-VTT and ActivityNet.

    Returns:
      The manifest: options, source, splits (listed, clips, captions, frames), notes, counts of problems by
      kind, skipped (media left out: file, record, reason), problems (the other ones).

    Raises:
      FileNotFoundError, FormatError: the tree lacks a file or has another structure.
      TooManyUnreadable: see max_unreadable.
      ValueError: there is no such format, its reader has no such option, or `out` was prepared with other
        options or from other files, or holds something else.
    """
    video = video or VideoOptions()
    workers = workers or available_cores()
    if not 0 <= max_unreadable <= 1:
        raise ValueError(f"max_unreadable={max_unreadable} must be a fraction, 0 to 1")
    source, out = Path(source), Path(out)
    read_options = reader_options(format)
    for name in options_of_reader.keys() - read_options.keys():
        known = ", ".join(read_options) or "none"
        raise ValueError(f"the format {format!r} has no option {name!r} (it has {known})")
    read_options.update(options_of_reader)
    options = {"format": format, "layout": LAYOUT, **read_options, **dataclasses.asdict(video)}

    def read() -> ClipSplits:
        return reader(format)(source, **read_options)

    if is_prepared(out):
        return same_manifest(out, options, source, read().fingerprint if source.exists() else None)
    clips = read()
    with locked(out):
        if is_prepared(out):  # by another process, while this one waited
            return same_manifest(out, options, source, clips.fingerprint)
        manifest = _prepare(clips, out, video, workers, max_unreadable, progress)
        manifest["options"] = options
        manifest["source"] = {"path": str(source.resolve()), "fingerprint": clips.fingerprint}
        files.write_json(out / files.MANIFEST, manifest)
    return manifest


def _prepare(
    clips: ClipSplits,
    out: Path,
    video: VideoOptions,
    workers: int,
    max_unreadable: float | int,
    progress: bool,
) -> dict[str, Any]:
    from clipdistill_jax.data import builder  # here, so that workers that import this file stay light

    for leavings in (builder.ClipRecords.name, files.INDEX):  # of a run that was stopped
        shutil.rmtree(out / leavings, ignore_errors=True)
    problems = list(clips.problems)
    listed = sum(clips.listed.values())
    _check_unreadable(problems, listed, max_unreadable)
    rows: dict[str, list[tuple[Clip, int]]] = {split: [] for split in clips.splits}
    with progress_bar("preparing clips", sum(map(len, clips.splits.values())), show=progress) as advance:

        def on_clip(split: str, clip: Clip, decoded: VideoFrames | UnreadableVideo) -> None:
            if isinstance(decoded, VideoFrames):
                rows[split].append((clip, len(decoded.frames)))
            else:
                record = f"{clip.record}, video_id {clip.video_id!r}"
                problems.append(Problem("unreadable_video", split, str(clip.path), record, decoded.reason))
                _check_unreadable(problems, listed, max_unreadable)
            advance(sum(p.kind in _UNREADABLE for p in problems))

        builder.write_records(clips.splits, out, video, workers=workers, on_clip=on_clip)
    for split, pairs in rows.items():
        index = files.SplitIndex(
            video_ids=tuple(clip.video_id for clip, _ in pairs),
            captions=tuple(clip.captions for clip, _ in pairs),
            num_frames=tuple(count for _, count in pairs),
        )
        files.write_index(out, split, index)
    return {
        "splits": {
            split: {
                "listed": clips.listed[split],
                "clips": len(pairs),
                "captions": sum(len(clip.captions) for clip, _ in pairs),
                "frames": sum(count for _, count in pairs),
            }
            for split, pairs in rows.items()
        },
        "notes": list(clips.notes),
        "counts": dict(Counter(p.kind for p in problems)),
        "skipped": [dataclasses.asdict(p) for p in problems if p.kind in _UNREADABLE],
        "problems": [dataclasses.asdict(p) for p in problems if p.kind not in _UNREADABLE],
    }


def _check_unreadable(problems: list[Problem], listed: int, max_unreadable: float | int) -> None:
    bad = [p for p in problems if p.kind in _UNREADABLE]
    if len(bad) > max_unreadable * listed:
        first = "".join(f"\n  {p.file}, {p.record}: {p.reason}" for p in bad[:5])
        raise TooManyUnreadable(
            f"{len(bad)} of the {listed} listed clips are missing or unreadable, more than "
            f"max_unreadable={max_unreadable} allows. Mend them, or allow more. The first:{first}"
        )


def _report(manifest: dict[str, Any], out: Path) -> str:
    lines = [f"{out}:"]
    for split, n in manifest["splits"].items():
        left_out = n["listed"] - n["clips"]
        lines.append(
            f"  {split}: {n['clips']} clips, {n['captions']} captions, {n['frames']} frames"
            + (f"; {left_out} of {n['listed']} left out" if left_out else "")
        )
    lines += [f"  note: {note}" for note in manifest["notes"]]
    counts = manifest["counts"].items()
    lines += [f"  {count} x {kind} (listed in {files.MANIFEST})" for kind, count in counts]
    lines += [f"    {p['file']}, {p['record']}: {p['reason']}" for p in manifest["skipped"][:10]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "regions":
        from clipdistill_jax import prepare_regions  # needs JAX, the rest here does not

        return prepare_regions.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m clipdistill_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="how the raw tree is laid out")
    parser.add_argument("--source", required=True, help="the raw tree")
    parser.add_argument("--out", required=True, help="folder of the prepared records")
    parser.add_argument("--train", help="msrvtt: which train list, 9k (default) or 7k")
    parser.add_argument(
        "--restval",
        action=argparse.BooleanOptionalAction,
        help="karpathy: images of COCO's restval are for training; default yes",
    )
    parser.add_argument(
        "--num_validation",
        type=int,
        help="msrvtt, activitynet: train clips held out where there is no validation list; default 500",
    )
    defaults = VideoOptions()
    parser.add_argument("--fps", type=float, default=defaults.fps, help="frames kept a second")
    parser.add_argument("--max_frames", type=int, default=defaults.max_frames, help="most frames of a clip")
    parser.add_argument("--size", type=int, default=defaults.size, help="short side in pixels")
    parser.add_argument("--store_square", action="store_true", help="keep the centre square only")
    parser.add_argument("--quality", type=int, default=defaults.quality, help="JPEG quality")
    parser.add_argument("--workers", type=int, default=None, help="decoding processes; default one a core")
    parser.add_argument("--max_unreadable", type=float, default=0.05, help="fraction of clips")
    args = parser.parse_args(argv)
    given = {"train": args.train, "num_validation": args.num_validation, "restval": args.restval}
    try:
        video = VideoOptions(args.fps, args.max_frames, args.size, args.store_square, args.quality)
        manifest = prepare_dataset(
            args.format,
            args.source,
            args.out,
            video=video,
            workers=args.workers,
            max_unreadable=args.max_unreadable,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_report(manifest, Path(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
