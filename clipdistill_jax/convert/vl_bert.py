"""Checkpoints of VL-BERT, read and written.

Source of the names: jackroos/VL-BERT common/visual_linguistic_bert.py and vcr/, vqa/ and pretrain/modules. A
`.model` file has the tensors under "state_dict"; names begin with `module.` after training on several GPUs,
and VCR's model has `vlbert._module.` for `vlbert.`.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipdistill_jax.convert import files, hf_bert
from clipdistill_jax.convert.partial import heads_of, read_partly, rows_of, sizes_of, tidy
from clipdistill_jax.convert.rules import Rule, dense, norm, same, to_theirs, under
from clipdistill_jax.models.joint import param_shapes
from clipdistill_jax.models.vl_bert import VlBert, VlBertConfig

OWN = [
    *same("vlbert.word_embeddings.weight", "embeddings/token_embedding/embedding"),
    *same("vlbert.position_embeddings.weight", "embeddings/position_embedding/embedding"),
    *same("vlbert.token_type_embeddings.weight", "embeddings/type_embedding/embedding"),
    *norm("vlbert.embedding_LayerNorm", "embeddings/ln"),
    *same("vlbert.end_embedding.weight", "end_embedding/embedding"),
    *norm("vlbert.visual_ln_text", "ln_text"),
    *norm("vlbert.visual_ln_object", "ln_object"),
    *dense("vlbert.pooler.dense", "pooler/dense"),
    *same("object_linguistic_embeddings.weight", "object_embedding/embedding"),
    *dense("image_feature_extractor.obj_downsample.1", "object_vectors/dense"),
]
HEADS: dict[str, list[Rule]] = {
    "vcr": dense("final_mlp.1", "vcr/out"),
    "ve": dense("final_mlp.1", "ve/out"),
    "vqa": [
        *dense("final_mlp.0.dense", "vqa/transform/dense"),
        *norm("final_mlp.0.LayerNorm", "vqa/transform/ln"),
        *dense("final_mlp.2", "vqa/out"),
    ],
    "objects": [
        *dense("cnn_loss_reg.0.dense", "objects/transform/dense"),
        *dense("cnn_loss_reg.2", "objects/out"),
    ],
    "mlm": [
        *dense("vlbert.mlm_head.predictions.transform.dense", "mlm/transform/dense"),
        *norm("vlbert.mlm_head.predictions.transform.LayerNorm", "mlm/transform/ln"),
        *same("vlbert.mlm_head.predictions.bias", "mlm/bias"),
    ],
    "mrc": [
        *same("object_mask_visual_embedding.weight", "mask_feature/embedding"),
        *same("object_mask_word_embedding.weight", "mask_object/embedding"),
        *dense("vlbert.mvrc_head.transform.dense", "mrc/transform/dense"),
        *dense("vlbert.mvrc_head.region_cls_pred", "mrc/out"),
    ],
    "itm": dense("vlbert.relationsip_head.caption_image_relationship", "itm/out"),  # so spelt
}
WORDS, OBJECTS = "vlbert.word_embeddings.weight", "image_feature_extractor.obj_downsample.1.weight"
TIES = {"vlbert.mlm_head.predictions.decoder.weight": WORDS}

# The detector of end-to-end checkpoints, for `unused`: this VL-BERT is fed with region features.
RESNET = tuple(
    f"image_feature_extractor.{part}." for part in ("backbone", "roi_head_feature_extractor", "head")
)
PRETRAINING = (
    *("vlbert.mlm_head.", "vlbert.mvrc_head.", "vlbert.relationsip_head."),
    *("object_mask_visual_embedding.", "object_mask_word_embedding.", "aux_text_visual_embedding."),
)
# The heads' starts from a pretrained file, for `renamed` (cfgs/vcr/*.yaml, cfgs/vqa/*.yaml).
VCR_START = {"vlbert.mvrc_head.transform.": "cnn_loss_reg.0."}
VQA_START = {"vlbert.mlm_head.predictions.transform.": "final_mlp.0."}
STARTS = {"objects": "mrc", "vqa": "mlm"}  # the same in ours: head -> the one with the same transform


class Checkpoint(NamedTuple):
    """What a file holds: configuration, heads, and parameters (float32 NumPy) of `VlBert(config, heads)`."""

    config: VlBertConfig
    heads: tuple[str, ...]
    params: dict[str, Any]


def rules(layers: int, heads: Sequence[str]) -> list[Rule]:
    """The table of names of a VL-BERT with those heads, without prefixes."""
    made = [*OWN, *under("vlbert.", "", hf_bert.encoder_rules(layers))]
    return made + [rule for head in heads for rule in HEADS[head]]


def load(
    path: str | Path,
    heads: Sequence[str] | None = None,
    unused: Sequence[str] = (),
    missing: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
    attention_heads: int | None = None,
    waves: int = 256,
) -> Checkpoint:
    """A `.model` file of VL-BERT; see `from_state_dict`."""
    state = files.read_weights(path)
    return from_state_dict(state, heads, unused, missing, renamed, attention_heads, waves, str(path))


def from_state_dict(
    state: Mapping[str, Any],
    heads: Sequence[str] | None = None,
    unused: Sequence[str] = (),
    missing: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
    attention_heads: int | None = None,
    waves: int = 256,
    source: str = "state dict",
) -> Checkpoint:
    """A checkpoint's tensors as ours; sizes are read off them.

    Args:
      state: tensors by name.
      heads: to be read; None takes those that there are. `final_mlp.1` is "ve" unless it has one output.
      unused: beginnings of names, without prefixes, of tensors not to be read: `RESNET`, `PRETRAINING`.
      missing: beginnings of names of tensors that may be absent: ("final_mlp.", "vlbert.pooler.") where
        finetuning starts from a pretrained file, which has no pooler. Their parameters are then absent too;
        `partial.fill` takes them from an initialised model.
      renamed: beginnings of names -> what to take them for: `VCR_START`, `VQA_START`.
      attention_heads: None is one for 64 of the width, as all published have.
      waves: frequencies of the geometry, which the tensors do not tell apart from the features.
      source: for messages.

    Raises:
      ValueError: other tensors are missing or unknown, some have another shape, or a tied copy differs.
    """
    state = tidy(state, functools.partial(_name, renamed=renamed or {}), unused, TIES, source)
    kept = heads_of(state, HEADS, heads)
    if heads is None and "ve" in kept:  # one name for two heads
        other = "ve" if len(state["final_mlp.1.weight"]) == 1 else "vcr"
        kept = tuple(name for name in kept if name != other)
    classes = {
        "vqa": ("answers", "final_mlp.2.weight"),
        "mrc": ("region_classes", "vlbert.mvrc_head.region_cls_pred.weight"),
        "objects": ("object_classes", "cnn_loss_reg.2.weight"),
    }
    config = VlBertConfig(
        **sizes_of(state, "vlbert.", "vlbert.", classes, kept, attention_heads, source),
        feature_width=rows_of(state, OBJECTS, source, axis=1) - 8 * waves,
        waves=waves,
    )
    shapes = param_shapes(VlBert(config, kept))
    table = rules(config.layers, kept)
    return Checkpoint(config, kept, read_partly(state, table, shapes, missing, source))


def _name(name: str, renamed: Mapping[str, str]) -> str:
    """Without prefixes, in today's spelling, and renamed."""
    name = hf_bert.standard_name(name).removeprefix("module.")
    name = re.sub(r"^vlbert\._module\.", "vlbert.", name)
    for old, new in renamed.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def to_state_dict(
    params: Mapping[str, Any], prefix: str = "module.", time_distributed: bool = False
) -> dict[str, np.ndarray]:
    """Tensors under VL-BERT's names, tied ones twice, from the parameters of a `VlBert`.

    Args:
      params: of the model.
      prefix: of every name.
      time_distributed: write `vlbert._module.`, as VCR's model has it.

    Raises:
      ValueError: the parameters are not a VL-BERT's, or have both "vcr" and "ve", which share a name.
    """
    heads = [name for name in HEADS if name in params]
    if {"vcr", "ve"} <= set(heads):
        raise ValueError("the heads 'vcr' and 've' are both final_mlp.1 in VL-BERT: write them one by one")
    state = to_theirs(params, rules(len(params["encoder"]), heads))
    if "mlm" in heads:
        state |= {copy: state[name] for copy, name in TIES.items()}
    inner = "vlbert._module." if time_distributed else "vlbert."
    return {prefix + re.sub(r"^vlbert\.", inner, name): x for name, x in state.items()}


def start_heads(read: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """Heads as `VCR_START` and `VQA_START` start them, from parameters with the heads of pretraining.

    Args:
      read: parameters.
      wanted: heads, among others.
    """
    starts = {head: of for head, of in STARTS.items() if head in wanted and of in read}
    return {head: {"transform": read[of]["transform"]} for head, of in starts.items()}


def share_segments(params: Mapping[str, Any]) -> dict[str, Any]:
    """Segment 1 as segment 0: in pretraining there is no second text (PARTIAL_PRETRAIN_SEGMB_INIT)."""
    table = np.array(params["embeddings"]["type_embedding"]["embedding"])
    table[1] = table[0]
    return {**params, "embeddings": {**params["embeddings"], "type_embedding": {"embedding": table}}}
