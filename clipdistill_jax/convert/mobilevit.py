"""MobileViTv2 weights of timm (read and written) and Hugging Face (read).

Sources of the names: huggingface/pytorch-image-models timm/models/mobilevit.py and byobnet.py;
huggingface/transformers models/mobilevitv2/modeling_mobilevitv2.py.

Channel order: our tower, like timm's, takes RGB. Apple's checkpoints on the Hugging Face hub take BGR
(their preprocessor_config.json has do_flip_channel_order), so the input channels of their stem are
reversed on the way in. Both want pixels between 0 and 1: mean 0, std 1.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from clipdistill_jax.convert.rules import CONV, DENSE, Rule, dense, norm, same, to_ours, to_theirs, under
from clipdistill_jax.models.mobilevit import CONVOLUTION_BLOCKS, MobileViTv2, variable_shapes

Variables = dict[str, Any]
ATTENDING = range(len(CONVOLUTION_BLOCKS), 5)


class Names(NamedTuple):
    """How a library spells the parts; {s}, {b}, {t} stand for stage, block and attention layer."""

    convolution: str  # within a convolution with norm
    normalization: str
    stem: str
    residual: str  # inverted residual of stages 0 and 1
    downsampling: str  # inverted residual of stages 2 to 4
    branches: tuple[str, str, str]  # of an inverted residual: expand, depthwise, reduce
    attending: str  # MobileViTv2 block
    lift: str
    layer: str
    layer_parts: tuple[str, str, str, str, str, str]  # norm1, qkv, out, norm2, mlp_in, mlp_out
    norm: str
    project: str
    head: str


TIMM = Names(
    convolution="conv",
    normalization="bn",
    stem="stem",
    residual="stages.{s}.{b}",
    downsampling="stages.{s}.0",
    branches=("conv1_1x1", "conv2_kxk", "conv3_1x1"),
    attending="stages.{s}.1",
    lift="conv_1x1",
    layer="transformer.{t}",
    layer_parts=("norm1", "attn.qkv_proj", "attn.out_proj", "norm2", "mlp.fc1", "mlp.fc2"),
    norm="norm",
    project="conv_proj",
    head="head.fc",
)
HUGGING_FACE = Names(
    convolution="convolution",
    normalization="normalization",
    stem="conv_stem",
    residual="encoder.layer.{s}.layer.{b}",
    downsampling="encoder.layer.{s}.downsampling_layer",
    branches=("expand_1x1", "conv_3x3", "reduce_1x1"),
    attending="encoder.layer.{s}",
    lift="conv_1x1.convolution",
    layer="transformer.layer.{t}",
    layer_parts=(
        "layernorm_before",
        "attention.qkv_proj.convolution",
        "attention.out_proj.convolution",
        "layernorm_after",
        "ffn.conv1.convolution",
        "ffn.conv2.convolution",
    ),
    norm="layernorm",
    project="conv_projection",
    head="classifier",
)


def _conv_norm(names: Names, theirs: str, ours: str, axes: tuple[int, ...]) -> list[Rule]:
    normalization, norm_ours = f"{theirs}.{names.normalization}", f"{ours}/norm"
    return [
        Rule(f"{theirs}.{names.convolution}.weight", (f"params/{ours}/kernel",), axes),
        *norm(normalization, f"params/{norm_ours}"),
        *same(f"{normalization}.running_mean", f"batch_stats/{norm_ours}/mean"),
        *same(f"{normalization}.running_var", f"batch_stats/{norm_ours}/var"),
    ]


def _residual(names: Names, theirs: str, ours: str) -> list[Rule]:
    expand, depthwise, reduce = (f"{theirs}.{branch}" for branch in names.branches)
    return [
        *_conv_norm(names, expand, f"{ours}/expand", DENSE),
        *_conv_norm(names, depthwise, f"{ours}/depthwise_conv", CONV),
        *_conv_norm(names, reduce, f"{ours}/reduce", DENSE),
    ]


def _attending(names: Names, theirs: str, ours: str, depth: int) -> list[Rule]:
    norm1, qkv, out, norm2, mlp_in, mlp_out = names.layer_parts
    layer = [
        *norm(norm1, "norm1"),
        *dense(qkv, "attention/qkv"),
        *dense(out, "attention/out"),
        *norm(norm2, "norm2"),
        *dense(mlp_in, "mlp_in"),
        *dense(mlp_out, "mlp_out"),
    ]
    rules = [
        *_conv_norm(names, f"{theirs}.conv_kxk", f"{ours}/local", CONV),
        Rule(f"{theirs}.{names.lift}.weight", (f"params/{ours}/lift/kernel",), DENSE),
        *norm(f"{theirs}.{names.norm}", f"params/{ours}/norm"),
        *_conv_norm(names, f"{theirs}.{names.project}", f"{ours}/project", DENSE),
    ]
    for t in range(depth):
        rules += under(f"{theirs}.{names.layer.format(t=t)}.", f"params/{ours}/layer{t}/", layer)
    return rules


def rules(names: Names, depths: Iterable[int], head: str | None) -> list[Rule]:
    """The table of names: theirs, and ours below {"params", "batch_stats"}.

    1x1 convolutions count as matrices [out, in] here (`_flat` and `_unflat` see to it).

    Args:
      names: TIMM or HUGGING_FACE.
      depths: attention layers in stages 2 to 4.
      head: our name of their linear head, "classifier" or "embedding"; None: there is none.
    """
    made = _conv_norm(names, names.stem, "stem", CONV)
    for s, count in enumerate(CONVOLUTION_BLOCKS):
        for b in range(count):
            made += _residual(names, names.residual.format(s=s, b=b), f"stage{s}_block{b}")
    for s, depth in zip(ATTENDING, depths, strict=True):
        made += _residual(names, names.downsampling.format(s=s), f"stage{s}_block0")
        made += _attending(names, names.attending.format(s=s), f"stage{s}_block1", depth)
    if head is not None:
        made += dense(names.head, f"params/{head}")
    return made


def _counters(table: Iterable[Rule]) -> dict[str, str]:
    """Names of torch's counts of training batches (which a fixed momentum does not use), one a batch norm."""
    means = [rule.theirs for rule in table if rule.theirs.endswith(".running_mean")]
    return {re.sub("running_mean$", "num_batches_tracked", name): name for name in means}


