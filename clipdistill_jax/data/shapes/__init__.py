"""The embedded world, in the file formats of real data sets: clips of moving coloured shapes with captions,
and still scenes of people and things with captions or questions.

A scene of a clip holds one to three objects; each has a size, a colour, a shape and a motion. Scenes differ
between splits. Training captions name only some of the objects and drop attributes, as people do; test
captions tell the clips apart. Some test clips have a *motion twin*: the same frames in reverse order, so that
a model which pools frames without their order gives both the same vector.

What is in a still is told in `scenes`.

Nothing here is read by training code: what is written is read like any real data set.
"""

from collections.abc import Callable
from pathlib import Path

from clipdistill_jax.data.shapes.activitynet import write_activitynet
from clipdistill_jax.data.shapes.didemo import write_didemo
from clipdistill_jax.data.shapes.karpathy import write_karpathy
from clipdistill_jax.data.shapes.lsmdc import write_lsmdc
from clipdistill_jax.data.shapes.msrvtt import write_msrvtt
from clipdistill_jax.data.shapes.msvd import write_msvd
from clipdistill_jax.data.shapes.scenes import SceneConfig
from clipdistill_jax.data.shapes.snli_ve import write_snli_ve
from clipdistill_jax.data.shapes.vcr import write_vcr
from clipdistill_jax.data.shapes.vqa import write_vqa
from clipdistill_jax.data.shapes.world import Scene, Thing, WorldConfig, scenes

__all__ = ["WORLDS", "WRITERS", "Scene", "SceneConfig", "Thing", "WorldConfig", "scenes", "write_msrvtt"]

# The writer of each format, of clips, of captioned images and of questions: folder, config -> the folder.
WRITERS: dict[str, Callable[..., Path]] = {
    "msrvtt": write_msrvtt,
    "msvd": write_msvd,
    "didemo": write_didemo,
    "activitynet": write_activitynet,
    "lsmdc": write_lsmdc,
    "karpathy": write_karpathy,
    "vcr": write_vcr,
    "snli_ve": write_snli_ve,
    "vqa": write_vqa,
}
# The config that the writer takes.
WORLDS: dict[str, type[WorldConfig] | type[SceneConfig]] = {
    **dict.fromkeys(("msrvtt", "msvd", "didemo", "activitynet", "lsmdc"), WorldConfig),
    **dict.fromkeys(("karpathy", "vcr", "snli_ve", "vqa"), SceneConfig),
}
