"""CLIPPING on ActivityNet Captions: as msrvtt.py, which explains [C] and [ours], but for what is here.

  python -m clipdistill_jax.main --config=configs/clipping/activitynet.py --workdir=runs/activitynet \
      --config.data.source=DIR

DIR holds train_ids.json, val_ids.json, train.json, val_1.json and the videos. A clip's sentences make one
paragraph; val_1 is the test split, as in [C].
"""

from ml_collections import ConfigDict

from configs.clipping import msrvtt

CLIPS = 10_009  # of train_ids.json


def get_config() -> ConfigDict:
    config = msrvtt.get_config()
    config.data.update(
        format="activitynet",
        max_frames=64,  # [C]: of clips of two minutes, a uniform choice
        num_frames=64,  # [C]
        max_tokens=64,  # [C]: paragraphs
    )
    return msrvtt.with_items(config, CLIPS - config.data.num_validation, chunks=4)
