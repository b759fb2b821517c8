"""ResNet weights of torchvision and timm, read and written. Both have the same names.

Sources: pytorch/vision torchvision/models/resnet.py; huggingface/pytorch-image-models timm/models/resnet.py.
Read are the plain bottleneck networks, ResNet-50, -101 and -152, with or without the head `fc`. A deep stem
(resnet50d), grouped or wide blocks and antialiasing have other tensors and are refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipdistill_jax.convert.rules import CONV, Rule, dense, norm, same, to_ours, to_theirs
from clipdistill_jax.models.resnet import ResNet, variable_shapes

Variables = dict[str, Any]
_COUNTER = "num_batches_tracked"  # torch's, which a fixed momentum does not use


def _conv(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", (f"params/{ours}/kernel",), CONV)]


def _norm(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm(theirs, f"params/{ours}"),
        *same(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
        *same(f"{theirs}.running_var", f"batch_stats/{ours}/var"),
    ]


def rules(stages: Sequence[int], head: bool) -> list[Rule]:
    """The table of names: theirs, and ours below {"params", "batch_stats"}.

    Args:
      stages: blocks of the four stages.
      head: whether there is `fc`.
    """
    made = [*_conv("conv1", "conv1"), *_norm("bn1", "bn1")]
    for i, blocks in enumerate(stages, start=1):
        for j in range(blocks):
            theirs, ours = f"layer{i}.{j}", f"layer{i}_{j}"
            for k in (1, 2, 3):
                made += _conv(f"{theirs}.conv{k}", f"{ours}/conv{k}")
                made += _norm(f"{theirs}.bn{k}", f"{ours}/bn{k}")
            if j == 0:
                made += _conv(f"{theirs}.downsample.0", f"{ours}/downsample_conv")
                made += _norm(f"{theirs}.downsample.1", f"{ours}/downsample_norm")
    return [*made, *dense("fc", "params/fc")] if head else made


def from_state_dict(
    state: Mapping[str, Any], source: str = "state dict", **fields: Any
) -> tuple[ResNet, Variables]:
    """The model and its {"params", "batch_stats"} (float32 NumPy) from torchvision's or timm's tensors.

    Args:
      state: tensors by name, with or without torch's batch counters.
      source: where they come from, for messages.
      fields: of `ResNet` that tensors do not tell: mean, std, dtype.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; each is named.
    """
    if "conv1.weight" not in state or np.ndim(state["conv1.weight"]) != 4:
        raise ValueError(
            f"{source}: not a ResNet of torchvision or timm: no tensor 'conv1.weight' [C, 3, 7, 7]"
        )
    blocks: list[set[int]] = [set(), set(), set(), set()]
    for name in state:
        if found := re.match(r"layer([1-4])\.(\d+)\.", name):
            blocks[int(found[1]) - 1].add(int(found[2]))
    a, b, c, d = (max(found, default=0) + 1 for found in blocks)
    head = "fc.weight" in state
    model = ResNet(
        stages=(a, b, c, d),
        width=len(state["conv1.weight"]),
        num_classes=len(state["fc.weight"]) if head else None,
        **fields,
    )
    table = rules(model.stages, head)
    counters = set(_counters(table))
    kept = {name: x for name, x in state.items() if name not in counters}
    return model, to_ours(kept, table, variable_shapes(model), source)


def to_state_dict(model: ResNet, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """torchvision's tensors from our {"params", "batch_stats"}; the batch counters are written as 0.

    Raises:
      ValueError: the variables are not the model's.
    """
    table = rules(model.stages, model.num_classes is not None)
    kept = {collection: variables[collection] for collection in ("params", "batch_stats")}
    return to_theirs(kept, table) | {name: np.zeros((), np.int64) for name in _counters(table)}


def _counters(table: Sequence[Rule]) -> list[str]:
    means = [rule.theirs for rule in table if rule.theirs.endswith(".running_mean")]
    return [name.removesuffix("running_mean") + _COUNTER for name in means]
