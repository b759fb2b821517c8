import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.train import sharding
from clipdistill_jax.train.accumulate import apply_in_chunks
from tests.train.toy_run import batch_at, host, init

PARAMS = init(jax.random.key(0))[0]


def encode(params):
    def fn(batch, model_state, rng):
        hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"])
        image = hidden @ params["second"]["kernel"]
        if rng is not None:
            image = image + jax.random.normal(rng, image.shape)
        out = {"image": image, "pairs": (batch["y"], batch["example_id"])}
        return out, model_state if model_state is None else {"seen": model_state["seen"] + len(hidden)}

    return fn


def contrastive(params, batch, chunks):
    out, _ = apply_in_chunks(encode(params), batch, chunks)
    logits = out["image"] @ out["pairs"][0].T
    return -jnp.diagonal(jax.nn.log_softmax(logits)).mean(), out


@pytest.mark.parametrize("chunks", [2, 4, 16])
def test_loss_gradients_and_order_equal_the_whole_batch(chunks):
    batch = jax.tree.map(jnp.asarray, batch_at(0))
    run = jax.jit(jax.value_and_grad(contrastive, has_aux=True), static_argnums=2)
    (loss, out), grads = run(PARAMS, batch, chunks)
    (whole_loss, whole_out), whole_grads = run(PARAMS, batch, 1)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-6)
    np.testing.assert_array_equal(out["pairs"][1], batch["example_id"])
    np.testing.assert_allclose(out["image"], whole_out["image"], rtol=1e-5, atol=1e-6)
    for name, g in host(whole_grads).items():
        np.testing.assert_allclose(host(grads)[name], g, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_model_state_goes_through_every_chunk_and_each_draws_its_own_noise():
    batch = {name: jnp.zeros_like(x) for name, x in batch_at(0).items()}
    out, model_state = apply_in_chunks(encode(PARAMS), batch, 4, {"seen": jnp.int32(0)}, jax.random.key(0))
    assert model_state["seen"] == 16
    assert len(np.unique(np.asarray(out["image"]).round(6), axis=0)) == 16


def compile_sharded(chunks, rows=1024):
    mesh = sharding.make_mesh(4, 2)
    batch = {name: np.tile(x, (rows // 16, *[1] * (x.ndim - 1))) for name, x in batch_at(0).items()}
    with jax.set_mesh(mesh):
        loss = jax.jit(jax.grad(lambda p, b: jnp.mean(contrastive(p, b, chunks)[1]["image"] ** 2)))
        return loss.lower(PARAMS, sharding.place_batch(batch, mesh)).compile()


def test_each_device_keeps_its_rows_in_every_chunk():
    collectives = re.findall(r" (all-gather|all-to-all|collective-permute)\(", compile_sharded(4).as_text())
    assert not collectives


def test_memory_is_that_of_one_chunk():
    def wide(chunks):
        def loss(kernels, x):
            def fn(batch, model_state, rng):
                for kernel in kernels:
                    batch = jnp.tanh(batch @ kernel)
                return batch[:, :1], model_state

            return apply_in_chunks(fn, x, chunks)[0].sum()

        args = ([jnp.zeros((256, 256))] * 6, jnp.zeros((2048, 256)))
        return jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert wide(8) < 0.6 * wide(1)


def test_uneven_chunks_are_refused():
    with pytest.raises(ValueError, match=r"a batch of \[16\] does not split into 3 chunks on 1 devices"):
        apply_in_chunks(encode(PARAMS), batch_at(0), 3)
    with jax.set_mesh(sharding.make_mesh()), pytest.raises(ValueError, match="into 4 chunks on 8 devices"):
        apply_in_chunks(encode(PARAMS), batch_at(0), 4)
