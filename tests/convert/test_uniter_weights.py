"""UNITER's and VILLA's checkpoints: names, tied and enlarged tables, and parity in the original's layout."""

import dataclasses

import jax
import numpy as np
import pytest

from clipdistill_jax.convert import uniter
from clipdistill_jax.convert.partial import fill, start_from_bert
from clipdistill_jax.models.uniter import Uniter, UniterConfig
from tests.convert.originals import blocks, compared_with_torch, dense, norm, random_bert, random_state, same
from tests.models import joint_cases as cases

CONFIG = dataclasses.replace(cases.UNITER, types=2, layers=2)
PRETRAINING = ("mlm", "mrfr", "mrc", "itm")
WORDS, FEATURES = "uniter.embeddings.word_embeddings.weight", "uniter.img_embeddings.img_linear.weight"


def names(c: UniterConfig, heads=()) -> dict:
    """Names and shapes of the original's state dict, written down from its modules."""
    h, f = c.width, c.feature_width
    made = {
        WORDS: (c.vocab_size, h),
        "uniter.embeddings.position_embeddings.weight": (c.context_length, h),
        "uniter.embeddings.token_type_embeddings.weight": (c.types, h),
        **norm("uniter.embeddings.LayerNorm", h),
        **dense("uniter.img_embeddings.img_linear", h, f),
        **norm("uniter.img_embeddings.img_layer_norm", h),
        **norm("uniter.img_embeddings.pos_layer_norm", h),
        **dense("uniter.img_embeddings.pos_linear", h, 7),
        "uniter.img_embeddings.mask_embedding.weight": (2, f),
        **norm("uniter.img_embeddings.LayerNorm", h),
        **dense("uniter.pooler.dense", h, h),
        **blocks("uniter.", c),
    }
    outputs = {"vcr": ("vcr_output", 2), "ve": ("vqa_output", 3), "vqa": ("vqa_output", c.answers)}
    for head in heads:
        if head in outputs:
            name, count = outputs[head]
            made |= dense(f"{name}.0", 2 * h, h) | norm(f"{name}.2", 2 * h) | dense(f"{name}.3", count, 2 * h)
    if "mlm" in heads:
        made |= dense("cls.predictions.transform.dense", h, h) | norm(
            "cls.predictions.transform.LayerNorm", h
        )
        made |= {"cls.predictions.decoder.weight": (c.vocab_size, h), "cls.predictions.bias": (c.vocab_size,)}
    if "mrfr" in heads:
        made |= dense("feat_regress.net.0", h, h) | norm("feat_regress.net.2", h)
        made |= {"feat_regress.weight": (h, f), "feat_regress.bias": (f,)}
    if "mrc" in heads:
        made |= dense("region_classifier.net.0", h, h) | norm("region_classifier.net.2", h)
        made |= dense("region_classifier.net.3", c.region_classes, h)
    if "itm" in heads:
        made |= dense("itm_output", 2, h)
    return made


def checkpoint(c: UniterConfig, heads=(), seed=0) -> dict:
    """Random tensors under those names; tied ones twice."""
    state = random_state(names(c, heads), seed)
    for copy, name in (("cls.predictions.decoder.weight", WORDS), ("feat_regress.weight", FEATURES)):
        if copy in state:
            state[copy] = state[name]
    return state


def read(state, **options):
    return uniter.from_state_dict(state, attention_heads=2, **options)


def test_a_backbone_has_210_tensors():
    assert len(names(UniterConfig())) == 210


@pytest.mark.parametrize("heads", [(), ("vcr",), ("ve",), ("vqa",), PRETRAINING, ("vcr", *PRETRAINING)])
def test_round_trip_key_for_key(heads):
    state = checkpoint(CONFIG, heads)
    found = read(state)
    assert found.heads == heads
    assert dataclasses.replace(found.config, answers=11, region_classes=5) == CONFIG
    model = Uniter(found.config, found.heads)
    assert jax.tree.map(np.shape, found.params) == jax.tree.map(np.shape, cases.random_params(model))
    same(uniter.to_state_dict(found.params), state)
    kernel = found.params["region_embeddings"]["features"]["kernel"]
    np.testing.assert_array_equal(kernel, state[FEATURES].T)


