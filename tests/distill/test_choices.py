"""Raw CLIP on questions against transformers' CLIPModel; its logits and the gate by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.convert import hf_clip
from clipdistill_jax.distill import ConfidenceGate
from clipdistill_jax.distill.choices import answer_vectors, choice_features, similarities, with_logits
from clipdistill_jax.distill.confidence import fit_anchors
from clipdistill_jax.models.clip import ClipText, ClipVision
from clipdistill_jax.models.dual_encoder import DualEncoder
from clipdistill_jax.models.features import Features
from clipdistill_jax.models.image import CLIP_MEAN, CLIP_STD
from clipdistill_jax.models.temporal import MeanPool
from clipdistill_jax.train.accumulate import apply_in_chunks
from clipdistill_jax.train.sharding import fetch, make_mesh, place_batch

torch = pytest.importorskip("torch", reason="parity with transformers' torch models")
transformers = pytest.importorskip("transformers", reason="parity with transformers' models")

B, K, T, SIDE, END = 4, 3, 9, 16, 39
TOWER = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32)


@pytest.fixture(scope="module")
def models():
    """A random torch CLIPModel, every parameter moved from its initial value; our module and variables."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=dict(TOWER, image_size=SIDE, patch_size=8, projection_dim=12),
        text_config=dict(
            TOWER,
            vocab_size=END + 1,
            max_position_embeddings=T,
            bos_token_id=END - 1,
            eos_token_id=END,
            projection_dim=12,
        ),
        projection_dim=12,
    )
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    state = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    vision, text, params = hf_clip.from_state_dict(state, config.to_dict())
    return theirs, DualEncoder(ClipVision(vision), ClipText(text), MeanPool()), {"params": params}


@pytest.fixture(scope="module")
def seen(models):
    """Our features of the questions."""
    _, module, variables = models
    return jax.jit(lambda variables, batch: choice_features(module, variables, batch))(variables, questions())


def texts(shape, seed=0):
    """Tokens from first to end of text; words of one or two tokens, the first two words cut off."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, T + 1, shape)
    lengths.flat[0], lengths.flat[-1] = T, 2  # a full text, and an empty one
    place = np.arange(T)
    tokens = rng.integers(0, END - 1, (*shape, T))
    tokens = np.where(place == 0, END - 1, np.where(place < lengths[..., None] - 1, tokens, END))
    word_ids = 1 + np.cumsum(rng.integers(0, 2, (*shape, T)), -1)
    inside = (place > 0) & (place < lengths[..., None] - 1)
    return {
        "clip_tokens": tokens.astype(np.int32),
        "clip_token_mask": place < lengths[..., None],
        "clip_word_ids": np.where(inside, word_ids, -1).astype(np.int32),
    }


def questions(k=K, b=B):
    rng = np.random.default_rng(1)
    return {
        "image": rng.integers(0, 256, (b, SIDE, SIDE, 3)).astype(np.uint8),
        **texts((b, k)),
        "importance": rng.random((b, k, T)).astype(np.float32),
        "label": np.resize([2, 0, -1, 1], b).astype(np.int32),
    }


def pixels(images):
    x = (images / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    return torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)


def torch_logits(model, images, tokens):
    """logits_per_image of every image and every text [N, T]."""
    with torch.no_grad():
        said = model(input_ids=torch.tensor(tokens, dtype=torch.long), pixel_values=pixels(images))
    return said.logits_per_image.numpy()


def slow_words(model, batch):
    """Mean of each word's projected states, in a slot a word: loops over texts and words."""
    tokens = torch.tensor(batch["clip_tokens"].reshape(-1, T), dtype=torch.long)
    with torch.no_grad():
        states = model.text_projection(model.text_model(tokens).last_hidden_state).numpy()
    states, ids = states.reshape(B, K, T, -1), batch["clip_word_ids"]
    words, mask = np.zeros(states.shape), np.zeros(ids.shape, bool)
    for b, k in np.ndindex(B, K):
        for word in set(ids[b, k].tolist()) - {-1}:
            words[b, k, word] = np.mean([states[b, k, t] for t in range(T) if ids[b, k, t] == word], 0)
            mask[b, k, word] = True
    return words, mask


