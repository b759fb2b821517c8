"""Checkpoints of UNITER and VILLA, read and written.

Source of the names: ChenRocks/UNITER model/*.py and zhegan27/VILLA, whose models have the same. A file holds
the tensors, or has them under "model_state" (UNITER train_vcr.py:166-196).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipdistill_jax.convert import files, hf_bert
from clipdistill_jax.convert.partial import heads_of, read_partly, rows_of, sizes_of, tidy
from clipdistill_jax.convert.rules import Rule, dense, norm, same, to_theirs, under
from clipdistill_jax.models.joint import LABELS, param_shapes
from clipdistill_jax.models.uniter import Uniter, UniterConfig

REGIONS = [
    *dense("img_linear", "features"),
    *dense("pos_linear", "locations"),
    *norm("img_layer_norm", "ln_features"),
    *norm("pos_layer_norm", "ln_locations"),
    *norm("LayerNorm", "ln"),
    *same("mask_embedding.weight", "mask_embedding/embedding"),
]
CLASSIFIER = [*dense("0", "dense"), *norm("2", "ln"), *dense("3", "out")]
HEADS: dict[str, list[Rule]] = {
    "vcr": under("vcr_output.", "vcr/", CLASSIFIER),
    "ve": under("vqa_output.", "ve/", CLASSIFIER),
    "vqa": under("vqa_output.", "vqa/", CLASSIFIER),
    "mlm": [
        *dense("cls.predictions.transform.dense", "mlm/transform/dense"),
        *norm("cls.predictions.transform.LayerNorm", "mlm/transform/ln"),
        *same("cls.predictions.bias", "mlm/bias"),
    ],
    "mrfr": [
        *dense("feat_regress.net.0", "mrfr/transform/dense"),
        *norm("feat_regress.net.2", "mrfr/transform/ln"),
        *same("feat_regress.bias", "mrfr/bias"),
    ],
    "mrc": [
        *dense("region_classifier.net.0", "mrc/transform/dense"),
        *norm("region_classifier.net.2", "mrc/transform/ln"),
        *dense("region_classifier.net.3", "mrc/out"),
    ],
    "itm": dense("itm_output", "itm/out"),
}
WORDS, FEATURES = "uniter.embeddings.word_embeddings.weight", "uniter.img_embeddings.img_linear.weight"
ANSWERS, REGION_CLASSES = "vqa_output.3.weight", "region_classifier.net.3.weight"
TIES = {"cls.predictions.decoder.weight": WORDS, "feat_regress.weight": FEATURES}
PRETRAINING = ("cls.", "feat_regress.", "region_classifier.", "itm_output.")  # names of heads, for `unused`


class Checkpoint(NamedTuple):
    """What a file holds: configuration, heads, and parameters (float32 NumPy) of `Uniter(config, heads)`."""

    config: UniterConfig
    heads: tuple[str, ...]
    params: dict[str, Any]


def rules(layers: int, heads: Sequence[str]) -> list[Rule]:
    """The table of names of a UNITER with those heads."""
    made = under("uniter.", "", hf_bert.rules(layers))
    made += under("uniter.img_embeddings.", "region_embeddings/", REGIONS)
    return made + [rule for head in heads for rule in HEADS[head]]


def load(
    path: str | Path,
    heads: Sequence[str] | None = None,
    unused: Sequence[str] = (),
    missing: Sequence[str] = (),
    attention_heads: int | None = None,
) -> Checkpoint:
    """A `.pt` file of UNITER or VILLA; see `from_state_dict`."""
    return from_state_dict(files.read_weights(path), heads, unused, missing, attention_heads, str(path))


def from_state_dict(
    state: Mapping[str, Any],
    heads: Sequence[str] | None = None,
    unused: Sequence[str] = (),
    missing: Sequence[str] = (),
    attention_heads: int | None = None,
    source: str = "state dict",
) -> Checkpoint:
    """A checkpoint's tensors as ours; sizes, those of enlarged tables too, are read off them.

    Names may begin with `bert.` in place of `uniter.`; gamma and beta are understood.

    Args:
      state: tensors by name.
      heads: to be read; None takes those that there are. `vqa_output` is "ve" where it has three outputs.
      unused: beginnings of names of tensors not to be read: `PRETRAINING`, for a start of finetuning.
      missing: beginnings of names of tensors that may be absent: ("vcr_output.",) there. Their parameters
        are then absent too; `partial.fill` takes them from an initialised model.
      attention_heads: None is one for 64 of the width, as all published have.
      source: for messages.

    Raises:
      ValueError: other tensors are missing or unknown, some have another shape, or a tied copy differs.
    """
    state = tidy(state, _name, unused, TIES, source)
    kept = heads_of(state, HEADS, heads)
    if heads is None and "ve" in kept:  # one name for two heads
        other = "vqa" if len(state[ANSWERS]) == LABELS else "ve"
        kept = tuple(name for name in kept if name != other)
    classes = {"vqa": ("answers", ANSWERS), "mrc": ("region_classes", REGION_CLASSES)}
    config = UniterConfig(
        **sizes_of(state, "uniter.embeddings.", "uniter.", classes, kept, attention_heads, source),
        feature_width=rows_of(state, FEATURES, source, axis=1),
    )
    shapes = param_shapes(Uniter(config, kept))
    table = rules(config.layers, kept)
    return Checkpoint(config, kept, read_partly(state, table, shapes, missing, source))


def _name(name: str) -> str:
    """A tensor's name in UNITER today."""
    standard = hf_bert.standard_name(name)
    return f"uniter.{standard}" if name.startswith("bert.") else standard


def to_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors under UNITER's names, tied ones twice, from the parameters of a `Uniter`.

    Raises:
      ValueError: the parameters are not a UNITER's, or have both "ve" and "vqa", which share a name.
    """
    heads = [name for name in HEADS if name in params]
    if {"ve", "vqa"} <= set(heads):
        raise ValueError("the heads 've' and 'vqa' are both vqa_output in UNITER: write them one by one")
    state = to_theirs(params, rules(len(params["encoder"]), heads))
    for head, (copy, name) in zip(("mlm", "mrfr"), TIES.items(), strict=True):
        if head in heads:
            state[copy] = state[name]
    return state


def enlarge(params: Mapping[str, Any], vocab_size: int, types: int, seed: int) -> dict[str, Any]:
    """Parameters with more words and types, as VCR's need (model/vcr.py:32-50, pretrain_vcr.py:12-32).

    New words are N(0, 0.02), new types those of type 0. The masked-language head stays, with a bias of 0 for
    new words; UNITER loses it here.

    Raises:
      ValueError: a table is larger already.
    """
    embeddings = dict(params["embeddings"])
    words = np.asarray(embeddings["token_embedding"]["embedding"])
    kinds = np.asarray(embeddings["type_embedding"]["embedding"])
    more, more_types = vocab_size - len(words), types - len(kinds)
    if more < 0 or more_types < 0:
        raise ValueError(
            f"{len(words)} words and {len(kinds)} types cannot be enlarged to {vocab_size} and {types}"
        )
    new = np.random.default_rng(seed).normal(0.0, 0.02, (more, words.shape[1])).astype(words.dtype)
    embeddings["token_embedding"] = {"embedding": np.concatenate([words, new])}
    embeddings["type_embedding"] = {"embedding": np.concatenate([kinds, np.repeat(kinds[:1], more_types, 0)])}
    made = {**params, "embeddings": embeddings}
    if "mlm" in params:
        made["mlm"] = {**params["mlm"], "bias": np.pad(np.asarray(params["mlm"]["bias"]), (0, more))}
    return made
