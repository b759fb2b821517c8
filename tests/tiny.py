"""The shipped quickstart config, shrunk to seconds."""

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def load_config(name: str = "quickstart") -> Any:
    """`get_config()` of configs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def shrink(config: Any) -> Any:
    """Few clips, small towers, three steps a stage; every part is still there."""
    config.world.update(train=40, train_small=24, validation=12, test=12, twin_pairs=3)
    config.data.update(max_tokens=24, tokenizer="train:520", workers=1)
    for tower in (config.teacher, config.student):
        tower.text.update(width=16, layers=1, heads=2, mlp_width=32, projection_dim=16)
        tower.temporal.update(heads=2)
    config.teacher.update(width=16, layers=2, heads=2, mlp_width=32, projection_dim=16)
    config.student.update(embed_dim=16, channels=(8, 8, 8, 8, 8), stem_channels=8)
    for stage in config.stages.values():
        stage.update(steps=3, batch_size=8, eval_batch_size=8, log_every=1, save_every=0)
        stage.max_clips = 24 if stage.max_clips else 0
    return config
