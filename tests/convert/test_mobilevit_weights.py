"""MobileViTv2's weights in and out: parity with transformers' torch model, and timm's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.convert.mobilevit import from_huggingface, from_timm, to_timm
from clipdistill_jax.models.mobilevit import MobileViTv2, variable_shapes

NORM = {"weight": "c", "bias": "c", "running_mean": "c", "running_var": "c", "num_batches_tracked": ""}


def random_variables(model: MobileViTv2, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), variable_shapes(model))


def timm_names() -> set[str]:
    """The tensors of timm's mobilevitv2 (any width), written out from its module tree."""

    def conv_norm(prefix: str) -> set[str]:
        return {f"{prefix}.conv.weight"} | {f"{prefix}.bn.{name}" for name in NORM}

    names = conv_norm("stem")
    for s, blocks in enumerate((1, 2, 1, 1, 1)):
        for b in range(blocks):
            for part in ("conv1_1x1", "conv2_kxk", "conv3_1x1"):
                names |= conv_norm(f"stages.{s}.{b}.{part}")
    for s, depth in ((2, 2), (3, 4), (4, 3)):
        block = f"stages.{s}.1"
        names |= conv_norm(f"{block}.conv_kxk") | conv_norm(f"{block}.conv_proj")
        names |= {f"{block}.conv_1x1.weight", f"{block}.norm.weight", f"{block}.norm.bias"}
        for t in range(depth):
            for part in ("norm1", "attn.qkv_proj", "attn.out_proj", "norm2", "mlp.fc1", "mlp.fc2"):
                names |= {f"{block}.transformer.{t}.{part}.{kind}" for kind in ("weight", "bias")}
    return names | {"head.fc.weight", "head.fc.bias"}


def test_timm_names_and_shapes():
    state = to_timm(random_variables(MobileViTv2(1.0, embed_dim=None, num_classes=1000)))
    assert set(state) == timm_names()
    assert len(state) == 269
    assert sum(x.size for name, x in state.items() if name.split(".")[-1] not in list(NORM)[2:]) == 4_901_841
    assert state["stem.conv.weight"].shape == (32, 3, 3, 3)
    assert state["stages.2.0.conv2_kxk.conv.weight"].shape == (256, 1, 3, 3)
    assert state["stages.2.1.transformer.0.attn.qkv_proj.weight"].shape == (257, 128, 1, 1)
    assert state["stages.2.1.conv_1x1.weight"].shape == (128, 256, 1, 1)
    assert state["head.fc.weight"].shape == (1000, 512)


@pytest.fixture(scope="module")
def small():
    """Variables at width 0.5 with a classifier."""
    return random_variables(MobileViTv2(0.5, embed_dim=None, num_classes=20))


@pytest.mark.parametrize("head", ["classifier", "embedding"])
def test_timm_round_trip(small, head):
    params = dict(small["params"])
    params[head] = params.pop("classifier")
    variables = {**small, "params": params}
    state = to_timm(variables)
    jax.tree.map(np.testing.assert_array_equal, from_timm(state, head=head), variables)
    without = from_timm(state)
    assert set(variables["params"]) - set(without["params"]) == {head}


def test_wrong_tensors_are_named(small):
    params = dict(small["params"])
    params["embedding"] = params.pop("classifier")
    state = to_timm({**small, "params": params})
    lacking = {name: x for name, x in state.items() if name != "stages.3.1.norm.bias"}
    with pytest.raises(ValueError, match=r"weights\.bin.*missing: stages\.3\.1\.norm\.bias"):
        from_timm(lacking, "weights.bin")
    with pytest.raises(ValueError, match=r"missing: stem\.conv\.weight"):
        from_timm({"a": np.zeros(3)})
    with pytest.raises(ValueError, match=r"unknown: extra\.num_batches_tracked, extra\.weight"):
        from_timm(state | {"extra.weight": np.zeros(2), "extra.num_batches_tracked": np.zeros(())})
    bent = state | {"stages.4.1.transformer.2.mlp.fc1.weight": np.zeros((3, 2, 1, 1))}
    with pytest.raises(ValueError, match=r"stages\.4\.1\.transformer\.2\.mlp\.fc1\.weight \(3, 2\)"):
        from_timm(bent)
    with pytest.raises(ValueError, match=r"missing: head\.fc\.weight"):
        from_timm({name: x for name, x in state.items() if "head" not in name}, head="embedding")
    with pytest.raises(ValueError, match="head must be"):
        from_timm(state, head="fc")
    both = {**params, "classifier": params["embedding"]}
    with pytest.raises(ValueError, match="both classifier and embedding"):
        to_timm({**small, "params": both})


