"""From a student, a method and a task to the config of a run: its data, models and stages.

A step of UNITER and VILLA has so many tokens, text and regions counted, on each GPU and in each of the
micro-steps that it adds up. Here batches are examples: a question with all its choices. `examples` says how
many make up those tokens; the lengths of an example that it is told are [ours]. [P], [U], [V], [B] and [ours]
are explained in common.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from clipdistill_jax import defaults
from configs.clip_td.common import METHODS, NAIVE, STUDENTS, Method, Run, terms

CLIP = "openai/clip-vit-base-patch{}"


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set; numbers are those of its training split.

    Attributes:
      format: of the data.
      records: questions.
      items: examples of a question: VCR's gives one for its answers and one for its rationales.
      groups: from each of which `shots` questions are drawn.
      choices: texts of an example.
      head: beginning of the names of UNITER's tensors that answer.
    """

    format: str
    records: int
    items: int
    groups: int
    choices: int
    head: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stage trains on all data.

    Attributes:
      batch: examples.
      rate: peak of the learning rate; of SGD, for `batch` examples: it is scaled with fewer.
      warmup: steps.
      steps: in all; or
      epochs: the same in passes over the examples.
      drops: epochs after which the rate is a tenth; without any it falls in a line to 0.
      low_shot_epochs: most passes over the examples of a low-shot run.
      optimizer: its other fields.
    """

    batch: int
    rate: float
    warmup: int
    steps: int = 0
    epochs: int = 0
    drops: tuple[int, ...] = ()
    # The paper says nothing of low-shot runs: 8000 steps would be 2900 epochs of 700 questions [ours].
    low_shot_epochs: int = 100
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def examples(tokens: int, length: int) -> int:
    """The power of two nearest to the number of examples of that length in a batch of tokens."""
    return 2 ** round(math.log2(tokens / length))


# UNITER's second stage of pretraining, on VCR [U, pretrain-vcr-*-4gpu.json]. [P] gives no recipe, and UNITER
# has no such stage on SNLI-VE and VQA.
PRETRAINING = Recipe(
    batch=examples(6144 * 4 * 4, 80),  # tokens, micro-steps, GPUs; one text and about 35 regions [ours]: 1024
    rate=3e-5,
    warmup=4500,
    steps=45_000,
    optimizer=dict(name="adamw", weight_decay=0.01, b2=0.98, eps=1e-6, clip_norm=0.0),  # no clipping
)
# [P, 9.2] names "MLM, ITM, etc.": the mix of [U, pretrain-indomain-base-8gpu.json]. UNITER's own second stage
# on VCR has no ITM: mlm 2, mrfr 1, mrckl 1, and in the large model 10, 1, 1.
RATIOS = {
    "uniter": {"itm": 2, "mlm": 2, "mrfr": 1, "mrckl": 1},
    # VL-BERT has no head that regresses features: the share of mrfr goes to mrckl, its own MVRC [ours].
    "vl_bert": {"itm": 2, "mlm": 2, "mrckl": 2},
}

# Beginnings of names of tensors in published files: what finetuning does not read, and what they may lack.
UNITER_HEADS = ("cls.", "feat_regress.", "region_classifier.", "itm_output.")
DETECTOR = tuple(
    f"image_feature_extractor.{part}." for part in ("backbone", "roi_head_feature_extractor", "head")
)
VL_BERT_HEADS = (
    *("vlbert.mlm_head.", "vlbert.mvrc_head.", "vlbert.relationsip_head."),  # so spelt
    *("object_mask_visual_embedding.", "object_mask_word_embedding.", "aux_text_visual_embedding."),
)


def base_config(run: Run, task: Task, **data: Any) -> ConfigDict:
    """A config without stages; `data` are further fields of its data."""
    kind, preset, bert = STUDENTS[run.student]
    config = ConfigDict(sort_keys=False)
    config.seed = 42  # [U]
    config.base = ""  # folder of another run: its data, and the stages that it has finished, are used
    config.world = {}  # real data
    # Where the student starts. UNITER's, VILLA's `.pt` or VL-BERT's `.model` file, or BERT's directory or hub
    # id: the originals' files are no longer served, so that a user has them or starts from BERT.
    config.weights = bert
    config.clip = CLIP.format(run.patch)  # a hub id, a local directory of the same files, OpenAI's .pt
    config.data = defaults.data(
        format=task.format,
        student_tokenizer=bert,
        tokenizer=CLIP.format(run.patch),
        # npz for VL-BERT too, which was trained from pixels on VCR: `prepare regions` writes them for all.
        region_format="npz",
        region_width=2048,  # [U, B]
        max_regions=100,  # [U] max_bb; of VCR's images 100 annotated and 100 detected, of which we keep 100
        image_size=224,  # what CLIP sees
        **data,
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    size = f"ViT-B/{run.patch}"
    config.teacher = dict(
        kind="clip", preset=size, text=dict(kind="clip", preset=size), dtype="bfloat16", remat=False
    )
    config.student = dict(kind=kind, preset=preset, dtype="bfloat16", remat=run.large)  # the last two [ours]
    return config


def with_stages(config: ConfigDict, run: Run, task: Task, recipe: Recipe, **fields: Any) -> ConfigDict:
    """The config with its stages: "pretrain" where the method has it, then "finetune".

    Args:
      config: of `base_config`.
      run: what the argument asks for.
      task: on which data.
      recipe: of the last stage.
      fields: of the last stage, beside those of the recipe and the method.
    """
    method, stages = METHODS[run.method], {}
    if method.pretrained:
        stages["pretrain"] = _pretrain(config, run, task, method)
    protocol = "semi_supervised" if run.semi else "low_shot" if run.shots else "full"
    items, low_shot = training_items(run, task), protocol == "low_shot"
    finetune = _stage(config, task, recipe, method, items, low_shot)
    finetune.update(title=run.method, protocol=protocol, shots=run.shots, **fields)
    finetune.terms = terms(method)
    # T is not given; 1 [ours]. All choices, as eq. 9 and [P, 9.2].
    finetune.gate = dict(temperature=1.0, choices="all") if method.gated else {}
    finetune.eval_every = math.ceil(finetune.steps / 8)  # [U] valid_steps of train-vcr-*-4gpu.json
    if method.pretrained:
        finetune.init.model = "stage:pretrain"
    else:
        _start(config, finetune, _file(run, task))
    config.stages = ConfigDict({**stages, "finetune": finetune}, sort_keys=False)
    return config


def training_items(run: Run, task: Task) -> int:
    """Examples of an epoch. Of an unlabelled VCR question only that of its answers can be shown."""
    labelled = run.shots * task.groups or task.records
    return labelled * task.items + (task.records - labelled if run.semi else 0)


def _pretrain(config: ConfigDict, run: Run, task: Task, method: Method) -> ConfigDict:
    """Eq. 11, on the full training set whatever the shots [P, 9.2]; the right choice alone is read."""
    naive = Method(NAIVE if method.terms else ())
    single = dataclasses.replace(task, choices=1)
    stage = _stage(config, single, PRETRAINING, naive, task.records * task.items)
    stage.update(title="adaptive finetuning" if naive.terms else "second-stage pretraining", select="")
    stage.terms = terms(naive)
    kind = STUDENTS[run.student][0]
    stage.pretraining = dict(
        ratios=RATIOS[kind],
        word_rate=0.15,  # [U]
        region_rate=0.15,  # [U] mrm_prob
        mismatch_rate=0.5,  # [U] itm_neg_prob
        transport_weight=0.1,  # [U] itm_ot_lambda
        # Heads run on 32 places: 15% of the longest texts and of 100 regions are fewer, nearly always [ours].
        most_words=32,
        most_regions=32,
    )
    known = dict(
        uniter=dict(missing=("itm_output.",)),  # which UNITER's second stage has not
        vl_bert=dict(
            # VL-BERT does not train the first; end to end it hides pixels, not features.
            missing=("vlbert.relationsip_head.", "object_mask_visual_embedding."),
            unused=(*DETECTOR, "aux_text_visual_embedding."),
        ),
    )
    _start(config, stage, known[kind])
    return stage


def _stage(
    config: ConfigDict, task: Task, recipe: Recipe, method: Method, items: int, low_shot: bool = False
) -> ConfigDict:
    """What stages share; `items` are the examples of an epoch."""
    # At least eight steps an epoch, or a low-shot run would hardly move; but 16 examples, so that as many
    # devices have one each [ours].
    batch = min(recipe.batch, max(2 ** int(math.log2(max(items / 8, 1))), 16))
    steps = recipe.steps or recipe.epochs * items // batch
    if low_shot:  # not longer than a run on all data
        whole = recipe.steps or recipe.epochs * task.records * task.items // recipe.batch
        steps = min(whole, recipe.low_shot_epochs * items // batch)
    optimizer = dict(recipe.optimizer)
    rate = recipe.rate * (batch / recipe.batch if optimizer["name"] == "sgd" else 1)
    optimizer["learning_rate"] = dict(
        kind="steps" if recipe.drops else "linear",
        value=rate,
        warmup_steps=min(recipe.warmup, steps // 10),  # a low-shot run is shorter than VL-BERT's [ours]
        boundaries=tuple(epoch * items // batch for epoch in recipe.drops),
        factor=0.1,
    )
    stage = defaults.stage(
        model="student",
        cache=bool(method.terms),  # CLIP's vectors are computed once [ours]
        batch_size=batch,
        steps=steps,
        chunks=max(batch * task.choices // 256, 1),  # 256 texts at a time [ours]
        optimizer=optimizer,
        select="validation/accuracy",  # [ours]
    )
    if method.terms:
        stage.clip = config.get_ref("clip")
    return stage


def _start(config: ConfigDict, stage: ConfigDict, known: Mapping[str, tuple[str, ...]]) -> None:
    stage.init.update(known)
    stage.init.model = config.get_ref("weights")
    if config.student.kind == "vl_bert":  # its files have no pooler: BERT's, as [B] does
        stage.init.pooler = config.data.get_ref("student_tokenizer")


def _file(run: Run, task: Task) -> dict[str, tuple[str, ...]]:
    """What a published file lacks for finetuning, and what it has in excess."""
    if run.kind != "vl_bert":
        return dict(missing=(task.head,), unused=UNITER_HEADS)
    missing, unused = ("final_mlp.",), (*DETECTOR, *VL_BERT_HEADS)
    if task.format == "vcr":
        missing = ("final_mlp.", "cnn_loss_reg.2.")  # classes of VCR's objects
    elif task.format == "vqa":
        missing = ("final_mlp.2.",)  # the rest is the masked-language head's
    else:
        unused = (*unused, "cnn_loss_reg.")
    return dict(missing=missing, unused=unused)
