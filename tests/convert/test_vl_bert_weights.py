"""VL-BERT's checkpoints: names with prefixes, starts from pretrained files, parity in the original layout."""

import dataclasses

import jax
import numpy as np
import pytest

from clipdistill_jax.convert import vl_bert
from clipdistill_jax.convert.partial import fill, paths, start_from_bert
from clipdistill_jax.models.vl_bert import VlBert, VlBertConfig
from tests.convert.originals import blocks, compared_with_torch, dense, norm, random_bert, random_state, same
from tests.models import joint_cases as cases

CONFIG = dataclasses.replace(cases.VL_BERT, layers=2)
PRETRAINING = ("mlm", "mrc", "itm")
WORDS = "vlbert.word_embeddings.weight"
DECODER = "vlbert.mlm_head.predictions.decoder.weight"


def names(c: VlBertConfig, heads=()) -> dict:
    """Names and shapes of the original's state dict, written down from its modules; no prefixes."""
    h = c.width
    made = {
        WORDS: (c.vocab_size, h),
        "vlbert.end_embedding.weight": (1, h),
        "vlbert.position_embeddings.weight": (c.context_length, h),
        "vlbert.token_type_embeddings.weight": (c.types, h),
        **norm("vlbert.embedding_LayerNorm", h),
        **norm("vlbert.visual_ln_text", h),
        **norm("vlbert.visual_ln_object", h),
        **dense("vlbert.pooler.dense", h, h),
        "object_linguistic_embeddings.weight": (1, h),
        **dense("image_feature_extractor.obj_downsample.1", h, 8 * c.waves + c.feature_width),
        **blocks("vlbert.", c),
    }
    if "vcr" in heads:
        made |= dense("final_mlp.1", 1, h)
    if "ve" in heads:
        made |= dense("final_mlp.1", 3, h)
    if "vqa" in heads:
        made |= dense("final_mlp.0.dense", h, h) | norm("final_mlp.0.LayerNorm", h)
        made |= dense("final_mlp.2", c.answers, h)
    if "objects" in heads:
        made |= dense("cnn_loss_reg.0.dense", h, h) | dense("cnn_loss_reg.2", c.object_classes, h)
    if "mlm" in heads:
        head = "vlbert.mlm_head.predictions"
        made |= dense(f"{head}.transform.dense", h, h) | norm(f"{head}.transform.LayerNorm", h)
        made |= {DECODER: (c.vocab_size, h), f"{head}.bias": (c.vocab_size,)}
    if "mrc" in heads:
        made |= dense("vlbert.mvrc_head.transform.dense", h, h)
        made |= dense("vlbert.mvrc_head.region_cls_pred", c.region_classes, h)
        made |= {"object_mask_visual_embedding.weight": (1, c.feature_width)}
        made |= {"object_mask_word_embedding.weight": (1, h)}
    if "itm" in heads:
        made |= dense("vlbert.relationsip_head.caption_image_relationship", 2, h)
    return made


def checkpoint(c: VlBertConfig, heads=(), seed=0) -> dict:
    state = random_state(names(c, heads), seed)
    return state | {DECODER: state[WORDS]} if DECODER in state else state


def prefixed(state, inner):
    return {"module." + name.replace("vlbert.", inner, 1): x for name, x in state.items()}


def read(state, **options):
    return vl_bert.from_state_dict(state, attention_heads=2, waves=3, **options)


@pytest.mark.parametrize(
    "heads, distributed",
    [((), False), (("vcr", "objects"), True), (("ve",), True), (("vqa",), False), (PRETRAINING, False)],
)
def test_round_trip_key_for_key(heads, distributed):
    state = checkpoint(CONFIG, heads)
    theirs = prefixed(state, "vlbert._module." if distributed else "vlbert.")
    found = read(theirs)
    assert found.heads == heads
    assert dataclasses.replace(found.config, answers=11, region_classes=5, object_classes=4) == CONFIG
    model = VlBert(found.config, found.heads)
    assert jax.tree.map(np.shape, found.params) == jax.tree.map(np.shape, cases.random_params(model))
    same(vl_bert.to_state_dict(found.params, time_distributed=distributed), theirs)
    same(vl_bert.to_state_dict(found.params, prefix=""), state)
    jax.tree.map(np.testing.assert_array_equal, read(state).params, found.params)


def test_a_file(tmp_path):
    torch = pytest.importorskip("torch", reason="files of torch")
    state = prefixed(checkpoint(CONFIG, ("vcr", "objects")), "vlbert._module.")
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    path = tmp_path / "vl-bert_base_a_res101-best.model"
    tensors = {name: torch.tensor(x) for name, x in state.items()}
    torch.save({"state_dict": tensors, "optimizer": optimizer.state_dict()}, path)
    found = vl_bert.load(path, attention_heads=2, waves=3)
    same(vl_bert.to_state_dict(found.params, time_distributed=True), state)
    torch.save({"state_dict": module}, path)  # only to be unpickled by running code
    with pytest.raises(ValueError, match="best.model: torch cannot read it as weights"):
        vl_bert.load(path)


