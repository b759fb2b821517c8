"""Where students of questions start: a start covers the student, and is of its kind."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from clipdistill_jax import question_weights
from clipdistill_jax.convert import hf_bert, uniter, vl_bert
from clipdistill_jax.models.bert import BertConfig
from clipdistill_jax.models.uniter import Uniter, UniterConfig
from clipdistill_jax.models.vl_bert import VlBert, VlBertConfig
from clipdistill_jax.question_weights import answers_as_words, read_question_start
from clipdistill_jax.systems import make_system
from configs.clip_td import snli_ve, vcr, vqa
from tests.convert.originals import random_bert
from tests.models import joint_cases as cases

SIZES = {**cases.BERT, "width": 64, "heads": 1, "layers": 2}  # one head for 64 of the width, as in the files
MODELS = {
    "uniter": (Uniter, UniterConfig(**SIZES, **cases.CLASSES), uniter),
    "vl_bert": (VlBert, VlBertConfig(**SIZES, **cases.CLASSES, object_classes=4), vl_bert),
}


def student(kind, *heads, seed=0, **sizes):
    model, config, _ = MODELS[kind]
    return cases.random_params(model(dataclasses.replace(config, **sizes), heads), seed)


def config_of(kind, **sizes):
    return dataclasses.replace(MODELS[kind][1], **sizes)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """(kind, source, params, of the student) -> the student's parameters from a source that holds params."""

    def read(kind, source, held, params, **init):
        if source == "stage":
            monkeypatch.setattr(question_weights, "find_stage", lambda name, runs: name)
            monkeypatch.setattr(question_weights, "stage_variables", lambda name: {"params": held})
            init["model"] = "stage:before"
        elif source == "file":
            init["model"] = str(tmp_path / "x.safetensors")
            save_file(MODELS[kind][2].to_state_dict(held), init["model"])
        else:
            init["model"] = str(tmp_path / "bert")
            layers, config = len(held["encoder"]), init.pop("config", {})
            words = len(held["embeddings"]["token_embedding"]["embedding"])
            config = BertConfig(**{**SIZES, "layers": layers, "vocab_size": words, **config})
            hf_bert.save(init["model"], config, held)
        return read_question_start(init, params, kind, (), seed=0, config=config_of(kind))

    return read


