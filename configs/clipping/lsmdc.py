"""CLIPPING on LSMDC: as msrvtt.py, which explains [C] and [ours], but for what is here.

  python -m clipdistill_jax.main --config=configs/clipping/lsmdc.py --workdir=runs/lsmdc \
      --config.data.source=DIR

DIR holds LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_challenge_1000_publictect.csv and the
videos.
"""

from ml_collections import ConfigDict

from configs.clipping import msrvtt

CLIPS = 101_079  # of the training list, with one caption each


def get_config() -> ConfigDict:
    config = msrvtt.get_config()
    config.data.format = "lsmdc"
    # 12 frames of 32 tokens [C], as MSR-VTT. The data set has a validation list of its own.
    return msrvtt.with_items(config, CLIPS)
