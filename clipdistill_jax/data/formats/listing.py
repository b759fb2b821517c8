"""What the readers of question datasets share: JSON lines, safe file names, unique ids, missing files."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from clipdistill_jax.data.formats import checked
from clipdistill_jax.data.formats.clips import FormatError, Problem


@runtime_checkable
class Example(Protocol):
    """One record of a dataset of questions about images.

    Attributes:
      example_id: the dataset's own id as text, unique over all splits.
      id_field: the field that has it.
      record: where it stands, e.g. "train.jsonl, line 17".
      files: the files that it names, by the field that names them.
    """

    @property
    def example_id(self) -> str: ...
    @property
    def id_field(self) -> str: ...
    @property
    def record(self) -> str: ...
    @property
    def files(self) -> dict[str, Path]: ...


E = TypeVar("E", bound=Example)


@dataclasses.dataclass(frozen=True)
class Listing(Generic[E]):
    """What a reader gives.

    Attributes:
      splits: records by split name, in the order of the files.
      problems: records left out because a file of theirs is missing (only where the caller allowed that).
      listed: records that each split lists, left out or not.
      left_out: ids of the records of each split that were left out.
      fingerprint: hash of the annotation files' contents and of the names and sizes of the files they name.
    """

    splits: dict[str, tuple[E, ...]]
    problems: tuple[Problem, ...]
    listed: dict[str, int]
    left_out: dict[str, tuple[str, ...]]
    fingerprint: str


def make_listing(
    splits: Mapping[str, Iterable[E]], annotations: Iterable[Path], *, allow_missing: bool
) -> Listing[E]:
    """Checks ids and files of all records.

    Args:
      splits: records by split.
      annotations: the files that they were read from.
      allow_missing: leave out a record whose file is missing, and note it; else that is an error.

    Raises:
      FormatError: an id occurs twice, a file is missing, or a split has no record.
    """
    seen: dict[str, str] = {}
    sizes: dict[Path, int | None] = {}
    problems: list[Problem] = []
    kept: dict[str, tuple[E, ...]] = {}
    listed, left_out = {}, {}
    for split, examples in splits.items():
        good, lost = [], []
        count = 0
        for example in examples:
            count += 1
            if example.example_id in seen:
                raise FormatError(
                    f"{example.record}: the {example.id_field} {example.example_id!r} was already in "
                    f"{seen[example.example_id]}; take one of them out"
                )
            seen[example.example_id] = example.record
            missing = [f for f in example.files.items() if _size(f[1], sizes) is None]
            problems += [
                Problem("missing_image", split, *_split_record(example), f"field {field!r}: no file {path}")
                for field, path in missing[:1]
            ]
            if missing:
                lost.append(example.example_id)
            else:
                good.append(example)
        kept[split], listed[split], left_out[split] = tuple(good), count, tuple(lost)
    if problems and not allow_missing:
        first = problems[0]
        raise FormatError(
            f"{first.file}, {first.record}, {first.reason}; {len(problems)} of {len(seen)} records lack a "
            "file; put the files there, or allow missing ones to leave such records out"
        )
    for split, found in kept.items():
        if not found:
            raise FormatError(f"the split {split!r} has no record" + (" with its files" if problems else ""))
    return Listing(kept, tuple(problems), listed, left_out, _fingerprint(annotations, sizes))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank.

    Raises:
      FileNotFoundError: the file is absent.
      FormatError: a line is not UTF-8 or not one JSON object, or a text in it is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                value = json.loads(text)
                checked.check_characters(value, text, where)
            except UnicodeDecodeError as error:
                raise FormatError(f"{where}: not UTF-8 text: {error.reason}") from error
            except json.JSONDecodeError as error:
                hint = "" if raw.endswith(b"\n") else "; the file seems to be cut short: copy it again"
                raise FormatError(
                    f"{where}, column {error.colno}: not valid JSON: {error.msg}{hint}"
                ) from error
            except RecursionError as error:
                raise FormatError(f"{where}: the JSON is nested too deeply") from error
            if not isinstance(value, dict):
                raise FormatError(f"{where}: expected an object, found {type(value).__name__}")
            yield number, value


def inside(folder: Path, name: str, where: str) -> Path:
    """folder / name for a name with forward slashes from an annotation file.

    Raises:
      FormatError: the name is empty or could lead out of the folder.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or any(ord(c) < 32 for c in part) for part in parts):
        raise FormatError(
            f"{where}: the file name {name!r} is refused: an absolute path, '..', backslashes and control "
            "characters could lead out of the data folder"
        )
    return folder.joinpath(*parts)


def is_index(value: Any, limit: int) -> bool:
    """Whether value is an integer (no bool) from 0 to limit - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def is_number(value: Any) -> bool:
    """Whether value is a number (no bool) that single precision can hold, or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 1e38


def whole_number(record: Any, name: str, where: str) -> int:
    """`record[name]`, which must be a whole number from 0 that 63 bits can hold.

    Raises:
      FormatError: it is absent or anything else.
    """
    value: int = checked.field(record, name, int, where)
    if not is_index(value, 2**63):
        raise FormatError(f"{where}: the field {name!r} should be a number from 0, found {value!r:.40}")
    return value


def _split_record(example: Example) -> tuple[str, str]:
    file, _, record = example.record.partition(", ")
    return file, f"{record}, id {example.example_id!r}"


def _size(path: Path, sizes: dict[Path, int | None]) -> int | None:
    """Bytes of the file, None where there is none; each file is looked up once."""
    if path not in sizes:
        sizes[path] = os.path.getsize(path) if os.path.isfile(path) else None
    return sizes[path]


def _fingerprint(annotations: Iterable[Path], sizes: Mapping[Path, int | None]) -> str:
    digest = hashlib.sha256()
    for path in annotations:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    # With the folder's name: two movies of VCR may have frames of one name.
    for name, size in sorted((f"{p.parent.name}/{p.name}", s) for p, s in sizes.items() if s is not None):
        digest.update(f"{name} {size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
