"""CLIP-TD on SNLI-VE: configs/clip_td/snli_ve.py:STUDENT,METHOD,SHOTS[,semi][,clip=16].

  python -m clipdistill_jax.main --config=configs/clip_td/snli_ve.py:uniter_large,clip_td,1000 \
      --workdir=runs/snli_ve --config.data.source=DIR --config.data.regions=FEATURES

DIR holds snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl and flickr30k_images/. SHOTS are pairs of
each label, in the paper 1000 and 10000. STUDENT and METHOD as in vcr.py; [P], [U], [V], [B] and [ours] as in
common.py.
"""

from ml_collections import ConfigDict

from configs.clip_td.common import parse
from configs.clip_td.stages import Recipe, Task, base_config, examples, with_stages
from configs.clip_td.vcr import ADAMW

TASK = Task("snli_ve", records=529_527, items=1, groups=3, choices=1, head="vqa_output.")  # so named in [U]
LENGTH = 60  # a hypothesis and about 40 regions [ours]

UNITER_BASE = Recipe(  # [U, train-ve-base-2gpu.json]; [V, train-ve-base-2gpu-adv.json]
    batch=examples(4096 * 4 * 2, LENGTH),  # tokens, micro-steps, GPUs: 512
    rate=8e-5,
    warmup=400,
    steps=4000,
    optimizer=dict(ADAMW, clip_norm=2 / 4),  # see vcr.py
)
UNITER_LARGE = Recipe(  # [U, train-ve-large-4gpu.json]; [V, train-ve-large-4gpu-adv.json]
    batch=examples(4096 * 2 * 4, LENGTH),  # 512
    rate=3e-5,
    warmup=400,
    steps=4000,
    optimizer=dict(ADAMW, clip_norm=2 / 2),
)
VL_BERT = Recipe(  # VL-BERT has no SNLI-VE: as on VQA [ours], see vqa.py
    batch=256,
    rate=6.25e-7 * 256,
    warmup=500,
    epochs=5,
    optimizer=dict(name="adamw", weight_decay=1e-4, eps=1e-6, clip_norm=1.0),
)


def get_config(argument: str = "uniter_base,clip_td,full") -> ConfigDict:
    run = parse(argument)
    config = base_config(run, TASK, max_tokens=64)  # [U] max_txt_len 60, and special tokens
    fields = {}
    if run.kind == "villa":
        fields["adversarial"] = dict(preset="ve_large" if run.large else "ve_base")  # [V]
    recipe = VL_BERT if run.kind == "vl_bert" else UNITER_LARGE if run.large else UNITER_BASE
    return with_stages(config, run, TASK, recipe, **fields)
