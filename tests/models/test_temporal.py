"""Temporal heads against torch, written from CLIP4Clip's facts, under CLIP4Clip's own tensor names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.convert import clip4clip, openai_clip
from clipdistill_jax.models.clip import ClipText, ClipTextConfig, ClipVisionConfig, param_shapes
from clipdistill_jax.models.temporal import (
    MeanPool,
    SeqLSTM,
    SeqTransf,
    TightTransf,
    init_from_text,
    pool,
)

WIDTH, FRAMES = 128, 5
LENGTHS = np.array([5, 3, 1])
VISION = ClipVisionConfig(
    image_size=8, patch_size=4, width=64, layers=1, heads=1, mlp_width=64, projection_dim=WIDTH
)
TEXT = ClipTextConfig(
    vocab_size=20, context_length=9, width=WIDTH, layers=3, heads=2, mlp_width=4 * WIDTH, projection_dim=WIDTH
)


def random_params(module, *inputs, **options):
    """Made here: an initialisation compiles longer than the head."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        return (0.1 * rng.normal(size=x.shape) + (path[-1].key == "scale")).astype(np.float32)

    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, **options), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the heads are checked against torch modules")


@pytest.fixture(scope="module")
def frames():
    return jax.random.normal(jax.random.key(0), (3, FRAMES, WIDTH))


@pytest.fixture(scope="module")
def frame_mask():
    return jnp.arange(FRAMES) < LENGTHS[:, None]


@pytest.fixture(scope="module")
def clip_state():
    """Tensors of a tiny CLIP under OpenAI's names (zeros: only the head is looked at here)."""
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), param_shapes(VISION, TEXT))
    return {f"clip.{name}": x for name, x in openai_clip.to_state_dict(params).items()}


def torch_blocks(torch, layers: int):
    """CLIP4Clip's `Transformer`: torch attention, QuickGELU, a layer norm with epsilon 1e-12."""

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
            self.bias = torch.nn.Parameter(0.1 * torch.randn(WIDTH))

        def forward(self, x):
            centred = x - x.mean(-1, keepdim=True)
            return (
                self.weight * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-12) + self.bias
            )

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
            torch.nn.init.normal_(self.attn.in_proj_bias, std=0.1)
            self.ln_1, self.ln_2 = Norm(), Norm()
            self.mlp = torch.nn.ModuleDict(
                {"c_fc": torch.nn.Linear(WIDTH, 4 * WIDTH), "c_proj": torch.nn.Linear(4 * WIDTH, WIDTH)}
            )

        def forward(self, x, additive):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=additive)[0]
            y = self.mlp["c_fc"](self.ln_2(x))
            return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.resblocks = torch.nn.ModuleList([Block() for _ in range(layers)])

        def forward(self, x, mask):
            heads, length = WIDTH // 64, x.shape[1]
            additive = (1.0 - mask.float())[:, None, :].expand(-1, length, -1) * -1000000.0
            for block in self.resblocks:
                x = block(x, additive.repeat_interleave(heads, 0))
            return x

    return Stack(), Norm


def numpy_state(**modules) -> dict[str, np.ndarray]:
    """Tensors of torch modules under `name.` each."""
    return {
        f"{name}.{key}": x.detach().numpy().copy()
        for name, module in modules.items()
        for key, x in module.state_dict().items()
    }


def test_seq_transf_equals_torch(torch, clip_state, frames, frame_mask):
    torch.manual_seed(0)
    stack, _ = torch_blocks(torch, 2)
    positions = torch.nn.Embedding(9, WIDTH)
    state = clip_state | numpy_state(transformerClip=stack, frame_position_embeddings=positions)
    loaded = clip4clip.from_state_dict(state)
    assert loaded.kind == "seqTransf"
    assert loaded.head == SeqTransf(layers=2, positions=9)

    ours = jax.jit(loaded.head.apply)({"params": loaded.params["temporal"]}, frames, frame_mask)
    with torch.no_grad():
        x = torch.tensor(np.asarray(frames))
        expected = stack(x + positions.weight[:FRAMES], torch.tensor(np.asarray(frame_mask))) + x
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert np.abs(ours - 2 * frames).max() > 0.1


