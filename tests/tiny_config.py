"""A config with the smallest models, for commands that take a config file."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    text = dict(
        kind="clip",
        context_length=8,
        width=16,
        layers=1,
        heads=2,
        mlp_width=32,
        projection_dim=16,
        vocab_size=600,
    )
    tower = dict(kind="clip", image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32)
    model = dict(
        **tower, projection_dim=16, text=text, temporal=dict(kind="meanP"), dtype="float32", remat=False
    )
    shared = dict(
        title="",
        temporal="",
        init=dict(model="", text="", vision=""),
        captions="one",
        max_clips=0,
        num_frames=0,
        frame_sampling="uniform",
        batch_size=8,
        eval_batch_size=8,
        steps=20,
        chunks=1,
        optimizer=dict(name="adamw", learning_rate=1e-3),
        ema_decay=0.0,
        nan_policy="raise",
        sharding_rules=(),
        fsdp_min_size=2**20,
    )
    return ConfigDict(
        dict(
            seed=0,
            world=dict(train=24, train_small=8, validation=4, test=4, twin_pairs=1, seed=0),
            data=dict(
                source="",
                prepared="",
                train="9k",
                num_validation=0,
                fps=1.0,
                max_frames=4,
                stored_size=0,
                image_size=16,
                num_frames=2,
                max_tokens=8,
                tokenizer="train:600",
                max_unreadable=0.0,
                workers=1,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            teacher=model,
            student=model,
            stages=dict(
                alone=dict(shared, model="student", teacher="", terms={}),
                distilled=dict(
                    shared, model="student", teacher="alone", terms=dict(spatial=dict(weight=1.0))
                ),
            ),
        )
    )
