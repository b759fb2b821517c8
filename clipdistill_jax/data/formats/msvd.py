"""MSVD as it lies on disk for text-video retrieval.

Files, as CLIP4Clip reads them (dataloaders/dataloader_msvd_retrieval.py:43-89):
  train_list.txt, val_list.txt, test_list.txt   one id a line: 1200, 100 and 670 clips
  raw-captions.pkl   a pickle of {id: [[word, ...], ...]}, about 40 captions a clip, each a list of its words
  videos/            {id}.avi (or .mp4, .webm, .mkv)

Every caption is used in every split: in evaluation each is a query of its own.
"""

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.assembly import Row, assemble, check_source, usable, video_names
from clipdistill_jax.data.formats.clips import ClipSplits, FormatError, Problem

LISTS = {"train": "train_list.txt", "validation": "val_list.txt", "test": "test_list.txt"}
CAPTIONS = "raw-captions.pkl"
VIDEO_FOLDERS = ("videos", "MSVD_Videos", "YouTubeClips")

# A pickle of these opcodes builds plain values and calls nothing.
_PLAIN_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT DICT SETITEM SETITEMS"
)


def read(source: str | os.PathLike[str]) -> ClipSplits:
    """Lists the clips of an MSVD tree; opens no video.

    Raises:
      FileNotFoundError: a needed file or the videos folder is absent.
      FormatError: a file is cut short or has another structure, the pickle holds anything but plain values,
        an id repeats, is in two splits or points out of the folder.
    """
    source = check_source(source, CAPTIONS)
    problems: list[Problem] = []
    captions = _read_captions(source / CAPTIONS, problems)
    rows = {
        split: [
            Row(name, source / file, f"line {line}", captions.get(name), CAPTIONS, video_names(name))
            for line, name in checked.read_ids(source / file)
        ]
        for split, file in LISTS.items()
    }
    return assemble(rows, source, VIDEO_FOLDERS, [source / CAPTIONS], problems, [])


def _read_captions(path: Path, problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    """id -> its captions in the order of the file. Empty ones are noted and left out."""
    data = read_plain_pickle(path)
    if not isinstance(data, dict):
        raise FormatError(f"{path}: expected a dictionary of id -> captions, found {type(data).__name__}")
    captions: dict[str, list[str]] = {}
    for key, many in data.items():
        video_id = _text(key, f"{path}, the id {key!r}")
        if not isinstance(many, list | tuple):
            found = type(many).__name__
            raise FormatError(f"{path}, {video_id!r}: expected a list of captions, found {found}")
        for k, words in enumerate(many):
            record = f"{video_id!r}, caption {k}"
            if isinstance(words, list | tuple):
                caption = " ".join(_text(word, f"{path}, {record}") for word in words)
            else:
                caption = _text(words, f"{path}, {record}")
            if usable(caption, problems, "", path.name, record):
                captions.setdefault(video_id, []).append(caption)
    return {video_id: tuple(said) for video_id, said in captions.items()}


def _text(value: Any, where: str) -> str:
    """A string of the pickle; bytes are those of Python 2, in UTF-8 or else in Latin-1."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")
    if not isinstance(value, str):
        raise FormatError(f"{where}: expected text, found {type(value).__name__} {str(value)[:40]!r}")
    return value


class _PlainUnpickler(pickle.Unpickler):
    """The second lock: even an opcode that got past the first finds no name to call."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for an object outside of the file")


def read_plain_pickle(path: Path) -> Any:
    """Reads a pickle of dictionaries, lists, tuples, text, bytes and numbers, and nothing else.

    A pickle is a program that may call any function. Here its opcodes are looked through first, and a file
    with one that could name, build or call an object is refused before any of it runs. Strings written by
    Python 2 come back as bytes (those of its protocol 0 must be ASCII).

    Raises:
      FileNotFoundError: the file is absent.
      FormatError: it asks for more than plain values, or is no whole pickle. The message gives the byte.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    data = path.read_bytes()
    plain = frozenset(_PLAIN_OPCODES.split())
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name not in plain:
                name = f" {argument!r}" if isinstance(argument, str) else ""
                raise FormatError(
                    f"{path}, byte {position}: refused: it builds objects ({opcode.name}{name}), and such a "
                    "pickle can run any code. Only dictionaries, lists, text and numbers are read; take the "
                    "dataset's own file, or write these values as plain ones"
                )
            # Unpickling makes room for as many entries as the largest number asked for.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(data):
                raise FormatError(f"{path}, byte {position}: refused: it asks for room for {argument} values")
        return _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except FormatError:
        raise
    except Exception as error:  # a malformed pickle raises nearly any of them
        reason = f"{type(error).__name__}: {error}"
        raise FormatError(
            f"{path}: not a whole pickle ({reason}); if it is cut short, copy it again"
        ) from error
