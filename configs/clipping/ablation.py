"""The rows of CLIPPING's tables: configs/clipping/ablation.py:ROW trains one, with the teacher before it.

  python -m clipdistill_jax.main --config=configs/clipping/ablation.py:T_S_SAB --workdir=runs/sab \
      --config.data.source=DIR
  python -m clipdistill_jax.sweep --config=configs/clipping/ablation.py --world=shapes --seeds=3 \
      --workdir=runs/sweep

ROW is a key of ROWS, or a letter of the poster's table of contributions, A to G. After it may follow, with
commas between:

  world=shapes     the embedded world with the quickstart's models, in place of MSR-VTT
  reading=printed  Table 2 by its printed labels: 12 blocks in the temporal transformer, the first 4 of CLIP's
                   in the text tower. The default takes two labels as swapped: 4 and 12.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.clipping import msrvtt

STUDENT = "student"  # the stage that the rows differ in
TINY_BERT = "huawei-noah/TinyBERT_General_4L_312D"  # a hub id, or a local directory of the same files

SAB = ("temporal", "spatial", "sab")
ALL = (*SAB, "global", "local")

# Row -> the terms of its student. Table 3, then Table 4, then the contributions, then Table 1.
ROWS = {
    "teacher": (),  # only the teacher is trained
    "alone": (),
    "T": ("temporal",),
    "T_S": ("temporal", "spatial"),
    "T_S_SAB": SAB,
    "T_S_SAB_CMG": (*SAB, "global"),
    "T_S_SAB_CM": ALL,
    "T_S_OL2OL": ("temporal", "spatial", "ol2ol"),
    "T_S_TAB": ("temporal", "spatial", "tab"),
    "T_S_SAB_unmasked": SAB,
    "SAB_CM": ("sab", "global", "local"),
    "S_SAB_CM": ("spatial", "sab", "global", "local"),
    "T_SAB_CM": ("temporal", "sab", "global", "local"),
    "T_S_CM": ("temporal", "spatial", "global", "local"),
    "CLIPPING": ALL,
    "CLIPPING_tiny": ALL,  # the poster's CLIPPING*: TinyBERT reads the captions
    # A student without a temporal transformer has nothing for the temporal term to teach [ours].
    "CLIPPING_without_T": ALL[1:],
    "CLIPPING_tiny_without_T": ALL[1:],
}
LETTERS = dict(A="T_S", B="SAB_CM", C="S_SAB_CM", D="T_SAB_CM", E="T_S_CM", F="T_S_SAB", G="T_S_SAB_CM")
SWEEP = tuple(ROWS)[1:10]  # what the sweep trains where no rows are named: Tables 3 and 4

# The terms of a student. The poster gives no weights; these are ours, on MSR-VTT and on the embedded world.
WEIGHTS = {
    "msrvtt": dict(temporal=1.0, spatial=1.0, sab=1.0, tab=1.0, ol2ol=1.0, local=1.0, **{"global": 1.0}),
    "shapes": dict(temporal=1.0, spatial=1.0, sab=1.0, tab=1.0, ol2ol=1.0, local=1.0, **{"global": 2.0}),
}
LAYERS = dict(student_layers=(2, 3, 4))  # the stages with attention [ours]; of the teacher, every block
FIELDS = {
    "sab": dict(LAYERS, form="A", mask="depth"),  # as in msrvtt.py
    "tab": dict(LAYERS, form="A", mask="depth"),  # the same with the softmax over the teacher's layers
    "ol2ol": dict(LAYERS),  # teacher layers evenly spread
}


def get_config(argument: str = "T_S_SAB_CM") -> ConfigDict:
    row, options = parse(argument)
    world = options["world"]
    config = msrvtt.get_config() if world == "msrvtt" else quickstart.get_config()
    config.rows = SWEEP
    student = config.stages.distilled
    student.terms = {name: term(name, row, world) for name in ROWS[row]}
    student.title = row
    # Raw CLIP: as published, or as the world's own first stage left it.
    raw = msrvtt.CLIP if world == "msrvtt" else "stage:clip"
    student.clip = raw if "local" in student.terms else ""
    student.teacher = "teacher" if student.terms else ""
    student.cache = world == "msrvtt" and bool(student.terms)
    if world == "msrvtt":
        shape_student(config, row, options["reading"])
    before = {name: stage for name, stage in config.stages.items() if name in ("clip", "teacher")}
    config.stages = ConfigDict(before if row == "teacher" else {**before, STUDENT: student}, sort_keys=False)
    return config


def parse(argument: str) -> tuple[str, dict[str, str]]:
    """The row and the options of a config argument. Raises ValueError for what is not known."""
    row, *given = argument.split(",")
    row = LETTERS.get(row, row)
    if row not in ROWS:
        raise ValueError(f"there is no row {row!r}; there are {', '.join((*ROWS, *LETTERS))}")
    choices = dict(world=("msrvtt", "shapes"), reading=("swapped", "printed"))
    options = {name: values[0] for name, values in choices.items()}
    for option in given:
        name, _, value = option.partition("=")
        if value not in choices.get(name, ()):
            known = ", ".join(f"{name}={value}" for name, values in choices.items() for value in values)
            raise ValueError(f"option {option!r} of row {row} is not one of {known}")
        options[name] = value
    if options["world"] == "shapes" and (row.startswith("CLIPPING") or options["reading"] != "swapped"):
        raise ValueError("the embedded world has one student: no rows CLIPPING..., no reading=printed")
    return row, options


def term(name: str, row: str, world: str) -> dict:
    """A term with its weight and fields."""
    fields = {**FIELDS.get(name, {}), "weight": WEIGHTS[world][name]}
    return {**fields, "mask": "none"} if row == "T_S_SAB_unmasked" and name == "sab" else fields


def shape_student(config: ConfigDict, row: str, reading: str) -> None:
    """The row's text tower and temporal head, and where they start."""
    student, init = config.student, config.stages.distilled.init
    layers, text_layers = (4, 12) if reading == "swapped" else (12, 4)
    student.temporal = dict(kind="seqTransf", layers=layers)
    student.text = dict(kind="clip", preset="ViT-B/32", layers=text_layers)
    if row.startswith("CLIPPING_tiny"):
        student.text = dict(kind="bert", preset="tiny_4x312", projection_dim=msrvtt.WIDTH)
        config.data.student_tokenizer = init.text = TINY_BERT
        # TinyBERT's blocks are too narrow for "text"; the teacher has 4 to start from.
        init.temporal = "stage:teacher" if layers == 4 else ""
    if row.endswith("without_T"):
        student.temporal = dict(kind="meanP")
        init.temporal = ""
