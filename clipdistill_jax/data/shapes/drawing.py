"""From a scene to pixels and to a video file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from clipdistill_jax.data.shapes.world import COLOURS, PLACES, STEPS, Scene, Thing, WorldConfig


def coverage(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed closeness of points to a unit shape: positive inside, about one radius wide."""
    if shape == "circle":
        return 1 - np.hypot(x, y)
    if shape == "square":
        return 0.85 - np.maximum(abs(x), abs(y))
    return np.minimum(0.6 - y, 0.5 * y + 0.5 - 0.87 * abs(x))  # triangle


def _path(thing: Thing, rng: np.random.Generator, time: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Positions [T, 2] of an object: of a few paths drawn, the one that keeps farthest from the others'."""
    if thing.motion[0] == "still":
        return np.array(PLACES[thing.motion[1]]) + rng.uniform(-0.07, 0.07, 2) + np.zeros((len(time), 2))
    reach = 0.55
    waypoints = np.zeros((1, 2))
    for word in thing.motion:
        if word in STEPS:
            waypoints = np.vstack([waypoints, waypoints[-1] + reach * np.array(STEPS[word], float)])
    waypoints -= (waypoints.min(0) + waypoints.max(0)) / 2
    room = 0.82 - np.ptp(waypoints, axis=0)
    along = np.linspace(0, 1, len(waypoints))
    path = np.stack([np.interp(time, along, waypoints[:, i]) for i in range(2)], axis=1)
    drawn = [path + 0.5 + rng.uniform(-0.5, 0.5, 2) * room for _ in range(12)]
    return max(drawn, key=lambda p: min((np.hypot(*(p - q).T).min() for q in others), default=0.0))


def _looks(thing: Thing, rng: np.random.Generator, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Radius [T] and colour [T, 3] of an object."""
    scale = {"grow": np.interp(time, (0, 1), (0.5, 1.5)), "shrink": np.interp(time, (0, 1), (1.5, 0.5))}
    radius = rng.uniform(0.12, 0.19) * scale.get(thing.motion[0], np.ones_like(time))
    last = COLOURS[thing.motion[1] if thing.motion[0] == "turn" else thing.colour]
    colour = np.where(time[:, None] < 0.5, np.array(COLOURS[thing.colour], float), np.array(last, float))
    return radius, colour + rng.uniform(-20, 20, 3)


def render(scene: Scene, times: Iterable[float], config: WorldConfig) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] at times in [0, 1]; a twin's are the original's in reverse order."""
    rng = np.random.default_rng(scene.seed)
    time = np.asarray(list(times), float)
    side = config.size
    grid = rng.uniform(20, 100, (4, 4, 3)) + rng.uniform(-20, 20, 3)
    frames = np.repeat(
        np.kron(grid, np.ones((-(-side // 4), -(-side // 4), 1)))[None, :side, :side], len(time), 0
    )
    jitter = rng.uniform(-0.015, 0.015, (len(time), 2))
    y, x = np.mgrid[0:side, 0:side] / side
    paths: list[np.ndarray] = []
    for thing in scene.things:
        radius, colour = _looks(thing, rng, time)
        paths.append(_path(thing, rng, time, paths))
        centre = paths[-1] + jitter
        dx = (x[None] - centre[:, 0, None, None]) / radius[:, None, None]
        dy = (y[None] - centre[:, 1, None, None]) / radius[:, None, None]
        edge = coverage(thing.shape, dx, dy) * radius[:, None, None] * side
        alpha = np.clip(0.5 + edge, 0, 1)[..., None]
        frames = frames * (1 - alpha) + colour[:, None, None, :] * alpha
    frames = frames + rng.normal(0, config.noise, frames.shape)
    frames = np.clip(frames, 0, 255).astype(np.uint8)
    return frames[::-1] if scene.backwards else frames


def write_clip(path: Path, frames: np.ndarray, fps: int) -> None:
    """Encode frames as H.264 in mp4."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "20"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode())