def test_seq_transf_ignores_masked_frames(frames, frame_mask):
    head = SeqTransf(layers=1)
    params = random_params(head, frames, frame_mask)
    apply = jax.jit(lambda x: pool(head.apply(params, x, frame_mask), frame_mask))
    noisy = jnp.where(frame_mask[..., None], frames, 1e3)
    np.testing.assert_allclose(apply(noisy), apply(frames), rtol=0, atol=1e-6)


def test_seq_transf_without_branches_doubles_the_frames(frames, frame_mask):
    """With zero positions and zero output projections the stack is the identity."""
    head = SeqTransf(layers=2)
    params = random_params(head, frames, frame_mask)["params"]
    params["position_embedding"] = np.zeros_like(params["position_embedding"])
    for block in params["transformer"].values():
        for layer in (block["attn"]["o"], block["mlp"]["fc2"]):
            layer.update(jax.tree.map(np.zeros_like, layer))
    out = jax.jit(head.apply)({"params": params}, frames, frame_mask)
    np.testing.assert_array_equal(out, 2 * frames)
    pooled = jax.jit(pool)
    expected = pooled(MeanPool().apply({}, frames, frame_mask), frame_mask)
    np.testing.assert_allclose(pooled(out, frame_mask), expected, atol=1e-7)


def test_seq_lstm_equals_packed_torch(torch, clip_state, frames, frame_mask):
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(WIDTH, WIDTH, batch_first=True)
    # The model carries a position table that it never reads.
    state = clip_state | numpy_state(lstm_visual=lstm, frame_position_embeddings=torch.nn.Embedding(9, WIDTH))
    loaded = clip4clip.from_state_dict(state)
    assert loaded.kind == "seqLSTM" and isinstance(loaded.head, SeqLSTM)
    ours = np.asarray(jax.jit(loaded.head.apply)({"params": loaded.params["temporal"]}, frames, frame_mask))

    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    def reference(x, lengths):
        """One call of CLIP4Clip's head."""
        x = torch.tensor(np.asarray(x))
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True)
        return (torch.cat([y, x[:, y.shape[1] :]], dim=1) + x).detach().numpy()

    for row, length in enumerate(LENGTHS):  # each clip for itself: every position
        expected = reference(frames[row : row + 1], [int(length)])[0]
        np.testing.assert_allclose(ours[row], expected, rtol=0, atol=1e-6)
    together = reference(frames, LENGTHS)
    real = np.asarray(frame_mask)
    np.testing.assert_allclose(ours[real], together[real], rtol=0, atol=1e-6)


def test_tight_transf_equals_torch(torch, clip_state, frames, frame_mask):
    torch.manual_seed(0)
    stack, norm = torch_blocks(torch, 1)
    positions, pool_norm = torch.nn.Embedding(9, WIDTH), norm()
    dense, similarity = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1)
    state = clip_state | numpy_state(similarity_dense=similarity)
    state |= numpy_state(**{"cross.transformer": stack, "cross.embeddings.position_embeddings": positions})
    state |= numpy_state(**{"cross.pooler.dense": dense, "cross.pooler.ln_pool": pool_norm})
    # Old checkpoints say gamma and beta.
    state["cross.pooler.ln_pool.gamma"] = state.pop("cross.pooler.ln_pool.weight")
    state["cross.pooler.ln_pool.beta"] = state.pop("cross.pooler.ln_pool.bias")
    loaded = clip4clip.from_state_dict(state)
    assert loaded.kind == "tightTransf"
    assert loaded.head == TightTransf(width=WIDTH, layers=1, positions=9)

    texts = jax.random.normal(jax.random.key(1), (4, WIDTH))
    expected = np.zeros((4, 3), np.float32)
    with torch.no_grad():
        for t in range(4):
            for v in range(3):
                x = torch.cat(
                    [torch.tensor(np.asarray(texts[t]))[None], torch.tensor(np.asarray(frames[v]))]
                )[None]
                mask = torch.cat([torch.ones(1), torch.tensor(np.asarray(frame_mask[v])).float()])[None]
                y = stack(x + positions.weight[: FRAMES + 1], mask)
                y = dense(pool_norm(y)[:, 0])
                expected[t, v] = similarity(y * torch.sigmoid(1.702 * y)).item()
    variables = {"params": loaded.params["temporal"]}
    for pairs in (5, 1024):  # 12 pairs: chunks of 5, 5, 2 and all at once
        head = loaded.head.clone(pairs=pairs)
        ours = jax.jit(lambda *x, head=head: head.apply(variables, *x, method="scores"))(
            texts, frames, frame_mask
        )
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert loaded.head.apply(variables, frames, frame_mask) is frames


