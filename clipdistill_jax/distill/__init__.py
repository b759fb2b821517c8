"""Distillation terms. A term compares two `Features` and returns one value an example.

To add one: a linen module with `needs`, `of` (the model it compares with: "teacher", the stage's teacher, or
"clip", raw CLIP) and `__call__(student, teacher, valid) -> [B]`, and a line in `TERMS`.
"""

from clipdistill_jax.distill.bases import LayerToLayer, StudentAsBase, TeacherAsBase
from clipdistill_jax.distill.clip_td import LanguageKD, VisionKD
from clipdistill_jax.distill.confidence import ConfidenceGate
from clipdistill_jax.distill.local import LocalAlignment
from clipdistill_jax.distill.naive import SpatialKD, TemporalKD
from clipdistill_jax.distill.similarity import GlobalAlignment
from clipdistill_jax.distill.tokens import TokenKD

TERMS = {
    "temporal": TemporalKD,
    "spatial": SpatialKD,
    "sab": StudentAsBase,
    "tab": TeacherAsBase,
    "ol2ol": LayerToLayer,
    "global": GlobalAlignment,
    "local": LocalAlignment,
    "vision": VisionKD,
    "language": LanguageKD,
    "tokens": TokenKD,
}

__all__ = [
    "TERMS",
    "ConfidenceGate",
    "GlobalAlignment",
    "LanguageKD",
    "LayerToLayer",
    "LocalAlignment",
    "SpatialKD",
    "StudentAsBase",
    "TeacherAsBase",
    "TemporalKD",
    "TokenKD",
    "VisionKD",
]
