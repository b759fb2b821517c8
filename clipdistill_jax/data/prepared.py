"""A folder of prepared records: made once, by one process at a time, and recognised when asked for again."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipdistill_jax.data import index as files

_LOCK = ".prepare.lock"


def is_prepared(out: Path) -> bool:
    """Whether a preparation of this folder came to its end."""
    return (out / files.MANIFEST).is_file()


def same_manifest(
    out: Path, options: dict[str, Any], source: Path, fingerprint: str | None
) -> dict[str, Any]:
    """The manifest of a prepared folder, if it is of these options and (where known) of these files.

    Raises:
      ValueError: it is not; says what differs.
    """
    manifest = files.read_manifest(out)
    before = manifest["options"]
    other = [k for k in (*options, *(before.keys() - options.keys())) if before.get(k) != options.get(k)]
    if other:
        changes = ", ".join(f"{k}={before.get(k)!r} (now {options.get(k)!r})" for k in other)
        raise ValueError(f"{out} was prepared with {changes}. Give another folder, or remove this one.")
    if fingerprint not in (None, manifest["source"]["fingerprint"]):
        raise ValueError(
            f"{out} was prepared from {manifest['source']['path']}; the annotations or media in {source} "
            "are not the same as then. Give another folder, or remove this one."
        )
    return manifest


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """One preparation a folder at a time. The lock file also tells a folder of ours from any other.

    Raises:
      ValueError: the folder holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / _LOCK).exists():
        raise ValueError(
            f"{out} is not empty and not of this program's making: give a new or an empty folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    with open(out / _LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
