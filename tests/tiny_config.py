"""A config with the smallest models, for commands that take a config file."""

from ml_collections import ConfigDict

from clipdistill_jax.defaults import data, stage


def get_config() -> ConfigDict:
    text = dict(kind="clip", context_length=8, width=16, layers=1, heads=2, mlp_width=32)
    text.update(projection_dim=16, vocab_size=600)
    tower = dict(kind="clip", image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32)
    model = dict(
        tower, projection_dim=16, text=text, temporal=dict(kind="meanP"), dtype="float32", remat=False
    )
    shared = dict(captions="one", batch_size=8, eval_batch_size=8, steps=20, model="student")
    config = ConfigDict(dict(seed=0, teacher=model, student=model), sort_keys=False)
    config.world = dict(train=24, train_small=8, validation=4, test=4, twin_pairs=1, seed=0)
    config.data = data(
        num_validation=0, image_size=16, num_frames=2, max_tokens=8, tokenizer="train:600", workers=1
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.stages = dict(
        alone=stage(**shared),
        distilled=stage(**shared, teacher="alone", terms=dict(spatial=dict(weight=1.0))),
    )
    return config
