"""Checkpoints that are not quite the model's: what may be left out is named, all else must fit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from clipdistill_jax.convert.rules import Rule, to_ours

Tree = dict[str, Any]


def tidy(
    state: Mapping[str, Any],
    rename: Callable[[str], str],
    unused: Sequence[str],
    ties: Mapping[str, str],
    source: str,
) -> Tree:
    """A checkpoint's tensors under one spelling of their names, each once.

    Args:
      state: their tensors by name.
      rename: their name -> the table's.
      unused: beginnings of the table's names; such tensors are left out.
      ties: name of a second copy -> name of the tensor; copies are left out.
      source: for messages.

    Raises:
      ValueError: two names become one, or a second copy differs.
    """
    made: Tree = {}
    for name, x in state.items():
        if (new := rename(name)) in made:
            raise ValueError(f"{source}: {name} is there twice, under two spellings of {new}")
        made[new] = x
    made = {name: x for name, x in made.items() if not name.startswith(tuple(unused))}
    for copy, name in ties.items():
        if {copy, name} <= made.keys() and not np.array_equal(np.asarray(made[copy]), np.asarray(made[name])):
            raise ValueError(f"{source}: {copy} should be {name}, to which it is tied, but differs")
    return {name: x for name, x in made.items() if name not in ties}


def read_partly(
    state: Mapping[str, Any],
    table: Sequence[Rule],
    shapes: Mapping[str, Any],
    missing: Sequence[str],
    source: str,
) -> Tree:
    """`rules.to_ours`, but for what is named as missing.

    Args:
      state: their tensors by name.
      table: of the whole model.
      shapes: of the whole model.
      missing: beginnings of their names; such tensors may be absent, and so are then the parameters.
      source: for messages.

    Raises:
      ValueError: other tensors are missing or unknown, or some have another shape; each is named.
    """
    table = [r for r in table if r.theirs in state or not r.theirs.startswith(tuple(missing))]
    return to_ours(state, table, shapes, source)


def fill(read: Mapping[str, Any], like: Mapping[str, Any], source: str, fresh: Sequence[str] = ()) -> Tree:
    """The tree of `like` (host arrays, as initialised) with the parameters that were read.

    Args:
      read: parameters.
      like: of the whole model.
      source: for messages.
      fresh: beginnings of paths that may stay as initialised.

    Raises:
      ValueError: the model has other parameters, or some of another shape; each is named.
    """
    given = flax.traverse_util.flatten_dict(dict(read), sep="/")
    own = flax.traverse_util.flatten_dict(dict(like), sep="/")
    problems = [f"{path}: the model has none" for path in given if path not in own]
    problems += [
        f"{path}: missing" for path in own if path not in given and not path.startswith(tuple(fresh))
    ]
    problems += [
        f"{path}: {np.shape(x)}, the model has {np.shape(own[path])}"
        for path, x in given.items()
        if path in own and np.shape(x) != np.shape(own[path])
    ]
    if problems:
        raise ValueError(f"{source}: its parameters do not fit the model; {'; '.join(problems)}")
    return flax.traverse_util.unflatten_dict(own | given, sep="/")


def paths(table: Iterable[Rule], names: Sequence[str]) -> tuple[str, ...]:
    """Our paths of the tensors whose names begin so."""
    return tuple(path for rule in table if rule.theirs.startswith(tuple(names)) for path in rule.ours)


def start_from_bert(
    bert: Mapping[str, Any], like: Mapping[str, Any], source: str, fresh: Sequence[str] = ()
) -> Tree:
    """The tree of `like` (host arrays, as initialised) with a BERT's embeddings, encoder and pooler.

    The tables of words and types may have more rows than BERT's, which are then their first. What no BERT
    has, regions and heads, stays as initialised.

    Args:
      bert: {"embeddings", "encoder", "pooler"}, as `hf_bert.load` gives them.
      like: parameters of the whole model.
      source: for messages.
      fresh: beginnings of paths of a BERT's parts that may stay too.

    Raises:
      ValueError: the parameters do not fit; each is named.
    """
    embeddings = dict(bert["embeddings"])
    for name in ("token_embedding", "type_embedding"):
        rows, own = embeddings[name]["embedding"], np.asarray(like["embeddings"][name]["embedding"])
        if len(rows) < len(own) and rows.shape[1:] == own.shape[1:]:
            embeddings[name] = {"embedding": np.concatenate([rows, own[len(rows) :]])}
    others = (f"{part}/" for part in like if part not in ("embeddings", "encoder", "pooler"))
    return fill({**bert, "embeddings": embeddings}, like, source, (*others, *fresh))


def rows_of(state: Mapping[str, Any], name: str, source: str, axis: int = 0) -> int:
    """A size that a tensor tells. Raises ValueError where it is not there, or has fewer axes."""
    if name not in state:
        raise ValueError(f"{source}: its tensors do not fit the model; missing: {name}")
    shape = np.shape(state[name])
    if len(shape) != 2:
        raise ValueError(f"{source}: {name} should be a matrix, it is {shape}")
    return shape[axis]


def sizes_of(
    state: Mapping[str, Any],
    tables: str,
    prefix: str,
    classes: Mapping[str, tuple[str, str]],
    heads: Sequence[str],
    attention_heads: int | None,
    source: str,
) -> Tree:
    """The fields of a `BertConfig`, and the classes of its heads, that tensors tell.

    Args:
      state: tensors by name.
      tables: beginning of the names of the tables of words, positions and types.
      prefix: beginning of the encoder's names.
      classes: head -> (field, name of the tensor with a row a class).
      heads: that are read; one whose tensor is missing leaves its field out.
      attention_heads: None is one for 64 of the width.
      source: for messages.

    Raises:
      ValueError: a tensor is missing, or is no matrix.
    """
    words, start = f"{tables}word_embeddings.weight", f"{prefix}encoder.layer."
    width = rows_of(state, words, source, axis=1)
    told = {field: name for head, (field, name) in classes.items() if head in heads and name in state}
    return {
        "vocab_size": rows_of(state, words, source),
        "context_length": rows_of(state, f"{tables}position_embeddings.weight", source),
        "types": rows_of(state, f"{tables}token_type_embeddings.weight", source),
        "width": width,
        "layers": len({name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)}),
        "heads": attention_heads or width // 64,
        "mlp_width": rows_of(state, f"{start}0.intermediate.dense.weight", source),
        **{field: rows_of(state, name, source) for field, name in told.items()},
    }


def heads_of(
    state: Mapping[str, Any], tables: Mapping[str, Sequence[Rule]], wanted: Sequence[str] | None
) -> tuple[str, ...]:
    """The heads that are wanted, or, with None, those whose tensors are all there.

    Raises:
      ValueError: a wanted head that is in no table.
    """
    if wanted is None:
        return tuple(name for name, table in tables.items() if all(rule.theirs in state for rule in table))
    unknown = [name for name in wanted if name not in tables]
    if unknown:
        raise ValueError(f"heads has {unknown[0]!r}; it can have {', '.join(tables)}")
    return tuple(wanted)
