"""What the students are told of where a region lies."""

import numpy as np
from jaxtyping import Float32

WAVE_BASE = 1000.0  # VL-BERT's longest wave, in hundredths of the image


def uniter_locations(
    boxes: Float32[np.ndarray, "n 4"], size: tuple[float, float]
) -> Float32[np.ndarray, "n 7"]:
    """x1/W, y1/H, x2/W, y2/H, w/W, h/H and the share of the area (UNITER data/data.py:248-252).

    Args:
      boxes: x1, y1, x2, y2 in the frame of `size`.
      size: (W, H).
    """
    width, height = size
    corners = boxes / np.array([width, height, width, height], np.float32)
    extent = corners[:, 2:] - corners[:, :2]
    return np.concatenate([corners, extent, extent[:, :1] * extent[:, 1:]], axis=1).astype(np.float32)


def vl_bert_geometry(
    boxes: Float32[np.ndarray, "n 4"], size: tuple[float, float], *, waves: int = 256
) -> Float32[np.ndarray, "n d"]:
    """Sines and cosines of centre and extent in hundredths of the image (VL-BERT common/utils/bbox.py:33-65).

    Args:
      boxes: x1, y1, x2, y2 in the frame of `size`.
      size: (W, H).
      waves: frequencies; wave k divides by 1000^(k / waves).

    Returns:
      [N, 8 waves]: for cx, cy, w, h in turn, `waves` sines, then `waves` cosines. 2048 with VL-BERT's 256.
    """
    scale = np.array(size, np.float64)
    low, high = boxes[:, :2].astype(np.float64), boxes[:, 2:].astype(np.float64)
    position = 100 * np.concatenate([(low + high) / 2 / scale, (high - low) / scale], axis=1)
    angle = position[:, :, None] / WAVE_BASE ** (np.arange(waves) / waves)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).reshape(len(boxes), -1).astype(np.float32)