def test_choices_are_those_of_transformers(models, seen):
    model, batch, found = models[0], questions(), seen
    scale = model.logit_scale.exp().item()
    expected = torch_logits(model, batch["image"], batch["clip_tokens"].reshape(-1, T))
    expected = np.stack([row.reshape(B, K)[b] for b, row in enumerate(expected.reshape(B, B, K))])
    # Two float32 towers differ by some 1e-6 of a cosine.
    np.testing.assert_allclose(found.logits, expected, atol=1e-5 * scale)
    np.testing.assert_allclose(found.logit_scale, scale, rtol=1e-6)
    with torch.no_grad():
        image = model.get_image_features(pixels(batch["image"])).numpy()
    np.testing.assert_allclose(found.image, image, atol=1e-5)
    words, mask = slow_words(model, batch)
    np.testing.assert_array_equal(found.word_mask, mask)
    assert not mask[..., :1].any() and mask.any() and not mask[-1, -1].any()
    np.testing.assert_allclose(found.words, words, atol=1e-5)
    for name in ("importance", "label"):
        np.testing.assert_array_equal(getattr(found, name), batch[name])
    assert found.tokens.shape == (B, K, T, 12) and found.token_mask.shape == (B, K, T)


def test_answers_and_anchors(models):
    model, module, variables = models
    prompts = texts((5,), seed=2)
    answers = jax.jit(lambda variables, *rows: answer_vectors(module, variables, *rows, batch_size=2))(
        variables, prompts["clip_tokens"], prompts["clip_token_mask"]
    )
    with torch.no_grad():
        expected = model.get_text_features(torch.tensor(prompts["clip_tokens"], dtype=torch.long)).numpy()
    np.testing.assert_allclose(answers, expected, atol=1e-5)

    batch, scale = questions(k=1), model.logit_scale.exp().item()
    anchors = jnp.array([2.0, 5.0, 3.0])
    both = jax.jit(
        lambda variables, batch, answers, anchors: [
            choice_features(module, variables, batch, **given).logits
            for given in ({"answers": answers}, {"anchors": anchors})
        ]
    )
    for_vqa, for_ve = both(variables, batch, answers, anchors)
    expected = torch_logits(model, batch["image"], prompts["clip_tokens"])
    np.testing.assert_allclose(for_vqa, expected, atol=1e-5 * scale)
    own = np.diagonal(torch_logits(model, batch["image"], batch["clip_tokens"][:, 0]))
    # The square of a difference d moves by 2 |d| times what the similarity moves.
    atol = 2e-5 * scale * np.abs(own[:, None] - np.asarray(anchors)).max()
    np.testing.assert_allclose(for_ve, -((own[:, None] - np.asarray(anchors)) ** 2), atol=atol)


def test_similarities_of_a_split_feed_the_anchors(models):
    model, module, variables = models
    batch, mesh = questions(k=1, b=6), make_mesh(devices=jax.devices()[:2])
    del batch["label"], batch["importance"]
    mask = np.array([True, True, True, True, True, False])
    parts = [
        {name: x[rows] for name, x in {**batch, "mask": mask}.items()} for rows in ([0, 1], [2, 3], [4, 5])
    ]
    with jax.set_mesh(mesh):
        found = similarities(
            module, variables, iter(parts), place=lambda rows: place_batch(rows, mesh), fetch=fetch
        )
    expected = np.diagonal(torch_logits(model, batch["image"], batch["clip_tokens"][:, 0]))[:5]
    np.testing.assert_allclose(found, expected, atol=1e-5 * model.logit_scale.exp().item())
    low, high, middle = fit_anchors(found)
    assert found.min() <= low < middle < high <= found.max()
    with pytest.raises(ValueError, match="one text an image; the batch has 3"):
        similarities(module, variables, [{**questions(b=2), "mask": mask[:2]}])


