"""BERT's weights in and out: parity with transformers' models, and round trips through every format."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from clipdistill_jax.convert import hf_bert
from clipdistill_jax.models.bert import PRESETS, BertConfig, BertEmbeddings, BertEncoder, BertPooler
from clipdistill_jax.models.bert_text import BertText
from clipdistill_jax.train.state import signature
from tests.convert.originals import close, flax_model, same_tree

torch = pytest.importorskip("torch", reason="parity with transformers' torch models")
transformers = pytest.importorskip("transformers", reason="parity with transformers' models")

CONFIG = BertConfig(
    vocab_size=60, context_length=16, types=3, width=48, layers=3, heads=4, mlp_width=80, dropout=0.2
)


def sizes(config: BertConfig):
    return transformers.BertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        type_vocab_size=config.types,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_width,
        hidden_dropout_prob=config.dropout,
        attn_implementation="eager",  # the one that gives the attention weights
    )


def moved(model):
    """Every parameter away from its initial value, so that none is a plain 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return moved(transformers.BertModel(sizes(CONFIG)))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A directory that transformers wrote."""
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, (3, 10)).astype(np.int32)
    token_mask = np.arange(10) < np.array([[10], [7], [2]])
    types = rng.integers(0, 3, (3, 10)).astype(np.int32)
    return np.where(token_mask, tokens, 0), types, token_mask


def run(config, params, inputs):
    """(hidden, attention, pooled) of our modules."""

    @jax.jit
    def forward(params, tokens, types, token_mask):
        x = BertEmbeddings(config).apply({"params": params["embeddings"]}, tokens, types)
        encoder = BertEncoder(config)
        out = encoder.apply({"params": params["encoder"]}, x, token_mask[:, None, None], attention=True)
        return out.hidden, out.attention, BertPooler().apply({"params": params["pooler"]}, out.hidden[-1])

    return forward(params, *inputs)


def theirs_of(model, inputs):
    tokens, types, token_mask = (torch.tensor(x).long() for x in inputs)
    with torch.no_grad():
        return model(
            input_ids=tokens,
            token_type_ids=types,
            attention_mask=token_mask,
            output_hidden_states=True,
            output_attentions=True,
        )


def test_everything_equals_torch(model, inputs):
    config, params = hf_bert.from_state_dict(model.state_dict(), model.config.to_dict())
    assert config == CONFIG
    hidden, attention, pooled = run(config, params, inputs)
    expected = theirs_of(model, inputs)
    for ours, theirs in zip(hidden, expected.hidden_states, strict=True):
        close(ours, theirs)
    for ours, theirs in zip(attention, expected.attentions, strict=True):
        close(ours, theirs, atol=1e-6)  # at most 1, unlike the states
    close(pooled, expected.pooler_output)
    assert np.abs(np.asarray(expected.attentions[0]) - 0.1).max() > 0.02  # they are no plain means


def test_tinybert_at_full_size_equals_torch():
    torch.manual_seed(1)
    theirs = transformers.BertModel(sizes(PRESETS["tiny_4x312"])).eval()
    assert sum(x.numel() for x in theirs.parameters()) == 14_350_248
    config, params = hf_bert.from_state_dict(theirs.state_dict(), theirs.config.to_dict())
    assert config == PRESETS["tiny_4x312"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 14_350_248
    rng = np.random.default_rng(0)
    inputs = rng.integers(1, 30522, (2, 12)), np.zeros((2, 12), int), np.arange(12) < [[12], [5]]
    hidden, _, pooled = run(config, params, tuple(x.astype(np.int32) for x in inputs[:2]) + inputs[2:])
    expected = theirs_of(theirs, inputs)
    close(hidden[-1], expected.last_hidden_state)
    close(pooled, expected.pooler_output)


@pytest.mark.parametrize("preset, parameters", [("base", 109_482_240), ("large", 335_141_888)])
def test_parameter_counts_of_transformers(preset, parameters):
    """The counts that tests/models/test_bert.py holds our presets to."""
    with torch.device("meta"):
        theirs = transformers.BertModel(sizes(PRESETS[preset]))
    assert sum(x.numel() for x in theirs.parameters()) == parameters


def test_every_format_gives_the_same_parameters(model, folder, tmp_path):
    expected = hf_bert.load(folder)
    assert (folder / "model.safetensors").is_file()
    model.save_pretrained(tmp_path / "torch", safe_serialization=False)
    assert (tmp_path / "torch" / "pytorch_model.bin").is_file()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for other in ("torch", "sharded"):
        config, params = hf_bert.load(str(tmp_path / other))
        assert config == expected[0]
        same_tree(params, expected[1])


def test_flax_files_give_the_same_parameters(folder, tmp_path):
    flax_model("FlaxBertModel", folder).save_pretrained(tmp_path)
    assert (tmp_path / "flax_model.msgpack").is_file()
    same_tree(hf_bert.load(tmp_path)[1], hf_bert.load(folder)[1])


def test_prefix_heads_and_old_names(model, folder, tmp_path):
    """A BERT with heads, as TinyBERT's: `bert.`, gamma and beta, a masked-language head, `fit_dense`."""
    whole = transformers.BertForPreTraining(sizes(CONFIG))
    whole.bert.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path / "heads")
    expected = hf_bert.load(folder)
    same_tree(hf_bert.load(tmp_path / "heads")[1], expected[1])

    state = {name: x.numpy() for name, x in whole.state_dict().items()}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        state = {key.replace(new, name): x for key, x in state.items()}
    assert "bert.encoder.layer.2.output.LayerNorm.gamma" in state
    state |= {"fit_dense.weight": np.zeros((5, 48), np.float32), "fit_dense.bias": np.zeros(5, np.float32)}
    state["bert.embeddings.position_ids"] = np.arange(16)[None]
    config, params = hf_bert.from_state_dict(state, model.config.to_dict())
    assert config == expected[0]
    same_tree(params, expected[1])


