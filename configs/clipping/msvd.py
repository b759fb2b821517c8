"""CLIPPING on MSVD: as msrvtt.py, which explains [C] and [ours], but for what is here.

  python -m clipdistill_jax.main --config=configs/clipping/msvd.py --workdir=runs/msvd \
      --config.data.source=DIR

DIR holds train_list.txt, val_list.txt, test_list.txt, raw-captions.pkl and the videos. Every caption of a
test clip is a query.
"""

from ml_collections import ConfigDict

from configs.clipping import msrvtt

CAPTIONS = 48_774  # of the 1,200 training clips, about 41 each


def get_config() -> ConfigDict:
    config = msrvtt.get_config()
    config.data.format = "msvd"
    # 12 frames of 32 tokens [C], as MSR-VTT. The data set has a validation list of its own.
    return msrvtt.with_items(config, CAPTIONS)
