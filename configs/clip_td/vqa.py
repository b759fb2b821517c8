"""CLIP-TD on VQA v2: configs/clip_td/vqa.py:STUDENT,METHOD,SHOTS[,semi][,clip=16].

  python -m clipdistill_jax.main --config=configs/clip_td/vqa.py:uniter_large,clip_td,1000 \
      --workdir=runs/vqa --config.data.source=DIR --config.data.regions=FEATURES

DIR holds the questions, annotations and images of VQA v2. SHOTS are questions in all, in the paper 100 and
1000. STUDENT and METHOD as in vcr.py; [P], [U], [V], [B] and [ours] as in common.py. To answer with the
classes of a published checkpoint, set data.answers to its file; else they are made of the training split.
"""

from ml_collections import ConfigDict

from configs.clip_td.common import parse
from configs.clip_td.stages import Recipe, Task, base_config, examples, with_stages
from configs.clip_td.vcr import ADAMW

# [U] trains on validation questions and Visual Genome too; here on the training split.
TASK = Task("vqa", records=443_757, items=1, groups=1, choices=1, head="vqa_output.")
LENGTH = 50  # a question and about 40 regions [ours]
HEAD = ((r"student/vqa/", 10.0),)  # [U] lr_mul

UNITER_BASE = Recipe(  # [U, train-vqa-base-4gpu.json]; [V, train-vqa-base-4gpu-adv.json]
    batch=examples(5120 * 5 * 4, LENGTH),  # tokens, micro-steps, GPUs: 2048
    rate=8e-5,
    warmup=600,
    steps=6000,
    optimizer=dict(ADAMW, clip_norm=2 / 5, multipliers=HEAD),  # see vcr.py
)
UNITER_LARGE = Recipe(  # [U, train-vqa-large-8gpu.json]; [V, train-vqa-large-8gpu-adv.json]
    batch=examples(3072 * 4 * 8, LENGTH),  # 2048
    rate=5e-5,
    warmup=500,
    steps=5000,
    optimizer=dict(ADAMW, clip_norm=2 / 4, multipliers=HEAD),
)
VL_BERT = Recipe(  # [B, vqa/large_4x16G_fp32.yaml]
    batch=16 * 4 * 4,  # images, micro-steps, GPUs
    rate=6.25e-7 * 256,  # that of one image, as in vcr.py
    warmup=500,
    epochs=5,
    optimizer=dict(name="adamw", weight_decay=1e-4, eps=1e-6, clip_norm=1.0),  # [B, vqa/function/train.py]
)


def get_config(argument: str = "uniter_base,clip_td,full") -> ConfigDict:
    run = parse(argument)
    # [U] max_txt_len 60, and special tokens; VL-BERT answers at a [MASK] of its own.
    config = base_config(run, TASK, max_tokens=64)
    fields = {}
    if run.kind == "villa":
        fields["adversarial"] = dict(preset="vqa_large" if run.large else "vqa_base")  # [V]
    recipe = VL_BERT if run.kind == "vl_bert" else UNITER_LARGE if run.large else UNITER_BASE
    config = with_stages(config, run, TASK, recipe, **fields)
    config.stages.finetune.init.answers_as_words = run.kind == "vl_bert"  # [B] CLASSIFIER_PRETRAINED
    return config
