"""Distillation terms. A term compares two `Features` and returns one value an example.

To add one: a linen module with `needs` and `__call__(student, teacher, valid) -> [B]`, and a line in `TERMS`.
"""

from clipdistill_jax.distill.naive import SpatialKD, TemporalKD
from clipdistill_jax.distill.similarity import GlobalAlignment

TERMS = {
    "temporal": TemporalKD,
    "spatial": SpatialKD,
    "global": GlobalAlignment,
}

__all__ = ["TERMS", "GlobalAlignment", "SpatialKD", "TemporalKD"]
