"""Where a student of questions starts: UNITER's, VILLA's or VL-BERT's file, a BERT, an earlier stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill_jax.convert import files, hf_bert, partial, uniter, vl_bert
from clipdistill_jax.weights import STAGE, find_stage, stage_variables

Tree = dict[str, Any]


def read_question_start(
    init: Mapping[str, Any], params: Tree, kind: str, runs: Sequence[Path], seed: int
) -> Tree:
    """A student's parameters with those that a config's `init` names laid over the initialised ones.

    Args:
      init: `model`: "stage:NAME", a `.pt` or `.model` file of the student's kind, a Hugging Face directory or
        hub id of BERT, or "" for none; `missing` and `unused`: beginnings of names of tensors of a file that
        may be absent, or are not to be read (the head of the answers; those of pretraining).
      params: of the student as initialised, host arrays.
      kind: "uniter" or "vl_bert".
      runs: see `weights.find_stage`.
      seed: of the words that a UNITER without VCR's gets.

    Of a stage, the heads that the student does not have are left, and those that it has more stay as
    initialised.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: tensors are missing, unknown or ill-shaped; each is named.
    """
    source = init.get("model", "")
    if not source:
        return params
    if source.startswith(STAGE):
        read = stage_variables(find_stage(source.removeprefix(STAGE), runs))["params"]
        return partial.fill({part: read[part] for part in read if part in params}, params, source)
    path = Path(source).expanduser()
    if not path.is_file():
        return partial.start_from_bert(hf_bert.load(source)[1], params, source)
    names: dict[str, Any] = {field: tuple(init.get(field, ())) for field in ("missing", "unused")}
    read = _uniter(path, params, names, seed) if kind == "uniter" else _vl_bert(path, params, names)
    return partial.fill(read, params, source)


def _heads(params: Tree, known: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in known if name in params)


def _uniter(path: Path, params: Tree, names: Mapping[str, Any], seed: int) -> Tree:
    read = uniter.load(path, _heads(params, uniter.HEADS), **names).params
    words, types = (
        len(np.asarray(params["embeddings"][f"{table}_embedding"]["embedding"]))
        for table in ("token", "type")
    )
    return uniter.enlarge(read, words, types, seed)


def _vl_bert(path: Path, params: Tree, names: Mapping[str, Any]) -> Tree:
    state = files.read_weights(path)
    pretrained = any("mvrc_head" in name for name in state)
    start = vl_bert.VQA_START if "vqa" in params else vl_bert.VCR_START
    read = vl_bert.from_state_dict(
        state,
        _heads(params, vl_bert.HEADS),
        renamed=start if pretrained and not {"mlm", "mrc"} & params.keys() else None,
        source=str(path),
        **names,
    ).params
    return vl_bert.share_segments(read) if pretrained else read
