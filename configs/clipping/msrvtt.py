"""CLIPPING on MSR-VTT: CLIP ViT-B/32 fine-tuned as CLIP4Clip (seqTransf), then distilled into MobileViTv2.

  python -m clipdistill_jax.main --config=configs/clipping/msrvtt.py --workdir=runs/msrvtt \
      --config.data.source=DIR

DIR holds MSRVTT_data.json, MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv and videos/.

Where a value is from: [P] the poster of CLIPPING (Pei et al., CVPR 2023), by its table; [C] CLIP4Clip
(ArrowLuo/CLIP4Clip), README.md or the file named; [ours] neither says. The poster gives no batch size,
optimizer, learning rate, loss weights or temperature for the student.
"""

from ml_collections import ConfigDict

from clipdistill_jax.defaults import data, stage

CLIP = "openai/clip-vit-base-patch32"  # a hub id, or a local directory of the same files
# model.safetensors of timm's mobilevitv2_100.cvnets_in1k; empty = from scratch. [P, Table 1] has 40.6 where
# it names no data for pretraining, 40.7 with ImageNet-21k, for which weights of this width are not public.
MOBILEVIT = ""
BATCH = 128  # [C], for all data sets; for the student too [ours]
TEACHER_EPOCHS = 5  # [C]
STUDENT_EPOCHS = 36  # [P, Table 4]
WIDTH = 512  # of CLIP ViT-B/32's joint space


def with_items(config: ConfigDict, items: int, chunks: int = 1) -> ConfigDict:
    """Sets how long the stages train on `items` captions, and in how many parts a batch is encoded."""
    for name, epochs in (("teacher", TEACHER_EPOCHS), ("distilled", STUDENT_EPOCHS)):
        config.stages[name].update(
            steps=round(items * epochs / BATCH),
            eval_every=round(items / BATCH),  # [C]: after every epoch
            chunks=chunks,
        )
    return config


def terms() -> dict:
    """All of CLIPPING's terms: contributions G. The weights are [ours]: the poster gives none."""
    return {
        "temporal": dict(weight=1.0),
        "spatial": dict(weight=1.0),
        # Every block of the teacher from the student's stages with attention, of at most its depth [ours].
        "sab": dict(weight=1.0, form="A", mask="depth", student_layers=(2, 3, 4)),
        "global": dict(weight=1.0),
        "local": dict(weight=1.0),
    }


def get_config() -> ConfigDict:
    config = ConfigDict(sort_keys=False)
    config.seed = 42  # [C]
    config.base = ""  # folder of another run: its data, and the stages that it has finished, are used
    config.world = {}  # real data
    config.data = data(
        format="msrvtt",
        train="9k",  # [C]; the teacher's 44.5 [P, Table 3] is CLIP4Clip's on this list
        num_validation=500,  # [ours]: a checkpoint is chosen on them; CLIP4Clip chooses on the test split
        fps=1.0,  # [C] feature_framerate
        max_frames=32,  # [ours]: clips are 10 to 32 s long, so all are kept
        image_size=224,  # [C] rawvideo_util.py; the student's too: 16.8 G [P, Table 2] is 12 frames of 224
        num_frames=12,  # [C], [P, Table 2]
        max_tokens=32,  # [C]
        tokenizer=CLIP,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    # [P, Table 2] prints 12 blocks here and 4 in the text tower, but its FLOPs are those of 12 blocks on 32
    # tokens and of 4 on 12 frames, as in [C] main_task_retrieval.py:86. In ablation.py: reading=printed.
    temporal = dict(kind="seqTransf", layers=4)
    text = dict(kind="clip", preset="ViT-B/32")
    config.teacher = dict(
        kind="clip",
        preset="ViT-B/32",  # [C]; 19.5 times the student's 4.5M [P] are this tower's 87.8M
        text=text,
        temporal=temporal,
        dtype="bfloat16",  # [ours]
        remat=False,
    )
    config.student = dict(
        kind="mobilevit",
        width=1.0,  # [P, Table 2]: 4.5M
        embed_dim=WIDTH,
        text=text,
        temporal=temporal,
        dtype="bfloat16",  # [ours]
        remat=False,
    )
    # CLIP4Clip's 1e-7 for CLIP's own weights is an artefact of half-precision Adam; 1e-6 is [ours].
    towers = r"student/(vision|text|logit_scale)"
    config.stages = ConfigDict(
        dict(
            teacher=stage(
                title="teacher (CLIP4Clip)",
                model="teacher",
                init=dict(model=CLIP, temporal="text"),  # [C] modules/modeling.py:105
                captions="all",
                batch_size=BATCH,
                optimizer=dict(
                    name="adamw",  # [C] BertAdam, without its missing bias correction
                    learning_rate=dict(kind="cosine", value=1e-4, warmup_fraction=0.1),  # [C]
                    multipliers=((towers, 1e-2),),
                    weight_decay=0.2,  # [C] main_task_retrieval.py:183
                    b1=0.9,  # [C]
                    b2=0.98,  # [C]
                    clip_norm=1.0,  # [C]
                ),
            ),
            distilled=stage(
                title="student distilled",
                model="student",
                init=dict(text=CLIP, vision=MOBILEVIT, temporal="text"),  # [ours], as the teacher's
                teacher="teacher",  # [P]: T, S, SAB and the global alignment learn from the fine-tuned model,
                clip=CLIP,  # [P]: the local alignment from raw CLIP
                cache=True,  # [ours]: the teachers' vectors are computed once
                captions="all",
                batch_size=BATCH,
                optimizer=dict(
                    name="adamw",  # this and the rest [ours]
                    learning_rate=dict(kind="cosine", value=1e-4, warmup_fraction=0.1),
                    weight_decay=0.05,
                    b1=0.9,
                    b2=0.98,
                    clip_norm=1.0,
                ),
                terms=terms(),
            ),
        ),
        sort_keys=False,
    )
    # Every caption is an item [C] expand_msrvtt_sentences: 20 a clip.
    return with_items(config, 20 * (9000 - config.data.num_validation))
