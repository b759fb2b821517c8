"""Hugging Face BERT directories, read and written.

Source of the names: huggingface/transformers models/bert/modeling_bert.py and modeling_flax_bert.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from clipdistill_jax.convert import files
from clipdistill_jax.convert.rules import Rule, dense, norm, same, to_ours, to_theirs, under
from clipdistill_jax.models.bert import BertConfig, param_shapes
from clipdistill_jax.models.layers import activation

EMBEDDINGS = [
    *same("word_embeddings.weight", "token_embedding/embedding"),
    *same("position_embeddings.weight", "position_embedding/embedding"),
    *same("token_type_embeddings.weight", "type_embedding/embedding"),
    *norm("LayerNorm", "ln"),
]
BLOCK = [
    *dense("attention.self.query", "attn/q"),
    *dense("attention.self.key", "attn/k"),
    *dense("attention.self.value", "attn/v"),
    *dense("attention.output.dense", "attn/o"),
    *norm("attention.output.LayerNorm", "ln_1"),
    *dense("intermediate.dense", "mlp/fc1"),
    *dense("output.dense", "mlp/fc2"),
    *norm("output.LayerNorm", "ln_2"),
]

# Ours -> Hugging Face's.
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "types": "type_vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "act": "hidden_act",
    "ln_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}

# What a BERT is pretrained or finetuned with, which is left out (fit_dense: TinyBERT's, to its teacher's
# width), and a buffer. Any other unknown tensor is refused.
LEFT_OUT = ("cls.", "classifier.", "qa_outputs.", "fit_dense.", "embeddings.position_ids")


def encoder_rules(layers: int) -> list[Rule]:
    """The table of names of the encoder: theirs under `encoder.layer.`, ours under `encoder/`."""
    made = []
    for i in range(layers):
        made += under(f"encoder.layer.{i}.", f"encoder/block_{i}/", BLOCK)
    return made


def rules(layers: int, pooler: bool = True) -> list[Rule]:
    """The table of names of embeddings, encoder and pooler."""
    made = under("embeddings.", "embeddings/", EMBEDDINGS) + encoder_rules(layers)
    return made + dense("pooler.dense", "pooler/dense") if pooler else made


def load(
    path_or_id: str | Path, pooler: bool | None = None, revision: str | None = None
) -> tuple[BertConfig, dict[str, Any]]:
    """Configuration and parameters {"embeddings", "encoder", "pooler"} of a BERT directory or hub id.

    Reads config.json and model.safetensors, flax_model.msgpack or pytorch_model.bin (or their shards), of a
    bare BERT or of one with the heads of `LEFT_OUT`; no config need name them, for what starts from a BERT
    has heads of its own. Parameters are float32 NumPy.

    Args:
      path_or_id: a local directory, or else the name of a hub repository.
      pooler: None reads it where there is one, False leaves it out, True needs it.
      revision: of the hub repository.

    Raises:
      FileNotFoundError: a file is not there; ValueError: it is not BERT's, or names and shapes do not fit.
    """
    folder = files.resolve(path_or_id, revision)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; a BERT directory has one") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    return from_state_dict(files.read_weights(folder), config, pooler, source=str(folder))


def from_state_dict(
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    pooler: bool | None = None,
    source: str = "state dict",
) -> tuple[BertConfig, dict[str, Any]]:
    """As `load`, from tensors in memory (torch's or Flax's names) and the contents of config.json.

    Names may begin with `bert.`; the old spellings gamma and beta of a norm's parameters are understood.
    """
    ours = config_of(config, source)
    state = {standard_name(name): x for name, x in state.items()}
    state = {name: x for name, x in state.items() if not name.startswith(LEFT_OUT)}
    if pooler is None:
        pooler = any(name.startswith("pooler.") for name in state)
    elif not pooler:
        state = {name: x for name, x in state.items() if not name.startswith("pooler.")}
    table = rules(ours.layers, pooler)
    if any(name.endswith(".kernel") for name in state):
        table = [_flax(rule) for rule in table]
    return ours, to_ours(state, table, param_shapes(ours, pooler), source)


def standard_name(name: str) -> str:
    """A tensor's name as BertModel has it: without `bert.`, with weight and bias for gamma and beta."""
    name = name.removeprefix("bert.")
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))


def _flax(rule: Rule) -> Rule:
    """The rule for Flax's tensors, whose last names and layout are ours."""
    (ours,) = rule.ours
    return Rule(f"{rule.theirs.rpartition('.')[0]}.{ours.rpartition('/')[2]}", rule.ours)


def config_of(config: Mapping[str, Any], source: str = "config.json") -> BertConfig:
    """Our configuration from the contents of config.json; what it leaves out is as in transformers.

    Raises:
      ValueError: it is not BERT's, or of a kind that is not known here.
    """
    from transformers import BertConfig as Theirs  # slow to import, and only needed here

    if config.get("model_type") != "bert":
        raise ValueError(f"{source}: config.json is of a {config.get('model_type')!r} model, not 'bert'")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{source}: position_embedding_type is {config['position_embedding_type']!r}; "
            "only absolute positions are known here"
        )
    whole = Theirs.from_dict(dict(config))
    made = BertConfig(**{ours: getattr(whole, theirs) for ours, theirs in FIELDS.items()})
    try:
        activation(made.act)
    except ValueError as error:
        raise ValueError(f"{source}: hidden_act: {error}") from error
    return made


def to_state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors under the names of torch's BertModel, from {"embeddings", "encoder"} and maybe "pooler"."""
    return to_theirs(params, rules(len(params["encoder"]), "pooler" in params))


def save(directory: str | Path, config: BertConfig, params: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors, for `BertModel.from_pretrained`.

    Without a pooler, load it there with `add_pooling_layer=False`.

    Args:
      directory: made if need be; files of those names are replaced.
      config: of the BERT.
      params: {"embeddings", "encoder"} and maybe "pooler". A text tower's "projection" has no place there.

    Raises:
      ValueError: the parameters are not those of the configuration, or there are others.
    """
    from transformers import BertConfig as Theirs

    state = to_state_dict(params)
    table = rules(config.layers, "pooler" in params)
    to_ours(state, table, param_shapes(config, "pooler" in params), "the parameters")  # they fit the config
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    Theirs(**fields, architectures=["BertModel"]).save_pretrained(folder)
    safetensors.numpy.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
