"""The numbers that CLIPPING (Pei et al., CVPR 2023) published, from its poster, and the table each stands in.

Rows are named as in configs/clipping/ablation.py. All recalls are R@1 in percent on MSR-VTT's 1k test split.
"""

import dataclasses

FRAMES = 12  # of a clip, in Table 2


@dataclasses.dataclass(frozen=True)
class Row:
    """A trained model.

    Attributes:
      name: of the ablation config's row.
      label: what the poster says of it: the parts that are distilled, or the model's name.
      t2v, v2t: R@1 text to video and video to text; None where the poster gives none.
      tables: where it stands. The tables agree wherever a row stands in several.
    """

    name: str
    label: str
    t2v: float
    v2t: float | None
    tables: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Ordering:
    """A claim of the poster: row `higher` has the higher R@1 than row `lower`, both ways."""

    lower: str
    higher: str
    table: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A row of Table 2: a module's printed label, parameters, and "Flops" (a multiply-add counts once)."""

    label: str
    parameters: float
    flops: float


TEACHER = "teacher"
FULL = "T_S_SAB_CM"

ROWS = (
    Row("teacher", "CLIP vision (the teacher, CLIP4Clip)", 44.5, 42.2, ("Table 3",)),
    Row("alone", "MobileViTv2, no distillation", 25.7, 24.5, ("Table 3",)),
    Row("T", "T", 28.8, 27.3, ("Table 3",)),
    Row("T_S", "T, S", 33.0, 32.8, ("Table 3", "Table 4", "Contributions A")),
    Row("T_S_OL2OL", "T, S, OL2OL", 34.6, 33.4, ("Table 4",)),
    Row("T_S_TAB", "T, S, TAB", 35.1, 34.4, ("Table 4",)),
    Row("T_S_SAB_unmasked", "T, S, SAB without masking", 37.1, 35.7, ("Table 4",)),
    Row("T_S_SAB", "T, S, SAB", 37.6, 36.2, ("Table 3", "Table 4", "Contributions F")),
    Row("T_S_SAB_CMG", "T, S, SAB, CM_G", 39.6, 39.1, ("Table 3",)),
    Row("T_S_SAB_CM", "T, S, SAB, CM_G, CM_L", 40.7, 40.2, ("Table 3", "Contributions G")),
    Row("SAB_CM", "SAB, CM", 38.8, 38.5, ("Contributions B",)),
    Row("S_SAB_CM", "S, SAB, CM", 39.4, 39.1, ("Contributions C",)),
    Row("T_SAB_CM", "T, SAB, CM", 40.4, 40.0, ("Contributions D",)),
    Row("T_S_CM", "T, S, CM", 35.2, 34.4, ("Contributions E",)),
    Row("CLIPPING_tiny_without_T", "CLIPPING* without T, 8.7M", 37.5, None, ("Table 1",)),
    Row("CLIPPING_without_T", "CLIPPING without T, 21.3M", 38.6, None, ("Table 1",)),
    Row("CLIPPING_tiny", "CLIPPING*, 46.5M", 39.8, None, ("Table 1",)),
    # 40.7 with a vision tower pretrained on ImageNet-21k.
    Row("CLIPPING", "CLIPPING, 55.0M", 40.6, None, ("Table 1",)),
)

ORDERINGS = (
    *(
        Ordering(lower, higher, "Table 3")
        for lower, higher in (
            ("alone", "T"),
            ("T", "T_S"),
            ("T_S", "T_S_SAB"),
            ("T_S_SAB", "T_S_SAB_CMG"),
            ("T_S_SAB_CMG", "T_S_SAB_CM"),
            ("alone", "T_S_SAB_CM"),
            ("T_S_SAB_CM", "teacher"),
        )
    ),
    *(
        Ordering(lower, higher, "Table 4")
        for lower, higher in (
            ("T_S", "T_S_OL2OL"),
            ("T_S_OL2OL", "T_S_TAB"),
            ("T_S_TAB", "T_S_SAB_unmasked"),
            ("T_S_SAB_unmasked", "T_S_SAB"),
            ("T_S_TAB", "T_S_SAB"),
        )
    ),
    *(Ordering(lower, FULL, "Contributions") for lower in ("SAB_CM", "S_SAB_CM", "T_SAB_CM", "T_S_CM")),
)

# Table 2. The second and third row have the parameters and FLOPs of 12 blocks of width 512 on 32 tokens and
# of 4 blocks on 12 frames: CLIP's text tower and CLIP4Clip's temporal transformer. Their labels look swapped.
VISION = Module("Vision encoder (MobileViT-v2)", 4.5e6, 16.8e9)
BLOCKS_12 = Module("Temporal Transformer", 37.8e6, 1.2e9)
BLOCKS_4 = Module("Language encoder (CLIP_bert)", 12.6e6, 0.15e9)
TINY_BERT = Module("Language encoder (TinyBERT)", 4.2e6, 0.05e9)

# part of the model -> its row of Table 2, in both readings, for each kind of text tower.
READINGS = {
    "as printed": {"vision": VISION, "temporal": BLOCKS_12, "clip": BLOCKS_4, "bert": TINY_BERT},
    "labels swapped": {"vision": VISION, "temporal": BLOCKS_4, "clip": BLOCKS_12, "bert": TINY_BERT},
}

# Table 1: (text tower, has a temporal transformer) -> parameters in all, as printed. No reading of Table 2
# sums to the second: 17.1M as printed, 42.3M with the labels swapped; nor, so swapped, to the third: 21.3M.
TOTALS = {
    ("bert", False): 8.7e6,
    ("clip", False): 21.3e6,
    ("bert", True): 46.5e6,
    ("clip", True): 55.0e6,
}
