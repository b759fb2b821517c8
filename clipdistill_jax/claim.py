"""Folders that one process at a time works in, on one machine or on several that share a file system."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

CLAIM = "claim.json"


class ClaimLost(RuntimeError):
    """Another process has taken a claim over."""


class Claim:
    """A folder's claim, held by this process: a file that only one can create."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._said = json.dumps({"host": socket.gethostname(), "pids": [os.getpid()], "time": time.time()})
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        with os.fdopen(descriptor, "w") as out:
            out.write(self._said)

    def beat(self, child: int | None = None) -> None:
        """Shows a sign of life. While `child`, a process that does the work, lives, the claim holds too.

        Raises:
          ClaimLost: another process has taken it over.
        """
        now = text(self._file)
        if now != self._said:
            raise ClaimLost(f"{self._file}: taken over by {now or 'nobody'}")
        if child is not None:
            self._said = json.dumps({**json.loads(now), "pids": [os.getpid(), child]})
            write_whole(self._file, self._said)
        os.utime(self._file)

    def release(self) -> None:
        """Gives it up, if it is not lost."""
        if text(self._file) == self._said:
            self._file.unlink()


@contextlib.contextmanager
def claimed(folder: Path, stale_minutes: float | int) -> Iterator[Claim | None]:
    """Holds the claim of a folder, which is made where it is missing; None where somebody else holds it.

    A claim of this host whose processes are all dead is taken over at once, any other `stale_minutes` after
    its last sign of life.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CLAIM
    _take_away_stale(file, stale_minutes)
    try:
        claim = Claim(file)
    except FileExistsError:
        yield None
        return
    try:
        yield claim
    finally:
        claim.release()


def _take_away_stale(file: Path, stale_minutes: float | int) -> None:
    said = text(file)
    if said is None or not _stale(file, said, stale_minutes):
        return
    # Of several that find it stale one moves it. What it moved may be a claim made since: that is put back.
    aside = file.with_name(f".{CLAIM}.{socket.gethostname()}.{os.getpid()}")
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return
    if text(aside) != said:
        with contextlib.suppress(FileExistsError):
            os.link(aside, file)
    aside.unlink()


def _stale(file: Path, said: str, stale_minutes: float | int) -> bool:
    try:
        owner = json.loads(said)
        if owner["host"] == socket.gethostname() and not any(map(_alive, owner["pids"])):
            return True
    except (ValueError, KeyError, TypeError):
        pass  # cut short: whose it is cannot be told
    try:
        return time.time() - file.stat().st_mtime > 60 * stale_minutes
    except FileNotFoundError:
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def text(file: Path) -> str | None:
    """What a file says; None where there is none."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def write_whole(file: Path, content: str) -> None:
    """Writes a file so that nobody reads a part of it."""
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(content)
    os.replace(temporary, file)
