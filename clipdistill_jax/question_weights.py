"""Where a student of questions starts: UNITER's, VILLA's or VL-BERT's file, a BERT, an earlier stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill_jax.convert import files, hf_bert, partial, uniter, vl_bert
from clipdistill_jax.data.formats.vcr import UNITER_PERSONS
from clipdistill_jax.models.bert import BertConfig
from clipdistill_jax.weights import STAGE, find_stage, stage_variables

Tree = dict[str, Any]
KINDS = {"uniter": uniter, "vl_bert": vl_bert}
POOLERS = ("uniter.pooler.", "vlbert.pooler.")  # names in files


def read_question_start(
    init: Mapping[str, Any],
    params: Tree,
    kind: str,
    runs: Sequence[Path],
    seed: int,
    config: BertConfig,
) -> Tree:
    """A student's parameters with those that a config's `init` names laid over the initialised ones.

    Args:
      init: `model`: "stage:NAME", a `.pt` or `.model` file of the student's kind, a Hugging Face directory or
        hub id of BERT, or "" for none; `missing` and `unused`: beginnings of names of tensors of a file that
        may be absent, or are not to be read (the head of the answers; those of pretraining); `pooler`: the
        BERT whose pooler is taken where `model` has none.
      params: of the student as initialised, host arrays.
      kind: "uniter" or "vl_bert".
      runs: see `weights.find_stage`.
      seed: of the words that a UNITER without VCR's gets.
      config: of the student; a BERT must compute as it says.

    Of a stage, the heads that the student does not have are left, and those that it has more stay as
    initialised, but for `vl_bert.start_heads`; of a BERT, all that no BERT has. Everything else must be given
    or be named as missing.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: tensors are missing, unknown or ill-shaped; each is named. Or the words are another
        vocabulary's, or a BERT is of another kind.
    """
    source = init.get("model", "")
    if not source:
        return params
    if source.startswith(STAGE):
        read = stage_variables(find_stage(source.removeprefix(STAGE), runs))["params"]
        return _from_stage(read, params, kind, source)
    path, layers = Path(source).expanduser(), len(params["encoder"])
    names: dict[str, Any] = {field: tuple(init.get(field, ())) for field in ("missing", "unused")}
    if init.get("pooler"):
        names["missing"] += POOLERS
    if not path.is_file():
        theirs, read = hf_bert.load(source)
        _check_same(theirs, config, source)
        _check_words(read, params, source)
        fresh = partial.paths(hf_bert.rules(layers), names["missing"])
        return partial.start_from_bert(_with_pooler(read, init), params, source, fresh)
    heads = tuple(name for name in KINDS[kind].HEADS if name in params)
    fresh = partial.paths(KINDS[kind].rules(layers, heads), names["missing"])
    if kind == "uniter":
        read = uniter.load(path, heads, **names).params
    else:
        read = _vl_bert(path, params, heads, names)
    _check_words(read, params, source)
    if kind == "uniter":
        read = uniter.enlarge(read, _rows(params, "token"), _rows(params, "type"), seed)
    return partial.fill(_with_pooler(read, init), params, source, fresh)


def answers_as_words(params: Tree, tokens: Sequence[Sequence[int]]) -> Tree:
    """With the mean vector of its words for each answer's row of the last layer, as VL-BERT's VQA starts
    (vqa/function/train.py, CLASSIFIER_PRETRAINED). An answer without tokens stays as it is.

    Args:
      params: of a student with the head "vqa", host arrays.
      tokens: ids of each answer.

    Raises:
      ValueError: that head's last layer is not as wide as a word's vector: it is not VL-BERT's.
    """
    words = np.asarray(params["embeddings"]["token_embedding"]["embedding"])
    out = params["vqa"]["out"]
    kernel = np.array(out["kernel"])
    if len(kernel) != words.shape[1]:
        raise ValueError(
            f"init.answers_as_words: words have {words.shape[1]} numbers, but the last layer of the answers "
            f"takes {len(kernel)}: it is for VL-BERT"
        )
    for k, ids in enumerate(tokens):
        if len(ids):
            kernel[:, k] = words[list(ids)].mean(0)
    return {**params, "vqa": {**params["vqa"], "out": {**out, "kernel": kernel}}}


def _from_stage(read: Tree, params: Tree, kind: str, source: str) -> Tree:
    tables = KINDS[kind].HEADS.values()
    heads = {path.split("/")[0] for table in tables for rule in table for path in rule.ours}
    kept = {part: value for part, value in read.items() if part in params or part not in heads}
    if kind == "vl_bert":
        kept = vl_bert.start_heads(read, params) | kept
    return partial.fill(kept, params, source, [f"{part}/" for part in heads - read.keys()])


def _check_same(theirs: BertConfig, config: BertConfig, source: str) -> None:
    """Of what no shape tells."""
    wrong = [
        f"{hf_bert.FIELDS[field]} is {getattr(theirs, field)}, the student's {field} {getattr(config, field)}"
        for field in ("heads", "act", "ln_eps")
        if getattr(theirs, field) != getattr(config, field)
    ]
    if wrong:
        raise ValueError(f"{source}: config.json: {'; '.join(wrong)}: the student would not compute as it")


def _with_pooler(read: Tree, init: Mapping[str, Any]) -> Tree:
    if "pooler" in read or not init.get("pooler"):
        return read
    return {**read, "pooler": hf_bert.load(init["pooler"], pooler=True)[1]["pooler"]}


def _rows(params: Tree, table: str) -> int:
    return len(np.asarray(params["embeddings"][f"{table}_embedding"]["embedding"]))


def _check_words(read: Tree, params: Tree, source: str) -> None:
    """Another vocabulary shows by its size alone; VCR's persons may be new."""
    found, own = _rows(read, "token"), _rows(params, "token")
    if own - found not in (0, UNITER_PERSONS):
        raise ValueError(
            f"{source}: a table of {found} words, but data.student_tokenizer gives the student {own}: "
            f"another vocabulary (only the {UNITER_PERSONS} persons of VCR may come on top)"
        )


def _vl_bert(path: Path, params: Tree, heads: tuple[str, ...], names: Mapping[str, Any]) -> Tree:
    state = files.read_weights(path)
    pretrained = any("mvrc_head" in name for name in state)
    start = vl_bert.VQA_START if "vqa" in params else vl_bert.VCR_START
    read = vl_bert.from_state_dict(
        state,
        heads,
        renamed=start if pretrained and not {"mlm", "mrc"} & params.keys() else None,
        source=str(path),
        **names,
    ).params
    return vl_bert.share_segments(read) if pretrained else read
