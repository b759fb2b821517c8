"""The record that every teacher and every student returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct

AnyArray = Any  # an array on the devices, on the host, or its shape alone
Batch = dict[str, Any]

NEVER = -1e9  # a logit that takes part in no softmax; finite, so that its gradient is 0 and not NaN


@flax.struct.dataclass
class Features:
    """What a model says of a batch. A field that a model does not give is None.

    Letters: B examples (followed by K answer choices where there are choices), F frames,
    T tokens, W words, D the joint embedding width, C a layer's own width, h x w its grid.

    Attributes:
      image: [B(, K), D] whole-image vector (CLIP's image embedding; the student's image token).
      frames: [B, F, D] one vector a frame, before any temporal head.
      frame_mask: [B, F] bool, True where a frame is real.
      temporal: [B, F, D] the frame vectors after the temporal head.
      video: [B, D] the clip's vector, of unit length.
      text: [B(, K), D] caption or choice vector, as projected (not normalised).
      tokens: [B(, K), T, D] text states after the final norm, through the text projection.
      token_mask: [B(, K), T] bool, True where a token is real.
      words: [B(, K), W, D] one vector a word: the mean of its tokens' states.
      word_mask: [B(, K), W] bool, True where a word is real.
      layers: feature maps [B, F, h, w, C] (frames) or [B, h, w, C] (images), shallow to deep.
      logits: [B, K] the model's own scores of the choices.
      similarity: [B, B] scaled scores of every text of the batch (rows) against every clip (columns).
      attention: [B(, K), layers, heads, T, T] weights, only when asked for.
      logit_scale: scalar; the factor on cosine similarities, already exponentiated.
      importance: [B(, K), W] share of each word in the importance of its text, 0 for stop words. It comes
        with the batch (`data.importance`), and so does
      label: [B] int, index of the right choice; -1 where it is not known.
    """

    image: AnyArray = None
    frames: AnyArray = None
    frame_mask: AnyArray = None
    temporal: AnyArray = None
    video: AnyArray = None
    text: AnyArray = None
    tokens: AnyArray = None
    token_mask: AnyArray = None
    words: AnyArray = None
    word_mask: AnyArray = None
    layers: AnyArray = None
    logits: AnyArray = None
    similarity: AnyArray = None
    attention: AnyArray = None
    logit_scale: AnyArray = None
    importance: AnyArray = None
    label: AnyArray = None

    def given(self) -> frozenset[str]:
        """Names of the fields that are not None."""
        return frozenset(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None)
