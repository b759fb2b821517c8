"""CLIP's image preprocessing: on the host with PIL, or on the device on uint8 frames."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

# openai/CLIP clip/clip.py:79
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

AnyArray = Array | np.ndarray


def normalize(
    frames: Shaped[AnyArray, "*batch h w 3"],
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch h w 3"]:
    """`(frames / 255 - mean) / std` of uint8 RGB frames, computed in float32 and returned in `dtype`."""
    scaled = jnp.asarray(frames, jnp.float32) / 255.0
    return ((scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).astype(dtype)


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) once the short side is `size`; the long side is rounded down, as torchvision does."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def crop_start(length: int, size: int) -> int:
    """First row (or column) of a centre crop; halves go to the even number, as torchvision does."""
    return round((length - size) / 2)


def preprocess_host(image: PIL.Image.Image, size: int = 224) -> Float[np.ndarray, "size size 3"]:
    """CLIP's own preprocessing of one picture: bicubic to a short side of `size`, centre crop, mean and std.

    A picture that is not RGB is converted first (CLIP converts after the crop, with the same result for
    every mode but palettes, which PIL cannot interpolate). Source: openai/CLIP clip/clip.py:79-86.
    """
    image = image.convert("RGB")
    height, width = resized_shape(image.height, image.width, size)
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    top, left = crop_start(height, size), crop_start(width, size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255.0
    return (pixels - np.asarray(CLIP_MEAN, np.float32)) / np.asarray(CLIP_STD, np.float32)


def resize_to(frames: Shaped[AnyArray, "*batch h w 3"], size: int) -> Shaped[Array, "*batch {size} {size} 3"]:
    """Antialiased bicubic resize to a short side of `size`, then a centre crop, on the device.

    uint8 frames stay uint8, rounded after the horizontal and after the vertical pass as PIL does; float
    frames stay float and are not clipped. Against PIL (same cubic, a = -0.5, but weights in fixed point)
    fewer than one pixel value in a thousand differs, by one grey level (photos and noise, measured).
    """
    frames = jnp.asarray(frames)
    *batch, old_height, old_width, channels = frames.shape
    height, width = resized_shape(old_height, old_width, size)
    if (height, width) != (old_height, old_width):
        whole = frames.dtype == jnp.uint8
        pixels = frames.astype(jnp.float32) if whole else frames
        for shape in ((*batch, old_height, width, channels), (*batch, height, width, channels)):
            pixels = jax.image.resize(pixels, shape, method="bicubic", antialias=True)
            if whole:
                pixels = jnp.clip(jnp.round(pixels), 0, 255)
        frames = pixels.astype(frames.dtype)
    top, left = crop_start(height, size), crop_start(width, size)
    return frames[..., top : top + size, left : left + size, :]
