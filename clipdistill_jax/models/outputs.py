"""What a vision tower and a text tower return."""

from __future__ import annotations

from typing import Any

import flax.struct

AnyArray = Any  # an array on the devices, on the host, or its shape alone


@flax.struct.dataclass
class VisionOutput:
    """A vision tower's view of N images.

    Attributes:
      embedding: [N, D] image vectors in the joint space (not normalised).
      layers: feature maps [N, h, w, C], shallow to deep: every block of a ViT (class token left out),
        every stage of a convolutional tower.
      hidden: token states [N, 1 + h*w, C] of a ViT: the input of the first block, then every block's
        output. Empty for towers without tokens.
    """

    embedding: AnyArray
    layers: tuple[AnyArray, ...] = ()
    hidden: tuple[AnyArray, ...] = ()


@flax.struct.dataclass
class TextOutput:
    """A text tower's view of B token rows.

    Attributes:
      embedding: [B, D] text vectors in the joint space (not normalised).
      tokens: [B, T, D] token states after the final norm, through the text projection.
      hidden: [B, T, C] token states: the input of the first block, then every block's output.
    """

    embedding: AnyArray
    tokens: AnyArray
    hidden: tuple[AnyArray, ...] = ()
