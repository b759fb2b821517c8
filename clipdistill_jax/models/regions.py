"""Towers that tell what is in the boxes of an image: maps of a CLIP or a ResNet, and RoI-align over them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from clipdistill_jax.models.clip import ClipVision, ClipVisionConfig
from clipdistill_jax.models.image import AnyArray
from clipdistill_jax.models.layers import layer_norm
from clipdistill_jax.models.resnet import ResNet
from clipdistill_jax.models.roi_align import roi_align

LEVELS = ("c5", "c4")
_MIN_SAMPLES = 14  # a side of a box: Mask R-CNN's 7 bins of 2


@dataclasses.dataclass(frozen=True)
class RegionTower:
    """A network whose maps are pooled within boxes.

    Attributes:
      maps: (variables, uint8 images [B, S, S, 3]) -> maps [B, h, h, C] over the whole images.
      variables: its weights.
      image_size: S, in pixels.
      mean: of the pixels in [0, 1]; fills what an image that is not square leaves empty.
    """

    maps: Callable[[Any, Array], Array]
    variables: Any
    image_size: int
    mean: tuple[float, ...]


def clip_tower(
    config: ClipVisionConfig, params: Mapping[str, Any], *, project: bool, dtype: DTypeLike = jnp.float32
) -> RegionTower:
    """The patch grid of a CLIP vision transformer: last states after the final norm.

    Args:
      config, params: of the tower, with a position table for `config.image_size`.
      project: through CLIP's projection, into the space of its texts; else C is the tower's width.
      dtype: compute dtype.
    """
    model = ClipVision(config, dtype)

    def maps(params: Any, images: Array) -> Array:
        out: Any = model.apply({"params": params}, images)
        states = out.hidden[-1][:, 1:]
        states = layer_norm(config.ln_eps, dtype).apply({"params": params["ln_post"]}, states)
        if project:
            states = states @ params["projection"]["kernel"].astype(dtype)
        return states.reshape(len(images), config.grid, config.grid, -1)

    return RegionTower(maps, params, config.image_size, config.mean)


def resnet_tower(
    model: ResNet, variables: Mapping[str, Any], *, image_size: int, level: str = "c5"
) -> RegionTower:
    """A map of a ResNet: "c5", a cell every 32 pixels, or "c4", every 16, half as wide.

    Raises:
      ValueError: an unknown level, or an image size that is not whole cells.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image_size {image_size} is not a multiple of 32, as a ResNet needs")
    headless = model.clone(num_classes=None)

    def maps(variables: Any, images: Array) -> Array:
        return getattr(headless.apply(variables, images), level)

    params = {name: value for name, value in variables["params"].items() if name != "fc"}
    return RegionTower(maps, {**variables, "params": params}, image_size, model.mean)


def region_features(
    tower: RegionTower,
) -> Callable[[Any, UInt8[AnyArray, "b s s 3"], Float32[AnyArray, "b m 4"]], Float32[Array, "b m c"]]:
    """A jitted (variables, images, boxes in pixels of the images) -> the mean of the maps within each box.

    The samples are at least as many as the map has cells, so that none is skipped in a box of the whole
    image. It is compiled once a shape.
    """

    @jax.jit
    def features(
        variables: Any, images: UInt8[AnyArray, "b s s 3"], boxes: Float32[AnyArray, "b m 4"]
    ) -> Float[Array, "b m c"]:
        maps = tower.maps(variables, jnp.asarray(images)).astype(jnp.float32)
        side = maps.shape[1]
        pooled = roi_align(
            maps,
            boxes,
            output_size=1,
            sampling_ratio=max(side, _MIN_SAMPLES),
            spatial_scale=side / tower.image_size,
        )
        return pooled[:, :, 0, 0]

    return features
