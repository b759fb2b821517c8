"""Frames of the gallery: taken from prepared records, drawn as strips."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from clipdistill_jax.report.gallery import film, prepared_frames


def test_film_shows_frames_in_order_and_at_most_four():
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 48, 3), 20, np.uint8)
    image, width, height = film(frames)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))
    assert (width, height) == (4 * 48 + 6, 32) == pixels.shape[1::-1]
    assert [pixels[16, i * 50 + 24, 0] for i in range(4)] == [0, 60, 120, 180]
    _, width, height = film(np.zeros((1, 480, 640, 3), np.uint8))
    assert (width, height) == (80, 60)


def test_frames_come_from_the_prepared_records(tmp_path):
    pytest.importorskip("tensorflow", reason="the records are read with TensorFlow")
    from clipdistill_jax.data.index import read_index
    from clipdistill_jax.data.shapes import WorldConfig, scenes, write_msrvtt
    from clipdistill_jax.data.shapes.drawing import render
    from clipdistill_jax.data.video import VideoOptions
    from clipdistill_jax.prepare import prepare_dataset

    world = WorldConfig(train=2, train_small=1, validation=1, test=4, twin_pairs=1, noise=0.0)
    source, prepared = write_msrvtt(tmp_path / "world", world, workers=1), tmp_path / "prepared"
    prepare_dataset("msrvtt", source, prepared, video=VideoOptions(size=32), workers=1, progress=False)
    frames_of, ids = prepared_frames(prepared), read_index(prepared, "test").video_ids
    made = {scene.video_id: scene for scene in scenes(world)["test"]}
    # The files have 2 frames a second for 2 seconds, of which the records keep one a second.
    rendered = np.stack([render(made[video_id], np.linspace(0, 1, 5), world)[::2] for video_id in ids])
    for clip in range(len(ids)):
        found = frames_of(clip)
        assert found.dtype == np.uint8 and found.shape == (3, 32, 32, 3)
        # JPEG and H.264 blur by 9 of 255; the twin, the same in reverse, is 22 off, other clips 43.
        away = np.abs(found - rendered.astype(float)).mean((1, 2, 3, 4))
        assert np.argmin(away) == clip and 2 * away[clip] < np.delete(away, clip).min()
