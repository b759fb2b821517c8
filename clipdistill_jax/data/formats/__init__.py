"""Readers of real on-disk formats. Each gives the same records: clips by split, and what was wrong."""

import inspect
from collections.abc import Callable
from typing import Any

from clipdistill_jax.data.formats import activitynet, didemo, karpathy, lsmdc, msrvtt, msvd
from clipdistill_jax.data.formats.clips import Clip, ClipSplits, FormatError, Problem

__all__ = ["FORMATS", "Clip", "ClipSplits", "FormatError", "Problem", "reader", "reader_options"]

# What `data.format` and `prepare --format` name. A reader takes the folder of the raw tree, and its options
# as keywords.
FORMATS: dict[str, Callable[..., ClipSplits]] = {
    "msrvtt": msrvtt.read,
    "msvd": msvd.read,
    "didemo": didemo.read,
    "activitynet": activitynet.read,
    "lsmdc": lsmdc.read,
    "karpathy": karpathy.read,
}


def reader(name: str) -> Callable[..., ClipSplits]:
    """The reader of a format.

    Raises:
      ValueError: there is no such format.
    """
    if name not in FORMATS:
        raise ValueError(f"the data format {name!r} is not known: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def reader_options(name: str) -> dict[str, Any]:
    """The options of a format's reader and their defaults.

    Raises:
      ValueError: there is no such format.
    """
    parameters = inspect.signature(reader(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