def end_to_end():
    """A pretrained file as published: no pooler, the detector, a vector of auxiliary texts."""
    state = checkpoint(CONFIG, ("mlm", "mrc"))
    state = {name: x for name, x in state.items() if "pooler" not in name}
    del state["object_mask_visual_embedding.weight"]  # raw pixels are hidden there
    state["aux_text_visual_embedding.weight"] = np.zeros((1, 16), np.float32)
    for part in ("backbone.conv1", "roi_head_feature_extractor.0.conv1", "head.0.0.conv1"):
        state[f"image_feature_extractor.{part}.weight"] = np.zeros((4, 3, 7, 7), np.float32)
    return prefixed(state, "vlbert.")


def test_vcr_starts_from_a_pretrained_file():
    state = end_to_end()
    options = dict(
        heads=("vcr", "objects"),
        unused=(*vl_bert.RESNET, *vl_bert.PRETRAINING),
        missing=("final_mlp.", "cnn_loss_reg.2.", "vlbert.pooler."),
        renamed=vl_bert.VCR_START,
    )
    found = read(state, **options)
    start = found.params["objects"]["transform"]["dense"]["kernel"]
    np.testing.assert_array_equal(start, state["module.vlbert.mvrc_head.transform.dense.weight"].T)
    assert set(found.params["objects"]) == {"transform"} and not {"vcr", "pooler"} & set(found.params)
    like = cases.random_params(VlBert(dataclasses.replace(CONFIG, region_classes=1601), ("vcr", "objects")))
    fresh = paths(vl_bert.rules(2, ("vcr", "objects")), options["missing"])
    made = fill(vl_bert.share_segments(found.params), like, "ckpt", fresh)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, like)
    types = state["module.vlbert.token_type_embeddings.weight"]
    np.testing.assert_array_equal(made["embeddings"]["type_embedding"]["embedding"], types[[0, 0, 2]])
    for name in ("unused", "missing", "renamed"):  # each is needed
        with pytest.raises(ValueError, match="missing: |unknown: "):
            read(state, **{key: value for key, value in options.items() if key != name})


def test_vqa_starts_from_a_pretrained_file():
    """The answer's transform is the masked-language head's."""
    state = checkpoint(CONFIG, PRETRAINING)
    found = read(
        prefixed(state, "vlbert."),
        heads=("vqa",),
        unused=vl_bert.PRETRAINING,
        missing=("final_mlp.2.",),
        renamed=vl_bert.VQA_START,
    )
    head = "vlbert.mlm_head.predictions.transform"
    transform = found.params["vqa"]["transform"]
    np.testing.assert_array_equal(transform["dense"]["kernel"], state[f"{head}.dense.weight"].T)
    np.testing.assert_array_equal(transform["ln"]["scale"], state[f"{head}.LayerNorm.weight"])
    assert "out" not in found.params["vqa"]


def test_what_does_not_fit_is_named_and_refused():
    state = checkpoint(CONFIG, PRETRAINING)
    with pytest.raises(ValueError, match=f"{DECODER} should be {WORDS}"):
        read(state | {DECODER: state[WORDS] + 1})
    with pytest.raises(ValueError, match=r"missing: final_mlp\.1\.bias.*; unknown: object_mask_visual"):
        read(state, heads=("vcr",))
    with pytest.raises(ValueError, match="ckpt: .*unknown: surprise"):
        read(state | {"module.surprise": np.zeros(2)}, source="ckpt")
    without = {name: x for name, x in state.items() if name != "vlbert.visual_ln_text.bias"}
    with pytest.raises(ValueError, match=r"missing: vlbert\.visual_ln_text\.bias$"):
        read(without)
    with pytest.raises(ValueError, match=r"end_embedding\.weight \(2, 16\) gives \(2, 16\), not \(1, 16\)"):
        read(state | {"vlbert.end_embedding.weight": np.zeros((2, 16))})
    with pytest.raises(ValueError, match="heads has 'refcoco'"):
        read(state, heads=("refcoco",))
    with pytest.raises(ValueError, match="'vcr' and 've' are both final_mlp.1"):
        vl_bert.to_state_dict({**read(state).params, "ve": {}, "vcr": {}})


def test_warm_start_from_bert():
    """BERT's two types are the first of VL-BERT's three."""
    bert = random_bert()
    like = cases.random_params(VlBert(CONFIG, ("vcr",)))
    made = start_from_bert(bert, like, "bert")
    table, own = (tree["embeddings"]["type_embedding"]["embedding"] for tree in (made, like))
    np.testing.assert_array_equal(table[:2], bert["embeddings"]["type_embedding"]["embedding"])
    np.testing.assert_array_equal(table[2], own[2])
    for part in ("encoder", "pooler"):
        jax.tree.map(np.testing.assert_array_equal, made[part], bert[part])
    for part in ("ln_text", "object_vectors", "end_embedding", "vcr"):
        jax.tree.map(np.testing.assert_array_equal, made[part], like[part])


def test_states_equal_torch_in_the_originals_compact_layout():
    """Text, objects and [END] without gaps, one text at a time, through an encoder of torch's own."""
    pytest.importorskip("torch", reason="parity with torch's encoder")
    state = checkpoint(CONFIG, ("vcr",))
    found = read(state)
    model, head = VlBert(found.config, found.heads), cases.float64(found.params["vcr"])
    batch = cases.make_batch(CONFIG.vocab_size, 2)
    for output, pooled in compared_with_torch(state, "vlbert.", model, found.params, batch, end=1):
        cases.close(output, cases.dense(head["out"], pooled))
