import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from clipdistill_jax.models.image import (
    CLIP_MEAN,
    CLIP_STD,
    crop_start,
    normalize,
    preprocess_host,
    resize_to,
    resized_shape,
)


def pil_levels(image: PIL.Image.Image, size: int) -> np.ndarray:
    """Grey levels after PIL's resize and the centre crop."""
    shown = preprocess_host(image, size)
    return np.rint((shown * np.float32(CLIP_STD) + np.float32(CLIP_MEAN)) * 255).astype(np.int64)


def test_host_preprocessing_equals_the_published_tensor(shared_data):
    folder = shared_data / "clip_preprocess"
    with PIL.Image.open(folder / "franz-kafka.jpg") as photo:
        ours = preprocess_host(photo, 224)
    expected = np.load(folder / "expected_preprocessed_image.npy")[0].transpose(1, 2, 0)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_device_resize_equals_pil_on_a_photo(shared_data):
    with PIL.Image.open(shared_data / "clip_preprocess" / "franz-kafka.jpg") as photo:
        expected = pil_levels(photo, 224)
        ours = np.asarray(resize_to(np.asarray(photo), 224)).astype(np.int64)
    difference = np.abs(ours - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("shape", [(48, 64), (65, 33), (32, 32), (20, 31), (33, 100)])
def test_device_resize_equals_pil_on_noise(shape):
    noise = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    ours = resize_to(noise, 32)
    assert ours.shape == (2, 32, 32, 3) and ours.dtype == jnp.uint8
    expected = np.stack([pil_levels(PIL.Image.fromarray(x), 32) for x in noise])
    difference = np.abs(np.asarray(ours).astype(np.int64) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_sizes_and_crops_are_torchvisions():
    assert resized_shape(450, 655, 224) == (224, 326)  # int(224 * 655 / 450)
    assert resized_shape(655, 450, 224) == (326, 224)
    # int(round(x / 2)) sends halves to the even number
    assert [crop_start(10 + extra, 10) for extra in range(6)] == [0, 0, 1, 2, 2, 2]


def test_normalize_and_float_frames():
    frames = np.array([[[[0, 128, 255]]]], np.uint8)
    expected = (np.array([0, 128, 255]) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(normalize(frames)[0, 0, 0], expected, rtol=1e-6)
    assert normalize(frames, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    # Floats are neither rounded nor clipped: a constant stays what it is.
    flat = jnp.full((1, 9, 7, 3), -1.625)
    np.testing.assert_allclose(resize_to(flat, 4), -1.625, rtol=1e-6)


def test_grey_and_transparent_pictures_become_rgb():
    grey = PIL.Image.fromarray(np.full((40, 30), 77, np.uint8))
    assert (pil_levels(grey, 16) == 77).all()
    assert (pil_levels(grey.convert("RGBA"), 16) == 77).all()
