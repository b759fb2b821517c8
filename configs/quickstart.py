"""A small CLIP4Clip teacher and a smaller student, on the embedded world: under twelve minutes on two cores.

clip       CLIP from scratch: single frames of many clips with their captions
teacher    CLIP4Clip: that CLIP, with a temporal transformer, on the same clips as videos
alone      the student, on the same clips
distilled  the same student, the same clips, batches and steps, with the teacher
"""

from ml_collections import ConfigDict

from clipdistill_jax import defaults
from clipdistill_jax.defaults import data

WIDTH = 96  # of the joint space and of the text towers


def get_config() -> ConfigDict:
    config = ConfigDict(sort_keys=False)
    config.seed = 0
    config.base = ""  # folder of another run: its data, and the stages that it has finished, are used

    # The embedded world, written as an MSR-VTT tree to WORKDIR/world. To use your own data, set data.source.
    config.world = dict(train=6000, train_small=600, validation=256, test=512, twin_pairs=128, seed=0)
    config.data = data(
        num_validation=0,  # the world has a list of its own
        image_size=32,
        num_frames=3,
        max_tokens=28,
        tokenizer="train:700",
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)

    text = dict(
        kind="clip",
        context_length=32,
        width=WIDTH,
        layers=2,
        heads=4,
        mlp_width=4 * WIDTH,
        projection_dim=WIDTH,
    )
    temporal = dict(kind="seqTransf", layers=1, heads=4, positions=32, position_std=0.5)
    config.teacher = dict(
        kind="clip",
        image_size=32,
        patch_size=8,
        width=WIDTH,
        layers=3,
        heads=4,
        mlp_width=4 * WIDTH,
        projection_dim=WIDTH,
        position_std=0.5,
        text=text,
        temporal=temporal,
        dtype="float32",
        remat=False,
    )
    config.student = dict(
        kind="mobilevit",
        width=0.25,
        embed_dim=WIDTH,
        depths=(1, 1, 1),
        strides=(2, 2, 1, 2, 1, 1),  # the shipped (2, 1, 2, 2, 2, 2) would leave one pixel of 32
        depthwise="shift",  # the faster way on a CPU; "conv" on accelerators
        text=text,
        temporal=temporal,
        dtype="float32",
        remat=False,
    )

    # The text tower starts as CLIP's, the vision tower from nothing; a third of the teacher's steps.
    student = dict(model="student", init=dict(text="stage:clip"), steps=290)
    config.stages = ConfigDict(
        dict(
            clip=stage(
                title="CLIP (single frames)",
                model="teacher",
                temporal="meanP",
                num_frames=1,
                frame_sampling="random",
                steps=250,
                batch_size=128,
            ),
            teacher=stage(
                title="teacher (CLIP4Clip)", model="teacher", init=dict(model="stage:clip"), steps=800
            ),
            alone=stage(title="student alone", **student),
            distilled=stage(
                title="student distilled",
                **student,
                teacher="teacher",
                terms={
                    "temporal": dict(weight=1.0),
                    "spatial": dict(weight=1.0),
                    "global": dict(weight=2.0),
                },
            ),
        ),
        sort_keys=False,
    )
    return config


def stage(**fields) -> ConfigDict:
    """A stage with what all stages here share."""
    shared = dict(
        captions="one",
        batch_size=64,
        optimizer=dict(learning_rate=dict(kind="cosine", value=2e-3, warmup_fraction=0.1), weight_decay=0.1),
        save_every=200,
        keep=1,
    )
    return defaults.stage(**{**shared, **fields})
