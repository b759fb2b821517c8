"""The embedded world: clips of moving coloured shapes with captions, in the file formats of real data sets.

A scene holds one to three objects; each has a size, a colour, a shape and a motion. Scenes differ between
splits. Training captions name only some of the objects and drop attributes, as people do; test captions
tell the clips apart. Some test clips have a *motion twin*: the same frames in reverse order, so that a model
which pools frames without their order gives both the same vector.

Nothing here is read by training code: what is written is read like any real data set.
"""

from collections.abc import Callable
from pathlib import Path

from clipdistill_jax.data.shapes.activitynet import write_activitynet
from clipdistill_jax.data.shapes.didemo import write_didemo
from clipdistill_jax.data.shapes.lsmdc import write_lsmdc
from clipdistill_jax.data.shapes.msrvtt import write_msrvtt
from clipdistill_jax.data.shapes.msvd import write_msvd
from clipdistill_jax.data.shapes.world import Scene, Thing, WorldConfig, scenes

__all__ = ["WRITERS", "Scene", "Thing", "WorldConfig", "scenes", "write_msrvtt"]

# The writer of each format of `data.formats.FORMATS`: folder, config -> the folder, written.
WRITERS: dict[str, Callable[[str | Path, WorldConfig], Path]] = {
    "msrvtt": write_msrvtt,
    "msvd": write_msvd,
    "didemo": write_didemo,
    "activitynet": write_activitynet,
    "lsmdc": write_lsmdc,
}
