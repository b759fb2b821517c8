"""Decoding clips in worker processes. Imports no TensorFlow, for the workers import this file."""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from clipdistill_jax.data.formats import Clip
from clipdistill_jax.data.video import UnreadableVideo, VideoFrames, VideoOptions, try_read_frames

Decoded = VideoFrames | UnreadableVideo
J = TypeVar("J")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may use, which a scheduler can make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decode_clips(
    clips: Iterable[Clip], options: VideoOptions, *, workers: int
) -> Iterator[tuple[Clip, Decoded]]:
    """Decodes clips in `workers` processes, in order, with at most four clips a worker in memory.

    A file on which the decoder itself crashes is given as UnreadableVideo, the others are decoded again.
    The processes are made by a fork server, which has imported neither TensorFlow nor started a thread; they
    end with this process, also when it is killed.
    """
    todo = iter(clips)
    pending: deque[tuple[Clip, Future[Decoded]]] = deque()
    pool = _pool(workers)
    try:
        while True:
            for clip in itertools.islice(todo, 4 * workers - len(pending)):
                pending.append((clip, _submit(pool, clip, options)))
            if not pending:
                return
            clip, future = pending.popleft()
            try:
                decoded = future.result()
            except BrokenProcessPool:
                pool.shutdown()
                decoded = _decode_alone(clip, options)
                pool = _pool(workers)
                for k, (other, future) in enumerate(pending):
                    if future.exception() is not None:
                        pending[k] = (other, _submit(pool, other, options))
            yield clip, decoded
    finally:
        pool.shutdown(cancel_futures=True)


def in_threads(function: Callable[[J], R], jobs: Iterable[J], *, workers: int) -> Iterator[R]:
    """function(job) of each job, in order, by `workers` threads; at most four jobs a thread are in memory.

    For work that leaves Python's lock alone, as decoding pictures does. What the function raises is raised.
    """
    todo = iter(jobs)
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            for job in itertools.islice(todo, 4 * workers - len(pending)):
                pending.append(pool.submit(function, job))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, clip: Clip, options: VideoOptions) -> "Future[Decoded]":
    return pool.submit(try_read_frames, os.fspath(clip.path), options)


def _decode_alone(clip: Clip, options: VideoOptions) -> Decoded:
    with _pool(1) as pool:
        try:
            return _submit(pool, clip, options).result()
        except BrokenProcessPool:
            return UnreadableVideo(os.fspath(clip.path), "the decoder crashed on it")


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)


def end_with_parent() -> None:
    """Ends this process when its parent is gone: a killed job leaves no decoders behind."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
