"""The tf.data part of the pipeline: a batch as a pure function of its step number."""

import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROUNDS = 4
FRAME_SAMPLING = ("uniform", "random")


class Plan(NamedTuple):
    """Which items the batches hold; numbers that change nothing but the order and the choice.

    Attributes:
      captions_per_clip: int64 [number of clips], each at least 1.
      one_caption: an item is a clip with one of its captions; else every caption is an item.
      shuffle: another order each epoch; else the order stored.
      seed: of the order, the captions and the frames.
      batch_size: items of a step on all hosts.
      process_index: this host.
      process_count: hosts; host p takes rows [p b, (p+1) b) of a step, b = batch_size / process_count.
    """

    captions_per_clip: np.ndarray
    one_caption: bool
    shuffle: bool
    seed: int
    batch_size: int
    process_index: int
    process_count: int


class FrameOptions(NamedTuple):
    """num_frames F of a clip and their side in pixels; sampling is one of FRAME_SAMPLING."""

    num_frames: int
    image_size: int
    sampling: str
    seed: int


def import_tensorflow() -> Any:
    """TensorFlow, kept off the accelerators, which belong to JAX.

    Raises:
      ImportError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError("the data pipeline needs TensorFlow: pip install tensorflow-cpu") from error
    for kind in ("GPU", "TPU"):
        if tf.config.get_visible_devices(kind):
            tf.config.set_visible_devices([], kind)
    return tf


def training_rows(plan: Plan, start_step: int) -> Any:
    """An endless dataset of (caption, clip, position), each int64 [b], for the steps from start_step on.

    The items of an epoch are a permutation of all; step s takes positions s B to s B + B - 1 of the endless
    sequence of epochs, so a batch may span two of them and none is dropped. With one caption a clip, a clip
    shows each of its n captions once in n epochs, in an order of its own.
    """
    tf = import_tensorflow()
    counts = tf.constant(plan.captions_per_clip, tf.int64)
    offsets = tf.cumsum(counts, exclusive=True)
    clip_of_caption = tf.repeat(tf.range(len(plan.captions_per_clip), dtype=tf.int64), counts)
    items = tf.size(counts if plan.one_caption else clip_of_caption, tf.int64)
    rows = plan.batch_size // plan.process_count

    def permuted(index: Any, size: Any, seed: tuple[Any, ...]) -> Any:
        # tf.random.experimental.index_shuffle, whose wrapper cannot take a seed a row (TF 2.21)
        seeds = tf.stack([tf.broadcast_to(tf.cast(s, tf.int64), [rows]) for s in seed], axis=-1)
        last = tf.broadcast_to(size - 1, [rows])
        return tf.raw_ops.RandomIndexShuffle(index=index, seed=seeds, max_index=last, rounds=ROUNDS)

    def pick(step: Any) -> tuple[Any, Any, Any]:
        position = step * plan.batch_size + plan.process_index * rows + tf.range(rows, dtype=tf.int64)
        epoch, item = position // items, position % items
        if plan.shuffle:
            item = permuted(item, items, (epoch, plan.seed, 0))
        if not plan.one_caption:
            return item, tf.gather(clip_of_caption, item), position
        count = tf.gather(counts, item)
        turn = permuted(epoch % count, count, (epoch // count, plan.seed, 1 + item))
        return tf.gather(offsets, item) + turn, item, position

    return tf.data.Dataset.range(start_step, np.iinfo(np.int64).max).map(pick)


def clip_rows(clips: np.ndarray) -> Any:
    """A dataset of (0, clip, 0) vectors for the given clip ids, int64 [batches, b]; -1 gives an empty clip."""
    tf = import_tensorflow()
    rows = tf.data.Dataset.from_tensor_slices(np.asarray(clips, np.int64))
    return rows.map(lambda clip: (tf.zeros_like(clip), clip, tf.zeros_like(clip)))


def with_frames(rows: Any, records: Any, options: FrameOptions, *, num_threads: int) -> "StoppingIterator":
    """Reads and decodes the clips of `rows`.

    Args:
      rows: dataset of (caption, clip, position), int64 [b] each.
      records: random-access source of serialized records; its `__getitems__` takes a list of positions.
      options: frames wanted.
      num_threads: threads that decode.

    Returns:
      An iterator of NumPy (caption [b], clip [b], frames uint8 [b, F, H, W, 3], frame_mask bool [b, F]), with a
      `close` method.
    """
    tf = import_tensorflow()

    def read(clips: np.ndarray) -> np.ndarray:
        wanted = np.unique(clips[clips >= 0])
        found = dict(zip(wanted.tolist(), records.__getitems__(wanted.tolist()) if len(wanted) else [], strict=True))
        return np.array([found.get(clip, b"") for clip in clips.tolist()], dtype=object)

    def load(caption: Any, clip: Any, position: Any) -> tuple[Any, ...]:
        serialized = tf.numpy_function(read, [clip], tf.string, stateful=False)
        return caption, clip, position, tf.ensure_shape(serialized, clip.shape)

    def decode(caption: Any, clip: Any, position: Any, serialized: Any) -> tuple[Any, ...]:
        frames, frame_mask = _clip_frames(tf, serialized, position, options)
        return caption, clip, frames, frame_mask

    size = rows.element_spec[1].shape[0]
    dataset = rows.map(load, num_parallel_calls=2).unbatch()
    dataset = dataset.map(decode, num_parallel_calls=num_threads).batch(size, drop_remainder=True).prefetch(2)
    settings = tf.data.Options()
    settings.threading.private_threadpool_size = num_threads
    settings.deterministic = True
    return StoppingIterator(dataset.with_options(settings).as_numpy_iterator())


class StoppingIterator:
    """Ends the background threads of a tf.data iterator at `close`, when collected, and at exit.

    They call into Python to read records. If they are still at work when the interpreter shuts down, the
    process hangs.
    """

    def __init__(self, iterator: Iterator[Any]):
        self._holder = [iterator]
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, _release, self._holder, self._lock)

    def __iter__(self) -> "StoppingIterator":
        return self

    def __next__(self) -> Any:
        with self._lock:
            if not self._holder:
                raise StopIteration
            return next(self._holder[0])


def _release(holder: list[Any], lock: threading.Lock) -> None:
    with lock:  # wait for a batch that another thread is waiting for
        holder.clear()


def _clip_frames(tf: Any, serialized: Any, position: Any, options: FrameOptions) -> tuple[Any, Any]:
    """Frames uint8 [F, H, W, 3], zero padded, and their mask bool [F], of one serialized record."""
    parsed = tf.io.parse_single_example(
        serialized, {"frames": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)}
    )
    jpegs = parsed["frames"]
    stored = tf.size(jpegs)
    wanted = options.num_frames
    count = tf.minimum(stored, wanted)
    if options.sampling == "random":
        order = tf.argsort(tf.random.stateless_uniform([stored], tf.stack([options.seed, position])))
        chosen = tf.sort(order[:count])
    else:
        # CLIP4Clip's slice_framepos=2: np.linspace(0, n-1, F, dtype=int), in integers
        steps = tf.range(count)
        chosen = tf.where(stored > wanted, steps * (stored - 1) // max(wanted - 1, 1), steps)
    frames = tf.map_fn(
        lambda jpeg: _frame(tf, jpeg, options.image_size),
        tf.gather(jpegs, chosen),
        fn_output_signature=tf.TensorSpec([options.image_size, options.image_size, 3], tf.uint8),
    )
    frames = tf.pad(frames, [[0, wanted - count], [0, 0], [0, 0], [0, 0]])
    frames.set_shape([wanted, options.image_size, options.image_size, 3])
    return frames, tf.range(wanted) < count


def _frame(tf: Any, jpeg: Any, size: int) -> Any:
    """The centre square of a JPEG as uint8 [size, size, 3]; bicubic with antialias where it must shrink."""
    height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(jpeg))
    side = tf.minimum(height, width)
    window = tf.stack([(height - side) // 2, (width - side) // 2, side, side])
    square = tf.io.decode_and_crop_jpeg(jpeg, window, channels=3, dct_method="INTEGER_ACCURATE")

    def resized() -> Any:
        image = tf.image.resize(square, [size, size], method="bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)

    return tf.ensure_shape(tf.cond(side == size, lambda: square, resized), [size, size, 3])


def open_records(directory: Path, split: str) -> Any:
    """Random access to the serialized records of a split, in the order they were written."""
    import tensorflow_datasets as tfds

    (version,) = sorted((directory / "clips").iterdir())
    return tfds.builder_from_directory(version).as_data_source(split).data_source
