"""CLIPPING on DiDeMo: as msrvtt.py, which explains [C] and [ours], but for what is here.

  python -m clipdistill_jax.main --config=configs/clipping/didemo.py --workdir=runs/didemo \
      --config.data.source=DIR

DIR holds train_list.txt, val_list.txt, test_list.txt, {train,val,test}_data.json and the videos. A clip's
sentences make one paragraph.
"""

from ml_collections import ConfigDict

from configs.clipping import msrvtt

CLIPS = 8_392  # of the training list


def get_config() -> ConfigDict:
    config = msrvtt.get_config()
    config.data.update(
        format="didemo",
        # [C] has 64 places, but reads 31 seconds at one frame a second: the others would be padding.
        max_frames=32,
        num_frames=32,
        max_tokens=64,  # [C]: paragraphs
    )
    return msrvtt.with_items(config, CLIPS, chunks=2)
