"""Finds clips of a folder by text, with an exported model.

    python -m clipdistill_jax.search index MODEL VIDEOS --out=INDEX
    python -m clipdistill_jax.search query INDEX "a red circle moves left" --top=5 --html=page.html

The first command can be stopped and repeated: it embeds what is new or changed. JAX_PLATFORMS=cpu keeps
it off a GPU.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clipdistill_jax.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed the videos of a folder", allow_abbrev=False)
    index.add_argument("model", type=Path, help="folder that clipdistill_jax.export wrote")
    index.add_argument("videos", type=Path, help="folder of videos; the folders in it count too")
    index.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder of the index")
    index.add_argument("--batch_size", type=int, default=16, help="clips embedded at a time")
    index.add_argument("--workers", type=int, default=None, help="decoding processes; default one a core")
    query = commands.add_parser("query", help="find clips by text", allow_abbrev=False)
    query.add_argument("index", type=Path, help="folder of the index")
    query.add_argument("text", help="what to look for")
    query.add_argument("--top", type=int, default=5, help="clips to show")
    query.add_argument("--model", type=Path, default=None, help="the exported model, if it was moved")
    query.add_argument("--html", type=Path, default=None, metavar="FILE", help="write a page there too")
    query.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        return _index(args) if args.command == "index" else _query(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def _index(args: argparse.Namespace) -> int:
    # Imported here, so that a mistake in the command is told at once.
    from clipdistill_jax.export import load_exported
    from clipdistill_jax.search import shards
    from clipdistill_jax.search.index import build_index, shown

    model = load_exported(args.model)
    done = build_index(
        model, args.model, args.videos, args.out, batch_size=args.batch_size, workers=args.workers
    )
    dropped = f", {done.dropped} taken out (gone or changed)" if done.dropped else ""
    print(f"{args.out}: {done.total} clips, {done.new} of them new{dropped}")
    if done.skipped:
        print(f"{len(done.skipped)} skipped, all listed in {args.out / shards.SKIPPED}:")
        for file, reason in done.skipped[:10]:
            print(f"  {shown(file)}: {reason}")
    return 0


def _query(args: argparse.Namespace) -> int:
    from clipdistill_jax.search.query import as_json, as_page, as_table, find

    hits = find(args.index, args.text, args.top, args.model)
    if args.html is not None:
        args.html.expanduser().write_text(as_page(args.text, hits), encoding="utf-8")
    if args.json:
        print(json.dumps(as_json(args.text, hits)))
    else:
        Console().print(as_table(args.text, hits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
