"""CLIP-TD on VCR: configs/clip_td/vcr.py:STUDENT,METHOD,SHOTS[,OPTION ...].

  python -m clipdistill_jax.main --config=configs/clip_td/vcr.py:vl_bert_large,clip_td,100 \
      --workdir=runs/vcr --config.data.source=DIR --config.data.regions=FEATURES \
      --config.weights=vl-bert-large-e2e.model

DIR holds train.jsonl, val.jsonl, test.jsonl and vcr1images/.

STUDENT  uniter_base, uniter_large, villa_base, villa_large, vl_bert_base, vl_bert_large
METHOD   baseline, naive_v, naive_l, naive, rts, ts, cw, stage2, af, clip_td: see `common.METHODS`
SHOTS    labelled questions of each of the seven categories, in the paper 100 and 1000; or full
OPTION   semi            the other questions too, without labels
         clip=32, 16     patch size of CLIP
         questions=both  one model for answers and rationales, as UNITER and VILLA have it; VL-BERT has one
                         for each: questions=qa, questions=qar

Table 8's weights and numbers of tokens are --config.stages.finetune.terms.tokens.count=3 and the like. [P],
[U], [V], [B] and [ours] are explained in common.py.
"""

from ml_collections import ConfigDict

from configs.clip_td.common import parse
from configs.clip_td.stages import Recipe, Task, base_config, examples, with_stages

KINDS = {"both": ("qa", "qar"), "qa": ("qa",), "qar": ("qar",)}
RECORDS = 212_923  # of train.jsonl
# As UNITER counts a question: four times (question and longest answer), a rationale, about 35 regions [ours].
LENGTH = 160
ADAMW = dict(name="adamw", weight_decay=0.01, b1=0.9, b2=0.98, eps=1e-6)  # [P, 9.2], [U], [V]

# Both add up the gradients of their micro-steps and clip the sum to 2; of the mean that is less.
UNITER = Recipe(  # [P, 9.2], and [U, train-vcr-*-4gpu.json]
    batch=examples(4000 * 5 * 4, LENGTH),  # tokens, micro-steps, GPUs: 512
    rate=6e-5,
    warmup=800,
    steps=8000,
    optimizer=dict(ADAMW, clip_norm=2 / 5),
)
VILLA = Recipe(  # [P, 9.2]; [V, train-vcr-large-4gpu-adv.json] has 2000 tokens, 10 micro-steps, 4 GPUs
    batch=examples(1250 * 8 * 8, LENGTH),  # 512
    rate=6e-5,
    warmup=1000,
    steps=10_000,
    optimizer=dict(ADAMW, clip_norm=2 / 8),
)
VL_BERT = Recipe(  # [P, 9.2], and [B, vcr/large_q2a_4x16G_fp16.yaml] with 20 epochs on 4 GPUs
    batch=4 * 4 * 8,  # images, micro-steps, GPUs
    rate=7e-5 * 4 * 4 * 8,  # the 7e-5 is that of one image [B, vcr/function/train.py:113]
    warmup=1000,
    epochs=30,
    drops=(14, 18, 26),
    low_shot_epochs=30,
    # [B] puts its weight decay of 1e-4 through the momentum, which makes it ten times as much.
    optimizer=dict(name="sgd", momentum=0.9, weight_decay=1e-4 / (1 - 0.9), clip_norm=10.0),
)
RECIPES = {
    "uniter_base": UNITER,
    "uniter_large": UNITER,
    "villa_base": UNITER,  # [V, train-vcr-base-4gpu-adv.json]; the paper's VILLA is the large one
    "villa_large": VILLA,
    "vl_bert_base": VL_BERT,
    "vl_bert_large": VL_BERT,
}


def get_config(argument: str = "uniter_base,clip_td,full") -> ConfigDict:
    run = parse(argument, questions=tuple(KINDS))
    kinds = KINDS[run.options["questions"]]
    if run.semi and "qa" not in kinds:
        raise ValueError("semi: a rationale's question shows the right answer, which has no place there")
    task = Task("vcr", RECORDS, items=len(kinds), groups=7, choices=4, head="vcr_output.")
    config = base_config(
        run,
        task,
        questions=kinds,
        # [B]: 64 words' pieces and three special tokens. [U] leaves out what by its count is longer than 220;
        # a text of 128 is hardly there [ours].
        max_tokens=67 if run.kind == "vl_bert" else 128,
    )
    fields = {}
    if run.kind == "villa":
        fields["adversarial"] = dict(preset="vcr_large" if run.large else "vcr_base")  # [V]
    elif run.kind == "vl_bert":
        fields["object_loss"] = 1.0  # [B] CNN_LOSS_TOP
    return with_stages(config, run, task, RECIPES[run.student], **fields)