def held_by(kind, source, *heads, **sizes):
    if source == "bert":
        return random_bert(**{**SIZES, **sizes})
    return student(kind, *heads, seed=1, **sizes)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("source", ["file", "bert", "stage"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_start_covers_the_student(kind, source, start):
    params, held = student(kind), held_by(kind, source)
    made = start(kind, source, held, params)
    same(made["encoder"], held["encoder"])
    same(made["pooler"], held["pooler"])
    with pytest.raises(ValueError, match=r"; encoder/block_1/attn/k/bias: missing.*; encoder/block_1/mlp"):
        start(kind, source, held_by(kind, source, layers=1), params)
    with pytest.raises(ValueError, match="encoder/block_2/attn/k/bias: the model has none"):
        start(kind, source, held_by(kind, source, layers=3), params)


@pytest.mark.parametrize("source", ["file", "bert"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("more", [-1, 25])
def test_the_words_of_another_vocabulary_are_refused(kind, source, more, start):
    said = f"a table of 30 words, but data.student_tokenizer gives the student {30 + more}"
    with pytest.raises(ValueError, match=said):
        start(kind, source, held_by(kind, source), student(kind, vocab_size=30 + more))


@pytest.mark.parametrize("source", ["file", "bert"])
def test_vcrs_persons_are_new_words(source, start):
    held = held_by("uniter", source)
    words = start("uniter", source, held, student("uniter", vocab_size=30 + 81))["embeddings"]
    same(words["token_embedding"]["embedding"][:30], held["embeddings"]["token_embedding"]["embedding"])


def test_heads_of_a_stage(start):
    """Those that it lacks stay as initialised, with the vectors that only they need."""
    params, held = student("vl_bert", "mrc", "itm"), student("vl_bert", "itm", "mlm", seed=1)
    made = start("vl_bert", "stage", held, params)
    for part, of in (("itm", held), ("mrc", params), ("mask_feature", params), ("mask_object", params)):
        same(made[part], of[part])
    del held["ln_text"]
    with pytest.raises(ValueError, match=r"ln_text/bias: missing; ln_text/scale: missing$"):
        start("vl_bert", "stage", held, params)
    with pytest.raises(ValueError, match=r"end_embedding/embedding: the model has none.*region_embeddings"):
        start("uniter", "stage", held, student("uniter"))


@pytest.mark.parametrize("head, of", [("objects", "mrc"), ("vqa", "mlm")])
def test_vl_berts_heads_start_alike_from_a_file_and_from_a_stage(head, of, start):
    """With the transforms of pretraining's heads."""
    params, held = student("vl_bert", head), student("vl_bert", "mrc", "mlm", waves=256, seed=1)
    wide = student("vl_bert", head, waves=256)  # as all files
    names = dict(missing=("final_mlp.2.", "cnn_loss_reg.2."), unused=vl_bert.PRETRAINING)
    from_file = start("vl_bert", "file", held, wide, **names)
    held = held | student("vl_bert")
    from_stage = start("vl_bert", "stage", held, params)
    for made, of_student in ((from_file, wide), (from_stage, params)):
        same(made[head]["transform"], held[of]["transform"])
        same(made[head]["out"], of_student[head]["out"])
    again = student("vl_bert", head, seed=2)
    same(start("vl_bert", "stage", again | {of: held[of]}, params)[head], again[head])  # its own goes first


def test_what_a_file_lacks_must_be_named(start):
    params, held = student("uniter", "vcr"), student("uniter", "mlm", seed=1)
    names = dict(missing=("vcr_output.",), unused=("cls.",))
    made = start("uniter", "file", held, params, **names)
    same(made["vcr"], params["vcr"])
    del held["mlm"]
    with pytest.raises(ValueError, match=r"missing: vcr_output\.0\.bias"):
        start("uniter", "file", held, params)


def test_a_bert_without_a_pooler_is_refused_unless_named(start):
    params, bert = student("uniter", "vcr"), random_bert(**SIZES)
    del bert["pooler"]
    with pytest.raises(ValueError, match=r"pooler/dense/bias: missing; pooler/dense/kernel: missing$"):
        start("uniter", "bert", bert, params, missing=("vcr_output.",))
    made = start("uniter", "bert", bert, params, missing=("pooler.",))
    same(made["pooler"], params["pooler"])
    same(made["encoder"], bert["encoder"])


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_without_a_pooler_takes_that_of_a_bert(kind, start, tmp_path):
    bert, wide = random_bert(**SIZES), {"waves": 256} if kind == "vl_bert" else {}
    hf_bert.save(tmp_path / "other", BertConfig(**SIZES), bert)
    whole, params = student(kind, seed=1, **wide), student(kind, **wide)
    path, config = str(tmp_path / "x.safetensors"), config_of(kind)
    theirs = MODELS[kind][2].to_state_dict(whole)
    save_file({name: x for name, x in theirs.items() if "pooler" not in name}, path)
    with pytest.raises(ValueError, match=r"missing: (uniter|vlbert)\.pooler\.dense\.bias, "):
        read_question_start({"model": path}, params, kind, (), 0, config)
    init = {"model": path, "pooler": str(tmp_path / "other")}
    same(read_question_start(init, params, kind, (), 0, config), whole | {"pooler": bert["pooler"]})
    save_file(theirs, path)
    same(read_question_start(init, params, kind, (), 0, config), whole)  # the file's own goes first
    del bert["pooler"]
    hf_bert.save(tmp_path / "other", BertConfig(**SIZES), bert)
    save_file({name: x for name, x in theirs.items() if "pooler" not in name}, path)
    with pytest.raises(ValueError, match=r"other: .*missing: pooler\.dense\.bias"):
        read_question_start(init, params, kind, (), 0, config)


def test_answers_start_as_the_mean_of_their_words():
    params = student("vl_bert", "vqa", answers=3)
    made = answers_as_words(params, [[4], [], [2, 7]])
    words, before = params["embeddings"]["token_embedding"]["embedding"], params["vqa"]["out"]["kernel"]
    expected = np.stack([words[4], before[:, 1], (words[2] + words[7]) / 2], axis=1)
    np.testing.assert_allclose(made["vqa"]["out"]["kernel"], expected, rtol=1e-6)
    system = make_system(
        {"data": {"format": "vqa"}, "student": {"kind": "vl_bert", "width": 16}, "seed": 0},
        {"answer_tokens": [[4], [], [2, 7]]},
    )
    same(system.start({"answers_as_words": True}, params, {}, ())[0], made)
    made["vqa"]["out"]["kernel"] = before
    same(made, params)
    with pytest.raises(ValueError, match="it is for VL-BERT"):
        answers_as_words(student("uniter", "vqa", answers=3), [[4]] * 3)


def write_published(kind, task, path):
    """Writes what the originals' files have and returns it."""
    if kind == "uniter":  # on VCR of its second stage of pretraining, which has no itm
        sizes = {"vocab_size": SIZES["vocab_size"] + 81, "types": 4} if task is vcr else {}
        held = student(kind, "mlm", "mrfr", "mrc", *([] if task is vcr else ["itm"]), seed=1, **sizes)
        save_file(uniter.to_state_dict(held), path)
        return held
    held = student(kind, "mlm", "mrc", seed=1, waves=256)  # end to end, which hides pixels
    state = vl_bert.to_state_dict(held) | {
        f"module.{name}weight": np.zeros((1, 64), np.float32)
        for name in ("aux_text_visual_embedding.", *vl_bert.RESNET)
    }
    absent = ("pooler", "object_mask_visual_embedding")
    save_file({name: x for name, x in state.items() if not any(part in name for part in absent)}, path)
    return held


@pytest.mark.parametrize("task", [vcr, snli_ve, vqa], ids=["vcr", "snli_ve", "vqa"])
@pytest.mark.parametrize("kind", MODELS)
def test_published_files_fit_the_names_in_the_configs(kind, task, tmp_path):
    path, bert = str(tmp_path / "x.safetensors"), random_bert(**SIZES)
    hf_bert.save(tmp_path / "bert", BertConfig(**SIZES), bert)
    held = write_published(kind, task, path)
    vocab = {"answers": 11, "region_classes": 5, "object_classes": 4, "student": SIZES["vocab_size"]}
    if kind == "uniter" and task is vcr:
        vocab["student"] += 81
    for method, stage in (("baseline", "finetune"), ("af", "pretrain")):
        config = task.get_config(f"{kind}_base,{method},100").to_dict()
        config["student"] |= SIZES
        config["data"]["region_width"] = cases.FEATURES
        module = make_system(config, vocab).module(stage)
        params, init = cases.random_params(module), config["stages"][stage]["init"]
        init |= {"model": path, "pooler": init["pooler"] and str(tmp_path / "bert")}
        made = read_question_start(init, params, kind, (), 0, module.config)
        same(made["encoder"], held["encoder"])
        same(made["pooler"], (bert if kind == "vl_bert" else held)["pooler"])
        heads = [head for head in ("mlm", "mrfr", "mrc") if head in params]
        assert bool(heads) == (stage == "pretrain")
        same([made[head] for head in heads], [held[head] for head in heads])


def test_a_bert_that_computes_otherwise_is_refused(start):
    other = dict(heads=4, ln_eps=1e-5, act="quick_gelu")
    said = (
        "num_attention_heads is 4, the student's heads 1; hidden_act is quick_gelu, the student's act gelu; "
        "layer_norm_eps is 1e-05, the student's ln_eps 1e-12"
    )
    with pytest.raises(ValueError, match=f"bert: config.json: {said}"):
        start("uniter", "bert", random_bert(**SIZES), student("uniter"), config=other)
