"""Files damaged for tests of readers, and what a refusal has to say."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipdistill_jax.data.formats import FormatError


@contextlib.contextmanager
def refused(*parts: str) -> Iterator[None]:
    """Expects a FormatError that says each of the parts."""
    with pytest.raises(FormatError) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Changes the value of a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