def _flat(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(x) for name, x in state.items()}
    return {name: x[:, :, 0, 0] if x.shape[2:] == (1, 1) else x for name, x in arrays.items()}


def _unflat(state: Mapping[str, np.ndarray], head: str) -> dict[str, np.ndarray]:
    def is_1x1(name: str, x: np.ndarray) -> bool:
        return x.ndim == 2 and name != f"{head}.weight"

    return {name: x[:, :, None, None] if is_1x1(name, x) else x for name, x in state.items()}


def _fields(state: Mapping[str, np.ndarray], names: Names, source: str) -> dict[str, Any]:
    """Fields of the `MobileViTv2` that these tensors are of, read off their shapes."""

    def rows(name: str) -> int:
        if name not in state or state[name].ndim == 0:
            raise ValueError(f"{source}: its tensors do not fit the model; missing: {name}")
        return len(state[name])

    def count(s: int) -> int:
        prefix = re.escape(names.attending.format(s=s) + "." + names.layer).replace(r"\{t\}", r"(\d+)")
        found = [int(m[1]) for m in (re.match(prefix + r"\.", name) for name in state) if m]
        return max(found, default=0) + 1

    reduce = f"{names.branches[2]}.{names.convolution}.weight"
    ends = [names.residual.format(s=s, b=n - 1) for s, n in enumerate(CONVOLUTION_BLOCKS)]
    ends += [names.downsampling.format(s=s) for s in ATTENDING]
    return {
        "stem_channels": rows(f"{names.stem}.{names.convolution}.weight"),
        "channels": tuple(rows(f"{end}.{reduce}") for end in ends),
        "attention_channels": tuple(
            rows(f"{names.attending.format(s=s)}.{names.lift}.weight") for s in ATTENDING
        ),
        "depths": tuple(count(s) for s in ATTENDING),
    }