def test_in_chunks_on_a_mesh_it_is_the_same(models, seen):
    _, module, variables = models
    batch, mesh = questions(), make_mesh(devices=jax.devices()[:2])

    def in_chunks(variables, batch):
        def part(rows, state, key):
            return choice_features(module, variables, rows).replace(logit_scale=None), state

        return apply_in_chunks(part, batch, 2)[0]

    with jax.set_mesh(mesh):
        found = jax.jit(in_chunks)(variables, place_batch(batch, mesh))
    assert found.given() == seen.given() - {"logit_scale"}
    for name in found.given():
        ours, theirs = np.asarray(getattr(found, name)), np.asarray(getattr(seen, name))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def test_no_gradient_leaves_the_teacher(models):
    _, module, variables = models
    batch = questions(b=1)

    def total(variables):
        found = choice_features(module, variables, batch)
        return sum(jnp.sum(x) for x in (found.logits, found.text, found.image, found.words))

    assert all(not np.asarray(x).any() for x in jax.tree.leaves(jax.jit(jax.grad(total))(variables)))


def said(image, text, scale):
    image, text, scale = (np.asarray(x, np.float32) for x in (image, text, scale))
    return Features(image=jnp.asarray(image), text=jnp.asarray(text), logit_scale=jnp.asarray(scale))


def answered(logits):
    return Features(logits=jnp.asarray(np.asarray(logits, np.float32)))


def gated(student, teacher, **fields):
    return jax.jit(ConfidenceGate(**fields).__call__)(student, teacher).tolist()


def test_the_gate_from_vectors_to_end():
    compute = jax.jit(with_logits)
    # Cosines 1 and 0 times log 3: CLIP says 0.75 and 0.25.
    teacher = said([[2.0, 0.0]] * 3, [[[5.0, 0.0], [0.0, 1.0]]] * 3, np.log(3))
    teacher = compute(teacher, {"label": np.array([0, 1, -1], np.int32)}, None, None)
    np.testing.assert_allclose(softmax(teacher.logits), [[0.75, 0.25]] * 3, rtol=1e-6)
    student = answered(np.log([[0.7, 0.3], [0.8, 0.2], [0.4, 0.6]]))
    assert gated(student, teacher) == [1, 0, 1]
    assert gated(student, teacher, choices="correct") == [1, 1, 0]

    # SNLI-VE: similarities 10 * (0, 0.5, 1), anchors 0, 10 and 6: -(0, 100, 36), -(25, 25, 1), -(100, 0, 16).
    text = [[[0.0, 1.0]], [[0.5, np.sqrt(0.75)]], [[3.0, 0.0]]]
    teacher = compute(said([[1.0, 0.0]] * 3, text, 10), {}, None, jnp.array([0.0, 10.0, 6.0]))
    np.testing.assert_allclose(
        teacher.logits, [[0, -100, -36], [-25, -25, -1], [-100, 0, -16]], rtol=1e-5, atol=1e-4
    )
    student = answered([[30.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 12.0, 0.0]])
    assert gated(student, teacher) == [0, 1, 1]

    # VQA: cosines -1, 0 and 1 with three answers, times log 4: 1/21, 4/21, 16/21.
    answers = jnp.array([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    teacher = compute(said([[1.0, 0.0]] * 2, [[[9.0, 9.0]]] * 2, np.log(4)), {}, answers, None)
    np.testing.assert_allclose(softmax(teacher.logits), np.array([[1, 4, 16]] * 2) / 21, rtol=1e-5)
    student = answered(np.log([[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]))
    assert gated(student, teacher) == [1, 0]


def softmax(logits):
    e = np.exp(np.asarray(logits, np.float64))
    return e / e.sum(-1, keepdims=True)


def test_what_does_not_fit_is_refused(models):
    _, module, variables = models
    with pytest.raises(ValueError, match="the batch has no image, clip_word_ids"):
        choice_features(
            module, variables, {name: questions()[name] for name in ("clip_tokens", "clip_token_mask")}
        )
    two = said([[1.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]], 1.0)
    with pytest.raises(ValueError, match="one text an image; the batch has 2"):
        with_logits(two, {}, None, jnp.zeros(3))
    with pytest.raises(ValueError, match="not both"):
        with_logits(two, {}, jnp.zeros((4, 2)), jnp.zeros(3))
