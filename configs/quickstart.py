"""A small CLIP4Clip teacher and a smaller student, on the embedded world: about eight minutes on two cores.

  clip       CLIP from scratch: single frames of many clips with their captions
  teacher    CLIP4Clip: that CLIP, with a temporal transformer, on the same clips as videos
  alone      the student, from scratch, on few clips
  distilled  the same student, the same clips, batches and steps, with the teacher
"""

from ml_collections import ConfigDict

WIDTH = 96  # of the joint space and of the text towers


def get_config() -> ConfigDict:
    config = ConfigDict(sort_keys=False)
    config.seed = 0

    # The embedded world, written as an MSR-VTT tree to WORKDIR/world. To use your own data, set data.source.
    config.world = dict(train=16000, train_small=600, validation=256, test=512, twin_pairs=128, seed=0)
    config.data = dict(
        source="",
        prepared="",
        train="9k",  # which train list: 9k or 7k
        num_validation=0,  # the world has a list of its own
        fps=1.0,  # frames kept of a clip, a second
        max_frames=32,
        stored_size=0,  # short side of the stored frames; 0 = image_size
        image_size=32,
        num_frames=3,
        max_tokens=28,
        tokenizer="train:700",  # a BPE of 700 entries, learned from the captions
        max_unreadable=0.05,
        workers=0,  # decoding processes; 0 = one a core
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)

    text = dict(
        kind="clip", context_length=32, width=WIDTH, layers=2, heads=4, mlp_width=4 * WIDTH, projection_dim=WIDTH
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
        strides=(1, 1, 2, 2, 2, 1),  # the shipped (2, 1, 2, 2, 2, 2) would leave one pixel of 32
        depthwise="shift",  # the faster way on a CPU; "conv" on accelerators
        text=text,
        temporal=temporal,
        dtype="float32",
        remat=False,
    )

    config.stages = ConfigDict(
        dict(
            clip=stage(
                title="CLIP (single frames)",
                model="teacher",
                temporal="meanP",
                num_frames=1,
                frame_sampling="random",
                steps=800,
                batch_size=128,
            ),
            teacher=stage(title="teacher (CLIP4Clip)", model="teacher", init=dict(model="stage:clip"), steps=800),
            alone=stage(title="student alone", model="student", max_clips=600, steps=600),
            distilled=stage(
                title="student distilled",
                model="student",
                max_clips=600,
                steps=600,
                teacher="teacher",
                terms=dict(
                    temporal=dict(weight=1.0),
                    spatial=dict(weight=1.0),
                    **{"global": dict(weight=1.0)},
                ),
            ),
        ),
        sort_keys=False,
    )
    return config


def stage(**fields) -> ConfigDict:
    """One stage: the fields given, and for the others what all stages here share."""
    made = dict(
        title="",
        model="",  # "teacher" or "student"
        temporal="",  # another kind of head than the model's
        # Where weights start: "stage:NAME", a file, a directory, a hub id; temporal may be "text".
        init=dict(model="", text="", vision="", temporal=""),
        teacher="",  # the stage to learn from
        terms={},
        captions="one",  # "one" caption a clip and epoch, or "all"
        max_clips=0,  # train on the first of them only; 0 = all
        num_frames=0,  # 0 = data.num_frames
        frame_sampling="uniform",
        batch_size=64,
        eval_batch_size=64,
        steps=0,
        chunks=1,  # encode the batch in parts, to save memory; the loss stays that of the whole batch
        optimizer=dict(
            name="adamw",
            learning_rate=dict(kind="cosine", value=2e-3, warmup_fraction=0.1),
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        ema_decay=0.0,
        nan_policy="raise",  # or "skip"
        select="validation/t2v_R@1",  # which checkpoint is the result
        eval_every=0,  # 0 = at the end
        log_every=50,
        save_every=200,
        save_minutes=0.0,
        keep=1,
        sharding_rules=(),
        fsdp_min_size=2**20,
    )
    for name, value in fields.items():
        if name not in made:
            raise ValueError(f"a stage has no field {name!r}")
        made[name] = {**made[name], **value} if name == "init" else value
    return ConfigDict(made)