@pytest.fixture(scope="module")
def hugging_face():
    torch = pytest.importorskip("torch", reason="parity with transformers' torch model")
    transformers = pytest.importorskip("transformers", reason="parity with transformers' torch model")
    config = transformers.MobileViTV2Config(width_multiplier=0.5, num_labels=10, initializer_range=0.2)
    torch.manual_seed(0)
    model = transformers.MobileViTV2ForImageClassification(config).eval()
    with torch.no_grad():  # as trained: every gain, bias and statistic its own
        for name, x in model.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 2.0)
            elif x.ndim == 1:
                x.normal_(1.0 if name.endswith("norm.weight") or "normalization.weight" in name else 0.0, 0.3)
    return torch, model


def enlarge_first(torch, model):
    """Make transformers' blocks enlarge an odd map, as timm and cvnets do (it cuts the odd row off)."""

    def enlarge(module, inputs):
        (x,) = inputs
        size = [n + n % 2 for n in x.shape[2:]]
        return (torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True),)

    return [
        layer.conv_kxk.register_forward_pre_hook(enlarge) for layer in model.mobilevitv2.encoder.layer[2:]
    ]


# The maps of stages 2 to 4: 8, 4, 2; 13 -> 14, 7 -> 8, 4.
@pytest.mark.parametrize("size, depthwise", [(64, "shift"), (100, "conv")])
def test_hugging_face_parity(hugging_face, size, depthwise):
    torch, model = hugging_face
    rgb = np.random.default_rng(0).random((2, size, size, 3), np.float32)
    bgr = torch.tensor(rgb[..., ::-1].transpose(0, 3, 1, 2).copy())
    hooks = enlarge_first(torch, model)
    with torch.no_grad():
        theirs = model(bgr, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    variables = from_huggingface(state, head="classifier")
    ours = MobileViTv2(0.5, embed_dim=None, num_classes=10, depthwise=depthwise)

    out = jax.jit(ours.apply)(variables, jnp.asarray(rgb))
    last = variables["params"]["classifier"]
    logits = np.asarray(out.embedding) @ last["kernel"] + last["bias"]
    expected = [x.numpy().transpose(0, 2, 3, 1) for x in theirs.hidden_states] + [theirs.logits.numpy()]
    for a, b in zip((*out.layers, logits), expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(np.asarray(a) - b).max() <= 1e-5 * np.abs(b).max()


def test_hugging_face_bare_model(hugging_face):
    _, model = hugging_face
    bare = {name: x.numpy() for name, x in model.mobilevitv2.state_dict().items()}
    whole = from_huggingface({name: x.numpy() for name, x in model.state_dict().items()}, bgr=False)
    jax.tree.map(np.testing.assert_array_equal, from_huggingface(bare, bgr=False), whole)


def test_batch_statistics_in_training_equal_torch(hugging_face):
    torch, model = hugging_face
    state = {name: x.numpy().copy() for name, x in model.state_dict().items()}
    rgb = np.random.default_rng(2).random((4, 64, 64, 3), np.float32)
    model.train()
    with torch.no_grad():
        theirs = model(torch.tensor(rgb.transpose(0, 3, 1, 2).copy())).logits.numpy()
    model.eval()
    moved = from_huggingface({name: x.numpy().copy() for name, x in model.state_dict().items()}, bgr=False)
    model.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    ours = MobileViTv2(0.5, embed_dim=None, num_classes=10)
    variables = from_huggingface(state, head="classifier", bgr=False)
    logits, mutated = jax.jit(
        lambda v, x: ours.apply(v, x, True, method="classify", mutable=["batch_stats"])
    )(variables, jnp.asarray(rgb))
    # The deepest norms see 16 values a channel, and divide by their deviation: errors grow layer by layer.
    assert np.abs(np.asarray(logits) - theirs).max() <= 1e-4 * np.abs(theirs).max()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()),
        mutated["batch_stats"],
        moved["batch_stats"],
    )


def test_hugging_face_wrong_tensors_are_named():
    with pytest.raises(ValueError, match=r"missing: conv_stem\.convolution\.weight"):
        from_huggingface({"stem.conv.weight": np.zeros((16, 3, 3, 3))})
