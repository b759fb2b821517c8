"""CLIP-TD on the embedded world: a small CLIP, and small UNITERs that learn from it at low shot.

  bash launch/quickstart.sh clip_td

configs/clip_td/world.py:teacher trains the CLIP, on captions of stills. Exported as a Hugging Face directory
it is the `clip` of the others: METHOD[,SHOTS] trains one student on the world's VCR, `all[,SHOTS]` those of
ROWS, a stage each. METHOD as in common.py, SHOTS labelled questions of each category, 100 if it is left out.

Several seeds, when the quickstart has made the CLIP:

  python -m clipdistill_jax.sweep --config=configs/clip_td/world.py --world=runs/clip_td --seeds=3 \
      --workdir=runs/clip_td_sweep
  python -m clipdistill_jax.report clip_td --workdir=runs/clip_td_sweep

--world=DIR is the option world=DIR: the CLIP is DIR/clip, and the row that a sweep trains first has what the
methods share, the data and adaptive finetuning, which all seeds then start from.
"""

from typing import Any

from ml_collections import ConfigDict

from clipdistill_jax import defaults
from configs.clip_td.common import METHODS, NAIVE, Method, terms
from configs.clip_td.stages import RATIOS

ROWS = ("baseline", "naive", "ts", "cw", "af", "clip_td")  # of the paper's Table 2
TEACHER, ALL = "teacher", "all"
SHOTS = 100  # the paper's fewest
WEIGHT = 0.003  # the paper's 0.05 leaves students that begin from nothing no room for their task
SIDE = 64  # pixels of a still
WIDTH = 96  # of the towers, the joint space and the student


def get_config(argument: str = ALL) -> ConfigDict:
    row, shots, folder = parse(argument)
    config = ConfigDict(sort_keys=False)
    config.seed = 0
    config.base = ""  # folder of another run: its data, and the stages that it has finished, are used
    config.rows = ROWS
    config.clip = f"{folder}/clip" if folder else ""  # folder of the exported CLIP
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.teacher = clip_model()
    if row == TEACHER and not folder:
        return with_clip(config)
    return with_students(config, row, shots)


def parse(argument: str) -> tuple[str, int, str]:
    """(row, shots, folder) of a config argument. Raises ValueError for what is not known."""
    row, *given = argument.split(",")
    if row not in (TEACHER, ALL, *METHODS):
        raise ValueError(f"there is no row {row!r}; there are {', '.join((TEACHER, ALL, *METHODS))}")
    shots, folder = SHOTS, ""
    for option in given:
        if option.isascii() and option.isdigit() and int(option):
            shots = int(option)
        elif option.startswith("world=") and option != "world=":
            folder = option.removeprefix("world=")
        else:
            raise ValueError(f"option {option!r} of row {row} is neither a number of shots nor world=DIR")
    return row, shots, folder


def clip_model() -> dict[str, Any]:
    """CLIP, small."""
    tower = dict(width=WIDTH, heads=4, mlp_width=4 * WIDTH, projection_dim=WIDTH)
    return dict(
        kind="clip",
        image_size=SIDE,
        patch_size=16,
        layers=3,
        position_std=0.5,
        **tower,
        text=dict(kind="clip", context_length=32, layers=2, **tower),
        dtype="float32",
        remat=False,
    )


def with_clip(config: ConfigDict) -> ConfigDict:
    """One stage, "clip": the CLIP from scratch."""
    config.world = dict(train=4000, validation=64, test=256, captions=3, size=SIDE, seed=0)
    config.data = defaults.data(
        format="karpathy",
        image_size=SIDE,
        num_frames=1,
        max_frames=1,
        max_tokens=28,  # 99% of training captions fit
        tokenizer="train:1000",  # each word one token
    )
    clip = defaults.stage(
        title="CLIP",
        model="teacher",
        captions="one",
        batch_size=128,
        steps=600,
        # b2 is CLIP's own; with twice the rate colours or verbs are not learned in so few steps.
        optimizer=dict(
            learning_rate=dict(kind="cosine", value=1e-3, warmup_fraction=0.1), weight_decay=0.1, b2=0.98
        ),
        save_every=200,
        keep=1,
    )
    config.stages = ConfigDict(dict(clip=clip), sort_keys=False)
    return config


def with_students(config: ConfigDict, row: str, shots: int) -> ConfigDict:
    """The stages of a row; of `all`, those of all rows; of the teacher's, what they share."""
    config.world = dict(train=2000, validation=500, test=16, questions=3, size=SIDE, seed=0)
    config.data = defaults.data(
        format="vcr",
        image_size=SIDE,
        tokenizer="",
        student_tokenizer="train:500",
        max_tokens=32,
        clip_tokens=24,
        clip_text="choice",  # the captions from which CLIP learned say nothing like a question
        questions=("qa",),  # Q->A, as Table 2
        region_width=48,  # the world's
        max_regions=12,
        buckets=2,
    )
    config.data.tokenizer = config.get_ref("clip")  # the exported folder has the tokenizer too
    config.student = dict(
        kind="uniter",
        width=WIDTH,
        layers=2,
        heads=4,
        mlp_width=4 * WIDTH,
        context_length=64,
        initializer_range=0.1,  # BERT's 0.02 is for 768 channels
        dtype="float32",
    )
    shared = {}
    names = ROWS if row == ALL else () if row == TEACHER else (row,)
    if row == TEACHER or any(METHODS[name].pretrained and METHODS[name].terms for name in names):
        shared["pretrain"] = pretrain(config, Method(NAIVE))
    if any(METHODS[name].pretrained and not METHODS[name].terms for name in names):
        shared["pretrain_alone"] = pretrain(config, Method())
    students = {name: finetune(config, METHODS[name], name, shots) for name in names}
    config.stages = ConfigDict({**shared, **students}, sort_keys=False)
    return config


def pretrain(config: ConfigDict, method: Method) -> ConfigDict:
    """Adaptive finetuning, on all questions, or without terms a second stage of pretraining."""
    pretraining = dict(ratios=RATIOS["uniter"], most_words=8, most_regions=8, kl_mean="places")
    return stage(
        config,
        method,
        title="adaptive finetuning" if method.terms else "second-stage pretraining",
        pretraining=pretraining,
        batch_size=64,
        steps=600,
    )


def finetune(config: ConfigDict, method: Method, name: str, shots: int) -> ConfigDict:
    """A method's last stage."""
    before = ("pretrain" if method.terms else "pretrain_alone") if method.pretrained else ""
    return stage(
        config,
        method,
        title=name,
        init=dict(model=f"stage:{before}" if before else ""),
        protocol="low_shot",
        shots=shots,
        gate=dict(temperature=1.0, choices="all") if method.gated else {},
        batch_size=32,
        steps=300,
    )


def stage(config: ConfigDict, method: Method, **fields: Any) -> ConfigDict:
    """A stage of a student with what all of them share."""
    made = defaults.stage(
        model="student",
        terms=terms(method, WEIGHT),
        cache=bool(method.terms),
        optimizer=dict(learning_rate=dict(kind="cosine", value=1e-3, warmup_fraction=0.1), weight_decay=0.01),
        select="",  # the last step: results are of the validation split, as the paper's
        save_every=200,
        keep=1,
        **fields,
    )
    if method.terms:
        made.clip = config.get_ref("clip")
    return made
