"""From a model's description in a config to its module."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clipdistill_jax.models.bert import PRESETS as BERT_PRESETS
from clipdistill_jax.models.bert import BertConfig
from clipdistill_jax.models.bert_text import BertText
from clipdistill_jax.models.clip import PRESETS, ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.joint import JointModel
from clipdistill_jax.models.mobilevit import MobileViTv2
from clipdistill_jax.models.temporal import MeanPool, SeqLSTM, SeqTransf, TightTransf
from clipdistill_jax.models.uniter import PRESETS as UNITER_PRESETS
from clipdistill_jax.models.uniter import Uniter
from clipdistill_jax.models.vl_bert import PRESETS as VL_BERT_PRESETS
from clipdistill_jax.models.vl_bert import VlBert

Spec = Mapping[str, Any]


def _clip_vision(spec: dict[str, Any], common: dict[str, Any]) -> nn.Module:
    preset = spec.pop("preset", None)
    base = PRESETS[preset][0] if preset else ClipVisionConfig()
    return ClipVision(dataclasses.replace(base, **spec), **common)


def _mobilevit(spec: dict[str, Any], common: dict[str, Any]) -> nn.Module:
    return MobileViTv2(**spec, **common)


def _clip_text(spec: dict[str, Any], common: dict[str, Any]) -> nn.Module:
    preset = spec.pop("preset", None)
    base = PRESETS[preset][1] if preset else ClipTextConfig()
    return ClipText(dataclasses.replace(base, **spec), **common)


def _bert_text(spec: dict[str, Any], common: dict[str, Any]) -> nn.Module:
    preset = spec.pop("preset", None)
    base = BERT_PRESETS[preset] if preset else BertConfig()
    own = {name: spec.pop(name) for name in ("projection_dim",) if name in spec}
    return BertText(dataclasses.replace(base, **spec), **own, **common)


VISION: dict[str, Callable[[dict[str, Any], dict[str, Any]], nn.Module]] = {
    "clip": _clip_vision,
    "mobilevit": _mobilevit,
}
TEXT: dict[str, Callable[[dict[str, Any], dict[str, Any]], nn.Module]] = {
    "clip": _clip_text,
    "bert": _bert_text,
}
TEMPORAL: dict[str, Callable[..., nn.Module]] = {
    "meanP": lambda dtype, remat: MeanPool(),
    "seqLSTM": lambda dtype, remat, **spec: SeqLSTM(dtype=dtype, **spec),
    "seqTransf": SeqTransf,
    "tightTransf": TightTransf,
}

# Models with one sequence of text and regions, and the presets of their sizes.
JOINT: dict[str, tuple[type[JointModel], Mapping[str, Any]]] = {
    "uniter": (Uniter, UNITER_PRESETS),
    "vl_bert": (VlBert, VL_BERT_PRESETS),
}


def build_model(spec: Spec, *, vocab_size: int | None = None, temporal: str | None = None) -> DualEncoder:
    """The dual encoder that a config describes.

    Args:
      spec: `kind`, a key of `VISION`, with that tower's own fields beside it; `text` and `temporal`, mappings
        with a `kind` of `TEXT` and `TEMPORAL` and that part's own fields; `dtype` and `remat`, for all parts.
      vocab_size: of the tokenizer; None leaves the text tower's own.
      temporal: another kind of head, without fields, in place of the spec's.

    Raises:
      ValueError: an unknown kind or field, with what there is.
    """
    spec = {name: dict(value) if isinstance(value, Mapping) else value for name, value in spec.items()}
    common = {"dtype": jnp.dtype(spec.pop("dtype", "float32")), "remat": spec.pop("remat", False)}
    text = dict(spec.pop("text", {"kind": "clip"}))
    head = {"kind": temporal} if temporal else dict(spec.pop("temporal", {"kind": "meanP"}))
    spec.pop("temporal", None)
    if vocab_size is not None:
        text["vocab_size"] = vocab_size
    return DualEncoder(
        vision=_make("vision tower", VISION, spec, lambda make, rest: make(rest, common)),
        text=_make("text tower", TEXT, text, lambda make, rest: make(rest, common)),
        temporal=_make("temporal head", TEMPORAL, head, lambda make, rest: make(**rest, **common)),
    )


def build_joint(
    spec: Spec, *, heads: Sequence[str] = (), sizes: Mapping[str, int] | None = None
) -> JointModel:
    """The student of questions that a config describes.

    Args:
      spec: `kind`, a key of `JOINT`; `preset`, "base" or "large", and fields of its config beside it; `dtype`
        and `remat`.
      heads: that the model has.
      sizes: fields of its config that the data decides, over those of `spec`.

    Raises:
      ValueError: an unknown kind, preset or field, with what there is.
    """

    def make(kind: tuple[type[JointModel], Mapping[str, Any]], rest: dict[str, Any]) -> JointModel:
        module, presets = kind
        common = {"dtype": jnp.dtype(rest.pop("dtype", "float32")), "remat": rest.pop("remat", False)}
        fields = {**rest, **(sizes or {})}
        return module(
            dataclasses.replace(presets[fields.pop("preset", "base")], **fields), tuple(heads), **common
        )

    return _make("student", JOINT, dict(spec), make)


def _make(what: str, table: Mapping[str, Any], spec: dict[str, Any], call: Callable[..., Any]) -> Any:
    spec = {name: tuple(value) if isinstance(value, list) else value for name, value in spec.items()}
    kind = spec.pop("kind", None)
    if kind not in table:
        raise ValueError(f"{what}: kind {kind!r} is not one of {', '.join(table)}")
    try:
        return call(table[kind], spec)
    except (TypeError, KeyError) as error:  # an unknown field, an unknown preset
        raise ValueError(f"{what} {kind!r}: {error}") from error
