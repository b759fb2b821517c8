"""Arrays as base64 text, as bottom-up TSV and VL-BERT's json carry them."""

import base64
import binascii
from typing import Any

import numpy as np

from clipdistill_jax.data.formats.clips import FormatError


def decode(text: Any, rows: int, where: str, *, dtype: str = "<f4") -> np.ndarray:
    """[rows, K] numbers from base64 of their bytes, row by row.

    Args:
      text: str or bytes of base64; line breaks are allowed.
      rows: how many rows the bytes must divide into.
      where: names the file, the record and the field in errors.
      dtype: little-endian NumPy type.

    Raises:
      FormatError: not base64, or the bytes do not divide into the rows.
    """
    if isinstance(text, str):
        text = text.encode("ascii", "replace")
    if not isinstance(text, bytes):
        raise FormatError(f"{where}: expected base64 text, found {type(text).__name__}")
    try:
        data = base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise FormatError(f"{where}: not base64, or cut short: {error}") from error
    item = np.dtype(dtype).itemsize
    if rows < 1 or not data or len(data) % (rows * item):
        raise FormatError(
            f"{where}: {len(data)} bytes do not make {rows} rows of {item}-byte numbers; cut short?"
        )
    return np.frombuffer(data, dtype).reshape(rows, -1)
