"""What the configs of this folder share: students, methods, and their argument STUDENT,METHOD,SHOTS.

Where a value is from: [P] CLIP-TD (Wang et al. 2022), by its section, equation or table; [U] UNITER
(ChenRocks/UNITER), [V] VILLA (zhegan27/VILLA), [B] VL-BERT (jackroos/VL-BERT), by the config file named;
[ours] none says. 9.2 of [P] gives one recipe a student, which is that of the original's config for VCR, but
for what is noted: so on SNLI-VE and VQA the students have the originals' own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

# [P, 10.1, Table 8]. With selected words eq. 8 has a w', "proportionally updated", of which no more is said:
# the same weight here.
WEIGHT = 0.05
TOKENS = 2  # m, words chosen of a text [P, 9.2, Table 8]

# Student -> kind of the model, its size, the BERT whose words it reads and from which it starts by default.
STUDENTS = {
    "uniter_base": ("uniter", "base", "google-bert/bert-base-cased"),
    "uniter_large": ("uniter", "large", "google-bert/bert-large-cased"),
    "villa_base": ("uniter", "base", "google-bert/bert-base-cased"),  # VILLA is UNITER, trained otherwise
    "villa_large": ("uniter", "large", "google-bert/bert-large-cased"),
    "vl_bert_base": ("vl_bert", "base", "google-bert/bert-base-uncased"),
    "vl_bert_large": ("vl_bert", "large", "google-bert/bert-large-uncased"),  # the paper's [P, 9.2]
}


class Method(NamedTuple):
    """A row of [P, Table 2 or 8]: what the last stage distils, and whether it has a stage before it."""

    terms: tuple[str, ...] = ()
    selection: str = "scores"  # of the tokens
    gated: bool = False
    pretrained: bool = False


NAIVE = ("vision", "language")  # L_dv + L_dt (eqs. 2 to 4)
# Token selection adds L_dt' (eq. 7) to these, it does not take the place of L_dt: eq. 8 has all three.
SELECTED = (*NAIVE, "tokens")
METHODS = {
    "baseline": Method(),
    "naive_v": Method(("vision",)),
    "naive_l": Method(("language",)),
    "naive": Method(NAIVE),
    "rts": Method(SELECTED, selection="random"),  # random token selection: as many words, any words
    "ts": Method(SELECTED),
    "cw": Method(NAIVE, gated=True),  # confidence weighting (eqs. 9 and 10) of naive distillation
    "stage2": Method(pretrained=True),  # second-stage pretraining (Table 8): no distillation in either stage
    # Adaptive finetuning (eq. 11): pretraining with naive distillation, which is never gated, then eq. 1.
    "af": Method(NAIVE, pretrained=True),
    "clip_td": Method(SELECTED, gated=True, pretrained=True),  # AF + TS + CW
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A config argument, read."""

    student: str
    method: str
    shots: int  # labelled questions of each group; 0: all
    semi: bool  # the other questions too, without their labels [P, 4.1.1]
    patch: int  # pixels a side, of CLIP's patches
    options: Mapping[str, str]  # of the task

    @property
    def kind(self) -> str:
        """uniter, villa or vl_bert."""
        return self.student.rpartition("_")[0]

    @property
    def large(self) -> bool:
        return self.student.endswith("_large")


def parse(argument: str, **options: tuple[str, ...]) -> Run:
    """Reads STUDENT,METHOD,SHOTS[,semi][,clip=16][,OPTION=VALUE].

    Args:
      argument: of the config.
      options: the task's own, with their values, the default first.

    Raises:
      ValueError: something is not known, with what is.
    """
    parts = [part.strip() for part in argument.split(",")]
    if len(parts) < 3:
        raise ValueError(
            f"{argument!r} should be STUDENT,METHOD,SHOTS[,OPTION ...], as in uniter_base,clip_td,100"
        )
    student, method, shots, *given = parts
    for what, name, known in (("student", student, STUDENTS), ("method", method, METHODS)):
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; there are {', '.join(known)}")
    if shots != "full" and not (shots.isascii() and shots.isdigit() and int(shots) > 0):
        raise ValueError(f"shots is {shots!r}; it can be a number above 0, or full")
    options = {"clip": ("32", "16"), **options}
    chosen, semi = {name: values[0] for name, values in options.items()}, False
    for option in given:
        name, _, value = option.partition("=")
        if option == "semi":
            semi = True
        elif value in options.get(name, ()):
            chosen[name] = value
        else:
            known = ("semi", *(f"{name}={value}" for name, values in options.items() for value in values))
            raise ValueError(f"option {option!r} is not one of {', '.join(known)}")
    if semi and (shots == "full" or not METHODS[method].terms):
        raise ValueError("semi: only a number of shots leaves questions out, and only distillation uses them")
    patch = int(chosen.pop("clip"))
    return Run(student, method, 0 if shots == "full" else int(shots), semi, patch, chosen)


def terms(method: Method, weight: float = WEIGHT) -> dict[str, dict[str, Any]]:
    """The terms of a method, each with that weight."""
    made: dict[str, dict[str, Any]] = {
        # All choices are better than the right one alone [P, 9.2]; "l1" sums over the width, as in eq. 3.
        name: dict(weight=weight, distance="l1", choices="all")
        for name in method.terms
    }
    if "tokens" in made:
        made["tokens"] |= dict(count=TOKENS, selection=method.selection)
    return made