def test_the_pooler_is_read_where_it_is_and_left_out_on_request(model, tmp_path):
    config = model.config.to_dict()
    state = model.state_dict()
    bare = {name: x for name, x in state.items() if not name.startswith("pooler.")}
    assert set(hf_bert.from_state_dict(state, config)[1]) == {"embeddings", "encoder", "pooler"}
    assert set(hf_bert.from_state_dict(state, config, pooler=False)[1]) == {"embeddings", "encoder"}
    assert set(hf_bert.from_state_dict(bare, config)[1]) == {"embeddings", "encoder"}
    with pytest.raises(ValueError, match=r"missing: pooler\.dense\.bias, pooler\.dense\.weight"):
        hf_bert.from_state_dict(bare, config, pooler=True)


def test_a_text_tower_starts_from_it_with_its_own_projection(folder, inputs, model):
    config, params = hf_bert.load(folder, pooler=False)
    tower = BertText(config, projection_dim=8)
    tokens, _, token_mask = inputs
    shapes = jax.eval_shape(tower.init, jax.random.key(0), tokens, token_mask)["params"]
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), shapes["projection"])
    params = {**params, "projection": own}
    assert signature(params) == signature(dict(shapes))
    said = jax.jit(tower.apply)({"params": params}, tokens, token_mask)
    expected = theirs_of(model, (tokens, np.zeros_like(tokens), token_mask))
    for ours, theirs in zip(said.hidden, expected.hidden_states, strict=True):
        close(ours, theirs)
    close(said.embedding, expected.last_hidden_state[:, 0].numpy() @ own["kernel"])


def test_round_trip_key_for_key(model, folder, tmp_path, inputs):
    config, params = hf_bert.load(folder)
    state = hf_bert.to_state_dict(jax.tree.map(jnp.asarray, params))
    expected = {name: x.numpy() for name, x in model.state_dict().items()}
    assert set(state) == set(expected) and len(state) == 5 + 16 * 3 + 2
    for name, x in expected.items():
        np.testing.assert_array_equal(state[name], x, err_msg=name)

    hf_bert.save(tmp_path / "out", config, params)
    again, report = transformers.BertModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = theirs_of(again.eval(), inputs)
    assert torch.equal(given.pooler_output, theirs_of(model, inputs).pooler_output)
    back = hf_bert.load(tmp_path / "out")
    assert back[0] == config
    same_tree(back[1], params)

    bare = {name: params[name] for name in ("embeddings", "encoder")}
    hf_bert.save(tmp_path / "bare", config, bare)
    same_tree(hf_bert.load(tmp_path / "bare")[1], bare)


def test_parameters_that_do_not_fit_are_not_written(folder, tmp_path):
    config, params = hf_bert.load(folder)
    with pytest.raises(ValueError, match="unknown: projection/kernel"):
        hf_bert.save(tmp_path / "out", config, {**params, "projection": {"kernel": np.zeros((48, 8))}})
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.3\."):
        hf_bert.save(tmp_path / "out", dataclasses.replace(config, layers=4), params)
    with pytest.raises(
        ValueError, match=r"word_embeddings\.weight \(60, 48\) gives \(60, 48\), not \(61, 48\)"
    ):
        hf_bert.save(tmp_path / "out", dataclasses.replace(config, vocab_size=61), params)
    assert not (tmp_path / "out").exists()


def test_directories_that_are_not_bert_are_refused(folder, tmp_path):
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def refused(match, error=ValueError, state=None, **change):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        safetensors.numpy.save_file(state or weights, tmp_path / "model.safetensors")
        with pytest.raises(error, match=match):
            hf_bert.load(tmp_path)

    refused("of a 'clip' model, not 'bert'", model_type="clip")
    refused("position_embedding_type is 'relative_key'", position_embedding_type="relative_key")
    refused("hidden_act: unknown activation 'gelu_new'", hidden_act="gelu_new")
    refused(r"unknown: encoder\.layer\.2\.", num_hidden_layers=2)
    refused(r"unknown: surprise", state={**weights, "surprise": np.zeros(1, np.float32)})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        hf_bert.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        hf_bert.load(tmp_path)