def test_sizes_of_enlarged_tables_and_half_precision():
    """As a VCR checkpoint of the second pretraining stage has them."""
    large = dataclasses.replace(CONFIG, vocab_size=33, types=4)
    state = {name: x.astype(np.float16) for name, x in checkpoint(large, PRETRAINING).items()}
    found = read(state)
    assert (found.config.vocab_size, found.config.types) == (33, 4)
    assert found.params["mlm"]["bias"].shape == (33,)
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}


def test_old_spellings():
    state = checkpoint(CONFIG)
    old = {name.replace("uniter.", "bert."): x for name, x in state.items()}
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in old.items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in old
    same(uniter.to_state_dict(read(old).params), state)
    with pytest.raises(ValueError, match="is there twice, under two spellings of uniter.pooler.dense.bias"):
        read(state | {"bert.pooler.dense.bias": state["uniter.pooler.dense.bias"]})


@pytest.mark.parametrize("nested", [False, True])
def test_files(tmp_path, nested):
    torch = pytest.importorskip("torch", reason="files of torch")
    state = checkpoint(CONFIG, ("vcr",))
    tensors = {name: torch.tensor(x) for name, x in state.items()}
    path = tmp_path / "model_step_8000.pt"
    torch.save({"model_state": tensors, "step": 8000} if nested else tensors, path)
    found = uniter.load(path, attention_heads=2)
    assert found.heads == ("vcr",)
    same(uniter.to_state_dict(found.params), state)
    torch.save({"module": torch.nn.Linear(2, 2)}, path)  # only to be unpickled by running code
    with pytest.raises(ValueError, match="model_step_8000.pt: torch cannot read it as weights"):
        uniter.load(path)


def test_ties_that_differ_are_refused_unless_named():
    state = checkpoint(CONFIG, PRETRAINING)
    for copy, name in (("cls.predictions.decoder.weight", WORDS), ("feat_regress.weight", FEATURES)):
        broken = state | {copy: state[copy] + 1}
        with pytest.raises(ValueError, match=f"{copy} should be {name}, to which it is tied"):
            read(broken)
        same(uniter.to_state_dict(read(broken, unused=(copy,)).params), state)
        without = {key: x for key, x in state.items() if key != copy}
        same(uniter.to_state_dict(read(without).params), state)


