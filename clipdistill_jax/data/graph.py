"""The tf.data part of the pipeline: reads records at random and decodes the frames that are wanted."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill_jax.data.plan import FrameChoice, Rows

_READS = 4  # steps whose records are read at a time; hides the latency of remote disks


def import_tensorflow() -> Any:
    """TensorFlow, kept off the accelerators, which belong to JAX.

    Raises:
      ImportError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # no networks run here, and it announces itself
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError("the data pipeline needs TensorFlow: pip install tensorflow-cpu") from error
    for kind in ("GPU", "TPU"):
        if tf.config.get_visible_devices(kind):
            tf.config.set_visible_devices([], kind)
    return tf


def open_records(directory: Path, split: str, kind: str = "clips") -> Any:
    """Random access to the serialized records of a split, in the order they were written."""
    import tensorflow_datasets as tfds

    (version,) = (path.parent for path in (directory / kind).glob("*/dataset_info.json"))
    return tfds.builder_from_directory(version).as_data_source(split).data_source


def decoded_steps(
    steps: range,
    rows: Callable[[int], Rows],
    records: Any,
    choice: FrameChoice,
    *,
    image_size: int,
    num_threads: int,
) -> "StoppingIterator":
    """Reads the clips of each step and decodes their chosen frames, ahead of their use.

    Args:
      steps: the steps in order.
      rows: the rows of a step; the same number each.
      records: random access to serialized records.
      choice: frames wanted.
      image_size: H = W, pixels.
      num_threads: threads that decode.

    Returns:
      Iterator of NumPy (caption [b], clip [b], frames uint8 [b, F, H, W, 3], frame_mask bool [b, F]) with a
      `close` method.
    """
    tf = import_tensorflow()
    size = len(rows(steps[0]).clip) if steps else 1

    def read(step: np.int64) -> tuple[np.ndarray, ...]:
        caption, clip, position = rows(int(step))
        # Each clip is read once, though several of its captions be in the batch. One by one, for
        # `__getitems__` starts a thread pool a call, which costs more than it gains.
        found = {k: records[k] for k in np.unique(clip[clip >= 0]).tolist()}
        serialized = np.array([found.get(k, b"") for k in clip.tolist()], dtype=object)
        return caption, clip, choice.choose(clip, position), serialized

    def load(step: Any) -> tuple[Any, ...]:
        read_step = tf.numpy_function(read, [step], (tf.int64, tf.int64, tf.int64, tf.string))
        shapes = ([size], [size], [size, choice.num_frames], [size])
        return tuple(tf.ensure_shape(x, shape) for x, shape in zip(read_step, shapes, strict=True))

    def decode(caption: Any, clip: Any, chosen: Any, serialized: Any) -> tuple[Any, ...]:
        frames = _clip_frames(tf, serialized, chosen, choice.num_frames, image_size)
        return caption, clip, frames, chosen >= 0

    dataset = tf.data.Dataset.range(steps.start, steps.stop).map(load, num_parallel_calls=_READS).unbatch()
    dataset = dataset.map(decode, num_parallel_calls=num_threads).batch(size, drop_remainder=True).prefetch(2)
    settings = tf.data.Options()
    settings.threading.private_threadpool_size = num_threads
    settings.deterministic = True
    return StoppingIterator(dataset.with_options(settings).as_numpy_iterator())


class StoppingIterator:
    """Ends the background threads of a tf.data iterator at `close()`, when dropped, and at exit.

    They call into Python to read records. Were they still at work when the interpreter shuts down, the
    process would hang.
    """

    def __init__(self, iterator: Iterator[Any]):
        self._holder = [iterator]
        self._lock = threading.Lock()
        self._release = weakref.finalize(self, _release, self._holder, self._lock)

    def __iter__(self) -> "StoppingIterator":
        return self

    def __next__(self) -> Any:
        with self._lock:
            if not self._holder:
                raise StopIteration
            return next(self._holder[0])

    def close(self) -> None:
        """Stops; the iterator then ends."""
        self._release()


def _release(holder: list[Any], lock: AbstractContextManager[Any]) -> None:
    with lock:  # wait for the batch that another thread waits for
        holder.clear()


def _clip_frames(tf: Any, serialized: Any, chosen: Any, num_frames: int, side: int) -> Any:
    """uint8 [F, H, W, 3]: frames `chosen` [F] of a serialized record, zeros where chosen is -1."""
    parsed = tf.io.parse_single_example(
        serialized, {"frames": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)}
    )
    frames = tf.map_fn(
        lambda jpeg: centre_square(tf, jpeg, side),
        tf.gather(parsed["frames"], chosen[chosen >= 0]),
        fn_output_signature=tf.TensorSpec([side, side, 3], tf.uint8),
    )
    frames = tf.pad(frames, [[0, num_frames - tf.shape(frames)[0]], [0, 0], [0, 0], [0, 0]])
    return tf.ensure_shape(frames, [num_frames, side, side, 3])


def centre_square(tf: Any, jpeg: Any, size: int) -> Any:
    """The centre square of a JPEG as uint8 [size, size, 3]; bicubic, antialiased, where the sizes differ."""
    height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(jpeg))
    side = tf.minimum(height, width)
    window = tf.stack([(height - side) // 2, (width - side) // 2, side, side])
    square = tf.io.decode_and_crop_jpeg(jpeg, window, channels=3, dct_method="INTEGER_ACCURATE")

    def resized() -> Any:
        image = tf.image.resize(square, [size, size], method="bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)

    return tf.ensure_shape(tf.cond(side == size, lambda: square, resized), [size, size, 3])