def test_tight_transf_gradient_with_remat_and_dropout(frames, frame_mask):
    head = TightTransf(width=WIDTH, layers=1, pairs=4)
    inputs = (frames[:, 0], frames, frame_mask)
    params = random_params(head, *inputs, method="scores")

    def loss(params, head, train):
        rngs = {"dropout": jax.random.key(1)} if train else None
        return jnp.sum(jnp.sin(head.apply(params, *inputs, train, method="scores", rngs=rngs)))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    plain, again = gradient(params, head, False), gradient(params, head.clone(remat=True), False)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        *jax.device_get((plain, again)),
    )
    assert abs(jax.jit(loss, static_argnums=(1, 2))(params, head, True) - plain[0]) > 1e-4


def test_pool_by_hand():
    temporal = jnp.array([[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]])
    frame_mask = jnp.array([[True, True, False]])
    mean = np.array([0.6 / 2, (0.8 + 1.0) / 2])
    np.testing.assert_allclose(jax.jit(pool)(temporal, frame_mask)[0], mean / np.linalg.norm(mean), rtol=1e-6)


def test_empty_clips_are_finite_everywhere(frames):
    frame_mask = jnp.array([[True] * FRAMES, [False] * FRAMES, [True] + [False] * (FRAMES - 1)])
    frames = frames.at[1].set(0.0)
    for head in (MeanPool(), SeqLSTM(), SeqTransf(layers=1)):
        params = random_params(head, frames, frame_mask)

        def loss(params, x, head=head):
            clips = pool(head.apply(params, x, frame_mask), frame_mask)
            return jnp.sum(jnp.sin(clips)), clips

        (_, clips), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, frames)
        np.testing.assert_array_equal(clips[1], 0.0)
        np.testing.assert_allclose(np.linalg.norm(clips, axis=-1), [1, 0, 1], atol=1e-6)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
        np.testing.assert_array_equal(gradients[1][1], 0.0)


def test_parameter_count_of_four_blocks():
    shapes = jax.eval_shape(
        SeqTransf().init, jax.random.key(0), jnp.zeros((1, 12, 512)), jnp.ones((1, 12), bool)
    )["params"]
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes["transformer"])) == 12_609_536
    assert shapes["position_embedding"].shape == (77, 512)


def test_init_from_text_takes_the_first_blocks(frames, frame_mask):
    tokens = jnp.ones((1, 4), jnp.int32)
    text = random_params(ClipText(TEXT), tokens, tokens > 0)["params"]
    head = SeqTransf(layers=2, positions=6)
    params = random_params(head, frames, frame_mask)["params"]
    made = init_from_text(text, params)
    assert jax.tree.structure(made) == jax.tree.structure(params)
    for i in range(2):
        theirs, ours = text["transformer"][f"block_{i}"], made["transformer"][f"block_{i}"]
        jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    np.testing.assert_array_equal(made["position_embedding"], text["position_embedding"][:6])
    assert init_from_text(text, {}) == {}

    deep = {"transformer": {f"block_{i}": {} for i in range(4)}}
    with pytest.raises(ValueError, match="the head has 4 blocks, the text tower only 3"):
        init_from_text(text, deep)
    with pytest.raises(ValueError, match="position table"):
        init_from_text(text, {"position_embedding": np.zeros((10, WIDTH))})
    narrow = jax.tree.map(lambda x: x[:8], params)
    with pytest.raises(ValueError, match="another width"):
        init_from_text(text, narrow)


def test_more_frames_than_positions_are_refused(frames, frame_mask):
    with pytest.raises(ValueError, match="5 frames a clip, but the head has 4 positions"):
        jax.eval_shape(SeqTransf(positions=4).init, jax.random.key(0), frames, frame_mask)
