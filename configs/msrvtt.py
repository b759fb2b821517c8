"""Real MSR-VTT: fine-tune CLIP ViT-B/32 as CLIP4Clip (seqTransf), then distil it into MobileViTv2.

  python -m clipdistill_jax.main --config=configs/msrvtt.py --workdir=runs/msrvtt --config.data.source=DIR

DIR holds MSRVTT_data.json, MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv and videos/.
"""

from ml_collections import ConfigDict

from clipdistill_jax.defaults import data, stage

CLIP = "openai/clip-vit-base-patch32"  # a hub id, or a local directory of the same files
MOBILEVIT = ""  # timm's mobilevitv2_100 model.safetensors; empty = from scratch


def get_config() -> ConfigDict:
    config = ConfigDict(sort_keys=False)
    config.seed = 42
    config.world = {}  # real data
    config.data = data(tokenizer=CLIP)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    temporal = dict(kind="seqTransf", layers=4)
    text = dict(kind="clip", preset="ViT-B/32")
    config.teacher = dict(
        kind="clip", preset="ViT-B/32", text=text, temporal=temporal, dtype="bfloat16", remat=False
    )
    config.student = dict(
        kind="mobilevit",
        width=1.0,
        embed_dim=512,
        text=text,
        temporal=temporal,
        dtype="bfloat16",
        remat=False,
    )
    towers = r"student/(vision|text|logit_scale)"
    config.stages = ConfigDict(
        dict(
            teacher=stage(
                title="teacher (CLIP4Clip)",
                model="teacher",
                init=dict(model=CLIP, temporal="text"),
                eval_every=1406,
                steps=7031,  # 5 epochs of 180,000 captions in batches of 128
                # CLIP4Clip's 1e-7 for CLIP's weights is an artefact of half-precision Adam; 1e-6 is ours.
                optimizer=dict(
                    learning_rate=dict(kind="cosine", value=1e-4, warmup_fraction=0.1),
                    multipliers=((towers, 1e-2),),
                    weight_decay=0.2,
                    b2=0.98,
                ),
            ),
            distilled=stage(
                title="student distilled",
                model="student",
                init=dict(text=CLIP, vision=MOBILEVIT, temporal="text"),
                teacher="teacher",
                eval_every=1406,
                steps=50625,  # 36 epochs: CLIPPING, Table 4
                terms=dict(
                    temporal=dict(weight=1.0), spatial=dict(weight=1.0), **{"global": dict(weight=1.0)}
                ),
            ),
        ),
        sort_keys=False,
    )
    return config
