"""The tf.data part of the questions' pipeline: reads images and their regions ahead of their use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from clipdistill_jax.data.graph import StoppingIterator, centre_square, import_tensorflow

_READS = 4  # steps whose records are read at a time; hides the latency of remote disks


class ImageRows(NamedTuple):
    """One host's part of a step, b rows.

    Attributes:
      item: index of each item in the split.
      image: index of its image.
      regions: N of the step.
      mask: False on rows that only fill a batch.
    """

    item: Int64[np.ndarray, " b"]
    image: Int64[np.ndarray, " b"]
    regions: int
    mask: Bool[np.ndarray, " b"]


def read_steps(
    steps: range,
    rows: Callable[[int], ImageRows],
    *,
    records: Any,
    width: int = 0,
    image_size: int = 0,
    classes: int = 0,
    num_threads: int = 1,
) -> StoppingIterator:
    """Reads the images of each step, and their regions, ahead of their use.

    Args:
      steps: the steps in order.
      rows: the rows of a step; the same number each.
      records: random access to serialized records.
      width: C of the features; 0 gives no regions at all.
      image_size: H = W of the pictures' centre squares; 0 gives no pictures.
      classes: K of class_probs; 0 gives none.
      num_threads: threads that decode.

    Returns:
      Iterator of dictionaries: item, image_id, mask [b]; and as asked for regions float32 [b, N, C],
      region_boxes [b, N, 4], region_mask [b, N], region_classes int32 [b, N], image_size [b, 2], class_probs
      [b, N, K], image uint8 [b, H, W, 3]. It has a `close` method.
    """
    tf = import_tensorflow()
    size = len(rows(steps[0]).item) if steps else 1

    def read(step: np.int64) -> tuple[np.ndarray, ...]:
        row = rows(int(step))
        # Each image is read once, though several of its questions be in the batch.
        found = {k: records[k] for k in np.unique(row.image).tolist()}
        serialized = np.array([found[k] for k in row.image.tolist()], dtype=object)
        return row.item, row.image, row.mask, np.full(size, row.regions, np.int64), serialized

    def load(step: Any) -> tuple[Any, ...]:
        kinds = (tf.int64, tf.int64, tf.bool, tf.int64, tf.string)
        return tuple(tf.ensure_shape(x, [size]) for x in tf.numpy_function(read, [step], kinds))

    def decode(item: Any, image: Any, mask: Any, count: Any, serialized: Any) -> dict[str, Any]:
        wanted = ["image"] * (image_size > 0) + ["class_probs"] * (classes > 0)
        wanted += ["features", "boxes", "size", "classes"] * (width > 0)
        parsed = tf.io.parse_single_example(
            serialized, {name: tf.io.FixedLenFeature([], tf.string) for name in wanted}
        )
        found = {"item": item, "image_id": image, "mask": mask}
        if image_size:
            found["image"] = centre_square(tf, parsed["image"], image_size)
        if width or classes:
            found |= _regions(tf, parsed, count, width, classes)
        return found

    dataset = tf.data.Dataset.range(steps.start, steps.stop).map(load, num_parallel_calls=_READS).unbatch()
    dataset = dataset.map(decode, num_parallel_calls=num_threads).batch(size, drop_remainder=True).prefetch(2)
    settings = tf.data.Options()
    settings.threading.private_threadpool_size = num_threads
    settings.deterministic = True
    return StoppingIterator(dataset.with_options(settings).as_numpy_iterator())


def _regions(tf: Any, parsed: Any, count: Any, width: int, classes: int) -> dict[str, Any]:
    """The arrays of one image, padded to `count` regions."""

    def array(name: str, kind: Any, columns: int, fill: float = 0) -> Any:
        values = tf.reshape(tf.io.decode_raw(parsed[name], kind), [-1, columns])[:count]
        rest = count - tf.shape(values, tf.int64)[0]
        padded = tf.pad(values, [[0, rest], [0, 0]], constant_values=tf.cast(fill, kind))
        return tf.ensure_shape(padded, [None, columns])

    found = {}
    if width:
        boxes = tf.reshape(tf.io.decode_raw(parsed["boxes"], tf.float32), [-1, 4])
        found = {
            "regions": tf.cast(array("features", tf.float16, width), tf.float32),
            "region_boxes": array("boxes", tf.float32, 4),
            "region_mask": tf.range(count) < tf.shape(boxes, tf.int64)[0],
            "region_classes": array("classes", tf.int32, 1, -1)[:, 0],
            "image_size": tf.ensure_shape(tf.io.decode_raw(parsed["size"], tf.float32), [2]),
        }
    if classes:
        found["class_probs"] = tf.cast(array("class_probs", tf.float16, classes), tf.float32)
    return found
