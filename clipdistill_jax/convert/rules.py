"""Tables of names: how another library's tensors and our parameters stand for each other."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

# Axes of theirs, in our order. torch keeps dense weights [out, in] and convolutions [out, in, h, w].
SAME: tuple[int, ...] | None = None
DENSE = (1, 0)
CONV = (2, 3, 1, 0)


class Rule(NamedTuple):
    """One tensor of theirs and the parameters of ours that it holds.

    Attributes:
      theirs: their name, in torch's dotted spelling.
      ours: our paths, joined by slashes. Several: theirs is their concatenation, in equal parts,
        along its first axis.
      axes: `SAME`, `DENSE` or `CONV`, applied to each part.
    """

    theirs: str
    ours: tuple[str, ...]
    axes: tuple[int, ...] | None = SAME


def same(theirs: str, ours: str) -> list[Rule]:
    """A tensor kept as it is."""
    return [Rule(theirs, (ours,))]


def dense(theirs: str, ours: str) -> list[Rule]:
    """A linear layer with a bias."""
    return [Rule(f"{theirs}.weight", (f"{ours}/kernel",), DENSE), *same(f"{theirs}.bias", f"{ours}/bias")]


def norm(theirs: str, ours: str) -> list[Rule]:
    """A norm's gain and bias."""
    return [*same(f"{theirs}.weight", f"{ours}/scale"), *same(f"{theirs}.bias", f"{ours}/bias")]


def under(theirs: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """The same rules with a prefix on either side."""
    return [Rule(theirs + r.theirs, tuple(ours + path for path in r.ours), r.axes) for r in rules]


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def to_ours(
    state: Mapping[str, Any], rules: Sequence[Rule], shapes: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Our parameter tree (float32 NumPy) from their tensors.

    Args:
      state: their tensors by name, all of them.
      rules: the table.
      shapes: our tree of arrays or ShapeDtypeStructs, to check against.
      source: where the tensors come from, for messages.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; each is named.
    """
    problems = []
    missing, unknown = {r.theirs for r in rules} - set(state), set(state) - {r.theirs for r in rules}
    if missing:
        problems.append(f"missing: {_names(missing)}")
    if unknown:
        problems.append(f"unknown: {_names(unknown)}")
    if problems:
        raise ValueError(f"{source}: its tensors do not fit the model; {'; '.join(problems)}")
    wanted = {path: tuple(x.shape) for path, x in flax.traverse_util.flatten_dict(shapes, sep="/").items()}
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        tensor = np.asarray(state[rule.theirs])
        if len(rule.ours) > 1 and (tensor.ndim == 0 or len(tensor) % len(rule.ours)):
            problems.append(f"{rule.theirs} {tensor.shape} does not divide into {len(rule.ours)}")
            continue
        parts = np.split(tensor, len(rule.ours)) if len(rule.ours) > 1 else [tensor]
        for path, part in zip(rule.ours, parts, strict=True):
            fits = rule.axes is None or part.ndim == len(rule.axes)
            value = part.transpose(rule.axes) if rule.axes and fits else part
            if value.shape != wanted[path]:
                problems.append(f"{rule.theirs} {tensor.shape} gives {value.shape}, not {wanted[path]}")
            flat[path] = np.asarray(value, np.float32, order="C")
    if problems:
        raise ValueError(f"{source}: shapes do not fit the model: {'; '.join(problems)}")
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_theirs(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Their tensors (float32 NumPy, contiguous) from our parameter tree: the inverse of `to_ours`.

    Raises:
      ValueError: the tree lacks parameters of the table or has others; each is named.
    """
    flat = flax.traverse_util.flatten_dict(jax.device_get(dict(params)), sep="/")
    ours = {path for rule in rules for path in rule.ours}
    if ours != set(flat):
        raise ValueError(
            f"the parameters do not fit the table; missing: {_names(ours - set(flat)) or 'none'}; "
            f"unknown: {_names(set(flat) - ours) or 'none'}"
        )
    state = {}
    for rule in rules:
        parts = [np.asarray(flat[path], np.float32) for path in rule.ours]
        if rule.axes is not None:
            parts = [part.transpose(np.argsort(rule.axes)) for part in parts]
        state[rule.theirs] = np.asarray(np.concatenate(parts) if len(parts) > 1 else parts[0], order="C")
    return state
