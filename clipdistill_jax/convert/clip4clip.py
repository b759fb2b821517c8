"""CLIP4Clip checkpoints, `pytorch_model.bin.N`. Source: ArrowLuo/CLIP4Clip modules/modeling.py."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clipdistill_jax.convert import openai_clip
from clipdistill_jax.convert.rules import DENSE, Rule, dense, norm, same, to_ours, under
from clipdistill_jax.models.clip import ClipTextConfig, ClipVisionConfig
from clipdistill_jax.models.temporal import MeanPool, SeqLSTM, SeqTransf, TightTransf


class Clip4Clip(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      configs: (vision, text) configurations.
      params: {"vision", "text", "temporal", "logit_scale"}, float32 NumPy ("temporal" is {} for meanP).
      kind: "meanP", "seqLSTM", "seqTransf" or "tightTransf".
      head: the temporal head's module, of the checkpoint's sizes.
    """

    configs: tuple[ClipVisionConfig, ClipTextConfig]
    params: dict[str, Any]
    kind: str
    head: nn.Module


def from_state_dict(state: Mapping[str, Any], source: str = "state dict") -> Clip4Clip:
    """Towers and temporal head of a checkpoint; the kind of head is told by the names.

    The old spellings gamma and beta are understood. A seqLSTM checkpoint carries a table of frame
    positions that its model never uses: it is dropped.

    Raises:
      ValueError: missing, unknown or ill-shaped tensors, each by name.
    """
    state = {re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", k)): v for k, v in state.items()}
    clip = {name.removeprefix("clip."): x for name, x in state.items() if name.startswith("clip.")}
    vision, text, params = openai_clip.from_state_dict(clip, f"{source} (clip.)")

    rest = {name: np.asarray(x) for name, x in state.items() if not name.startswith("clip.")}
    kind, head, rules = _head(rest, text.projection_dim, source)
    if kind == "seqLSTM":
        rest.pop("frame_position_embeddings.weight", None)
        biases = [rest.pop(f"lstm_visual.bias_{side}_l0", None) for side in ("ih", "hh")]
        if any(bias is None for bias in biases):
            raise ValueError(f"{source}: missing: lstm_visual.bias_ih_l0 or lstm_visual.bias_hh_l0")
        # torch keeps two biases that only ever appear as their sum.
        rest["lstm_visual.bias"] = np.add(*(np.asarray(bias, np.float32) for bias in biases))
    temporal = to_ours(rest, rules, _shapes(head, text.projection_dim), f"{source} (head {kind})")
    return Clip4Clip((vision, text), {**params, "temporal": temporal}, kind, head)


def _head(state: Mapping[str, np.ndarray], width: int, source: str) -> tuple[str, nn.Module, list[Rule]]:
    """Kind, module and table of the temporal head that these tensors are of."""
    if any(name.startswith(("cross.", "similarity_dense.")) for name in state):
        layers = _layers(state, "cross.transformer.resblocks.")
        positions = _rows(state, "cross.embeddings.position_embeddings.weight", source)
        rules = [
            *same("cross.embeddings.position_embeddings.weight", "position_embedding"),
            *norm("cross.pooler.ln_pool", "ln_pool"),
            *dense("cross.pooler.dense", "pooler"),
            *dense("similarity_dense", "similarity"),
            *_blocks("cross.transformer.resblocks.", layers),
        ]
        return "tightTransf", TightTransf(width=width, layers=layers, positions=positions), rules
    if any(name.startswith("transformerClip.") for name in state):
        layers = _layers(state, "transformerClip.resblocks.")
        positions = _rows(state, "frame_position_embeddings.weight", source)
        rules = [
            *same("frame_position_embeddings.weight", "position_embedding"),
            *_blocks("transformerClip.resblocks.", layers),
        ]
        return "seqTransf", SeqTransf(layers=layers, positions=positions), rules
    if any(name.startswith("lstm_visual.") for name in state):
        gates = {side: tuple(f"lstm/{side}{gate}" for gate in "ifgo") for side in "ih"}
        rules = [
            Rule("lstm_visual.weight_ih_l0", tuple(f"{path}/kernel" for path in gates["i"]), DENSE),
            Rule("lstm_visual.weight_hh_l0", tuple(f"{path}/kernel" for path in gates["h"]), DENSE),
            Rule("lstm_visual.bias", tuple(f"{path}/bias" for path in gates["h"])),
        ]
        return "seqLSTM", SeqLSTM(), rules
    return "meanP", MeanPool(), []


def _blocks(theirs: str, layers: int) -> list[Rule]:
    rules = []
    for i in range(layers):
        rules += under(f"{theirs}{i}.", f"transformer/block_{i}/", openai_clip.BLOCK)
    return rules


def _layers(state: Mapping[str, Any], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _rows(state: Mapping[str, np.ndarray], name: str, source: str) -> int:
    if name not in state:
        raise ValueError(f"{source}: missing: {name}")
    return len(state[name])


def _shapes(head: nn.Module, width: int) -> dict[str, Any]:
    """Shapes of the head's parameters."""
    frames = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    key = jax.random.key(0)
    if isinstance(head, TightTransf):
        text = jax.ShapeDtypeStruct((1, width), jnp.float32)
        made = jax.eval_shape(lambda *x: head.init(*x, method="scores"), key, text, frames, mask)
    else:
        made = jax.eval_shape(head.init, key, frames, mask)
    return made.get("params", {})
