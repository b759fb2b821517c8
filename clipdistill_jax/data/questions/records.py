"""Images with their regions as records on disk."""

import numpy as np
import tensorflow_datasets as tfds  # imports TensorFlow only when it writes
from jaxtyping import Int32

from clipdistill_jax.data.builder import Records
from clipdistill_jax.data.formats.clips import FormatError
from clipdistill_jax.data.questions.index import IMAGES
from clipdistill_jax.data.regions import Regions


class ImageRecords(Records, skip_registration=True):  # type: ignore[call-arg]
    """Images of one dataset, each stored once with its regions; arrays as their bytes, little-endian.

    A record has "image" (JPEG), "features" [N, C] and "class_probs" [N, K] in half precision, "boxes" [N, 4]
    and "size" [2] in float32, and "classes" [N] in int32. Region 0 is the whole image.
    """

    name = IMAGES
    stored = {
        name: tfds.features.Text()
        for name in ("image", "features", "boxes", "size", "classes", "class_probs")
    }


def image_record(
    jpeg: bytes, regions: Regions, classes: Int32[np.ndarray, " n"], *, class_probs: bool, where: str
) -> dict[str, bytes]:
    """The record of an image.

    Args:
      jpeg: the picture.
      regions: the whole image first.
      classes: of each region, -1 for none.
      class_probs: keep the detector's distributions, where there are any.
      where: names the image in errors.

    Raises:
      FormatError: a feature is too large for half precision.
    """
    with np.errstate(over="ignore"):
        features = regions.features.astype("<f2")
    if not np.isfinite(features).all():
        raise FormatError(f"{where}: a region feature is beyond half precision (65504)")
    probs = regions.class_probs if class_probs else None
    return {
        "image": jpeg,
        "features": features.tobytes(),
        "boxes": regions.boxes.astype("<f4").tobytes(),
        "size": np.array(regions.size, "<f4").tobytes(),
        "classes": classes.astype("<i4").tobytes(),
        "class_probs": b"" if probs is None else probs.astype("<f2").tobytes(),
    }