def _read(state: Mapping[str, Any], names: Names, head: str | None, source: str) -> Variables:
    if head not in (None, "classifier", "embedding"):
        raise ValueError(f"head must be 'classifier', 'embedding' or None, not {head!r}")
    flat = _flat(state)
    fields = _fields(flat, names, source)
    weight, bias = f"{names.head}.weight", f"{names.head}.bias"
    if head is None:
        flat = {name: x for name, x in flat.items() if name not in (weight, bias)}
    elif weight not in flat:
        raise ValueError(f"{source}: its tensors do not fit the model; missing: {weight}")
    width = None if head is None else len(flat[weight])
    model = MobileViTv2(
        **fields,
        embed_dim=width if head == "embedding" else None,
        num_classes=width if head == "classifier" else None,
    )
    table = rules(names, fields["depths"], head)
    counters = _counters(table)
    return to_ours(
        {name: x for name, x in flat.items() if name not in counters}, table, variable_shapes(model), source
    )


def from_timm(state: Mapping[str, Any], source: str = "state dict", head: str | None = None) -> Variables:
    """Our {"params", "batch_stats"} (float32 NumPy) from timm's tensors (mobilevitv2_050 to _200; RGB).

    Args:
      state: tensors by name, with or without the linear head and torch's batch counters.
      source: where they come from, for messages.
      head: what becomes of timm's `head.fc`: "classifier", "embedding", or None: it is left out, and a
        tower with `embed_dim` still needs its own `embedding`.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; each is named.
    """
    return _read(state, TIMM, head, source)


def to_timm(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """timm's tensors from our {"params", "batch_stats"}: the inverse of `from_timm`.

    The tower's linear head, classifier or embedding, becomes `head.fc`: timm loads a student with
    `num_classes=embed_dim`. torch's batch counters are written as 0.

    Raises:
      ValueError: the tree is not a MobileViTv2's, or has both heads, of which timm has room for one.
    """
    params = variables["params"]
    heads = [head for head in ("classifier", "embedding") if head in params]
    if len(heads) > 1:
        raise ValueError("params has both classifier and embedding; timm has one head: leave one out")
    depths = [sum(name.startswith("layer") for name in params.get(f"stage{s}_block1", {})) for s in ATTENDING]
    table = rules(TIMM, depths, heads[0] if heads else None)
    kept = {collection: variables[collection] for collection in ("params", "batch_stats")}
    state = _unflat(to_theirs(kept, table), TIMM.head)
    return state | {name: np.zeros((), np.int64) for name in _counters(table)}


def from_huggingface(
    state: Mapping[str, Any], source: str = "state dict", head: str | None = None, bgr: bool = True
) -> Variables:
    """Our {"params", "batch_stats"} from the tensors of MobileViTV2Model or ...ForImageClassification.

    Args:
      state, source, head: as for `from_timm`; the head is theirs of the name `classifier`.
      bgr: the checkpoint takes BGR, as Apple's do: the stem's input channels are reversed, so that our tower
        takes RGB. False for one trained on RGB (do_flip_channel_order false in preprocessor_config.json).

    Raises:
      ValueError: as for `from_timm`.
    """
    state = {name.removeprefix("mobilevitv2."): np.asarray(x) for name, x in state.items()}
    stem = f"{HUGGING_FACE.stem}.{HUGGING_FACE.convolution}.weight"
    if bgr and stem in state:
        state[stem] = state[stem][:, ::-1]
    return _read(state, HUGGING_FACE, head, source)