def test_what_does_not_fit_is_named_and_refused():
    state = checkpoint(CONFIG, PRETRAINING)
    with pytest.raises(ValueError, match=r"missing: vcr_output\.0\.bias.*; unknown: cls\.predictions\.bias"):
        read(state, heads=("vcr",))
    with pytest.raises(ValueError, match="ckpt: .*unknown: surprise"):
        read(state | {"surprise": np.zeros(2)}, source="ckpt")
    others = [f"surprise.{k:02}" for k in range(30)]
    with pytest.raises(ValueError, match=f"unknown: {', '.join(others)}$"):  # every one
        read(state | dict.fromkeys(others, np.zeros(2)))
    without = {name: x for name, x in state.items() if name != "uniter.pooler.dense.bias"}
    with pytest.raises(ValueError, match=r"missing: uniter\.pooler\.dense\.bias$"):
        read(without)
    with pytest.raises(ValueError, match=r"missing: uniter\.embeddings\.word_embeddings\.weight"):
        read({"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"pos_linear\.weight \(16, 6\) gives \(6, 16\), not \(7, 16\)"):
        read(state | {"uniter.img_embeddings.pos_linear.weight": np.zeros((16, 6))})
    with pytest.raises(ValueError, match=r"itm_output\.bias$"):  # half a head
        read({name: x for name, x in state.items() if name != "itm_output.weight"})
    with pytest.raises(ValueError, match="heads has 'nlvr2'"):
        read(state, heads=("nlvr2",))
    params = read(state).params
    with pytest.raises(ValueError, match="'ve' and 'vqa' are both vqa_output"):
        uniter.to_state_dict({**params, "ve": {}, "vqa": {}})


def test_finetuning_starts_from_a_pretrained_file():
    """The head is missing and pretraining's are not wanted, both by name; VCR's tables are enlarged."""
    state = checkpoint(CONFIG, PRETRAINING)
    found = read(state, heads=("vcr",), unused=uniter.PRETRAINING, missing=("vcr_output.",))
    assert found.heads == ("vcr",) and "vcr" not in found.params
    config = dataclasses.replace(found.config, vocab_size=33, types=4)
    like = cases.random_params(Uniter(config, ("vcr",)))
    with pytest.raises(ValueError, match=r"token_embedding/embedding: \(30, 16\), the model has \(33, 16\)"):
        fill(found.params, like, "ckpt", ("vcr/",))
    larger = uniter.enlarge(found.params, 33, 4, seed=0)
    with pytest.raises(ValueError, match=r"the model; vcr/dense/bias: missing; .*vcr/out/kernel: missing$"):
        fill(larger, like, "ckpt")
    made = fill(larger, like, "ckpt", ("vcr/",))
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, like)
    np.testing.assert_array_equal(made["vcr"]["out"]["kernel"], like["vcr"]["out"]["kernel"])
    words = made["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(words[:30], state[WORDS])
    assert 0.01 < words[30:].std() < 0.03  # 48 draws with deviation 0.02
    types = state["uniter.embeddings.token_type_embeddings.weight"]
    np.testing.assert_array_equal(made["embeddings"]["type_embedding"]["embedding"], types[[0, 1, 0, 0]])
    with pytest.raises(ValueError, match="the model has none"):
        fill({"vqa": {"bias": np.zeros(2)}}, like, "ckpt")


def test_enlarging_keeps_the_masked_language_head():
    params = read(checkpoint(CONFIG, PRETRAINING)).params
    made = uniter.enlarge(params, 33, 4, seed=0)
    assert made["mlm"]["transform"] is params["mlm"]["transform"]
    np.testing.assert_array_equal(made["mlm"]["bias"], np.append(params["mlm"]["bias"], np.zeros(3)))
    again = uniter.enlarge(made, 33, 4, seed=1)
    jax.tree.map(np.testing.assert_array_equal, again, made)
    with pytest.raises(ValueError, match="33 words and 4 types cannot be enlarged to 33 and 2"):
        uniter.enlarge(made, 33, 2, seed=0)


def test_warm_start_from_bert():
    bert = random_bert()
    like = cases.random_params(Uniter(dataclasses.replace(CONFIG, vocab_size=33, types=4), ("vcr",)))
    made = start_from_bert(bert, like, "bert")
    jax.tree.map(np.testing.assert_array_equal, made["encoder"], bert["encoder"])
    jax.tree.map(np.testing.assert_array_equal, made["pooler"], bert["pooler"])
    for name, rows in (("token_embedding", 30), ("type_embedding", 2)):
        table, own = (tree["embeddings"][name]["embedding"] for tree in (made, like))
        np.testing.assert_array_equal(table[:rows], bert["embeddings"][name]["embedding"])
        np.testing.assert_array_equal(table[rows:], own[rows:])
    jax.tree.map(np.testing.assert_array_equal, made["region_embeddings"], like["region_embeddings"])
    small = cases.random_params(Uniter(dataclasses.replace(CONFIG, vocab_size=29)))
    with pytest.raises(ValueError, match=r"token_embedding/embedding: \(30, 16\), the model has \(29, 16\)"):
        start_from_bert(bert, small, "bert")


def test_states_equal_torch_in_the_originals_compact_layout():
    """Text and regions without a gap, one text at a time, through an encoder of torch's own."""
    pytest.importorskip("torch", reason="parity with torch's encoder")
    state = checkpoint(CONFIG, ("vcr",))
    found = read(state)
    model, head = Uniter(found.config, found.heads), cases.float64(found.params["vcr"])
    batch = cases.make_batch(CONFIG.vocab_size, CONFIG.types)
    for output, pooled in compared_with_torch(state, "uniter.", model, found.params, batch):
        hidden = np.maximum(cases.dense(head["dense"], pooled), 0)
        cases.close(output, cases.dense(head["out"], cases.norm(head["ln"], hidden)))
