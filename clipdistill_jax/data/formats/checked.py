"""Reading annotation files with errors that name the file, the record and the field."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clipdistill_jax.data.formats.clips import FormatError

_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """The file as UTF-8 text, without a byte order mark.

    Raises:
      FileNotFoundError: the file is absent.
      FormatError: it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8 text (byte {error.start}): {error.reason}"
        raise FormatError(f"{path}, line {line}: {reason}") from error


def read_json(path: Path, *, any_text: bool = False, unique: bool = False) -> Any:
    """Parses one JSON value.

    Args:
      path: the file.
      any_text: texts need not be valid Unicode; the caller looks at each.
      unique: no object in it may have a name twice; else the last counts, as is usual.

    Raises:
      FileNotFoundError: the file is absent.
      FormatError: it is not JSON, a text in it is none, or a name occurs twice; the message says so where
        the file ends too early.
    """
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=partial(_unique, path) if unique else None)
        if not any_text:
            check_characters(value, text, str(path))
        return value
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        hint = "; the file seems to be cut short: copy it again" if at_end else ""
        raise FormatError(
            f"{path}, line {error.lineno}, column {error.colno} (character {error.pos} of {len(text)}): "
            f"not valid JSON: {error.msg}{hint}"
        ) from error
    except RecursionError as error:
        raise FormatError(f"{path}: the JSON is nested too deeply") from error


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise FormatError(f"{path}: {twice!r} occurs twice")
    return found


def check_characters(value: Any, text: str, where: str) -> None:
    """Refuses half a character: JSON can say "\\ud83d" without the half that follows, but it is no text.

    Args:
      value: what `text` says.
      text: JSON.
      where: names the file and the record in the error.

    Raises:
      FormatError: names the field that holds one.
    """
    if _HALF_ESCAPED.search(text):  # whole characters are escaped so too, in two halves
        for place, found in _texts(value, ""):
            if half := _HALF.search(found):
                raise FormatError(
                    f"{where}: the field {place.removeprefix('.')!r} has half a character, {half[0]!r}"
                )


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, names of fields too, and where it stands."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, list):
        for k, item in enumerate(value):
            yield from _texts(item, f"{place}[{k}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"{place}.{name}", name
            yield from _texts(item, f"{place}.{name}")


def field(record: Any, name: str, kind: type, where: str) -> Any:
    """`record[name]`, which must be of type `kind`; `where` names the file and the record in the error.

    Raises:
      FormatError: the record is no object, has no such field, or the field has another type.
    """
    if not isinstance(record, dict):
        raise FormatError(f"{where}: expected an object with {name!r}, found {type(record).__name__}")
    if name not in record:
        raise FormatError(f"{where}: the field {name!r} is missing; it has {sorted(record)}")
    value = record[name]
    if not isinstance(value, kind):
        raise FormatError(
            f"{where}: the field {name!r} should be a {kind.__name__}, found {type(value).__name__} "
            f"{str(value)[:40]!r}"
        )
    return value


def read_csv(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Rows as (line number, {column: value}); separated by `,` or `;` or tabs, whichever shows `columns`.

    Raises:
      FileNotFoundError: the file is absent.
      FormatError: a column is missing, a row has more or fewer fields than the header, a quote is not
        closed, or there is no row at all.
    """
    text = read_text(path)
    for delimiter in (",", ";", "\t"):
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        header = [name.strip() for name in header]
        if set(columns) <= set(header):
            break
    else:
        found = text.partition("\n")[0].strip()[:200] or "nothing"
        raise FormatError(f"{path}, line 1: needs the columns {', '.join(columns)}; found: {found}")
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        next(reader)
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            if len(values) != len(header):
                raise FormatError(
                    f"{path}, line {reader.line_num}: {len(values)} fields, the header has {len(header)}; "
                    f"quote a field that contains {delimiter!r}: {delimiter.join(values)[:80]!r}"
                )
            rows.append((reader.line_num, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise FormatError(f"{path}, line {reader.line_num}: not a valid csv row: {error}") from error
    if not rows:
        raise FormatError(f"{path}: the list is empty, only a header is there")
    return rows


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, as (line number, text without the line break).

    Raises:
      FileNotFoundError: the file is absent.
      FormatError: it is not UTF-8, or has no such line.
    """
    # Not splitlines(), which also parts a caption at the rarer breaks of Unicode.
    lines = [(k, line.rstrip("\r")) for k, line in enumerate(read_text(path).split("\n"), 1)]
    lines = [(k, line) for k, line in lines if line.strip()]
    if not lines:
        raise FormatError(f"{path}: the list is empty")
    return lines


def read_ids(path: Path) -> list[tuple[int, str]]:
    """A list of ids, one a line, as (line number, id).

    Raises:
      FileNotFoundError: the file is absent.
      FormatError: it is empty, or an id repeats or could lead out of the data folder.
    """
    seen: dict[str, str] = {}
    ids = [(line, text.strip()) for line, text in read_lines(path)]
    for line, video_id in ids:
        check_file_stem(video_id, f"{path}, line {line}")
        check_unique(video_id, f"{path}, line {line}", seen)
    return ids


def check_file_stem(name: str, where: str) -> None:
    """Refuses a name from an annotation file that could lead out of its folder.

    Raises:
      FormatError: `name` is empty or has '..', a path separator or a control character.
    """
    if not name:
        raise FormatError(f"{where}: the id is empty")
    if ".." in name or any(c in "/\\" or ord(c) < 32 for c in name):
        raise FormatError(
            f"{where}: the id {name!r} is refused: '..', path separators and control characters could lead "
            "out of the data folder"
        )


def check_unique(name: str, where: str, seen: dict[str, str], what: str = "id") -> None:
    """Notes `name` in `seen` (name -> where it was); `what` it is, or the field it is from, is for the error.

    Raises:
      FormatError: it was there already.
    """
    if name in seen:
        raise FormatError(f"{where}: the {what} {name!r} was already in {seen[name]}")
    seen[name] = where
