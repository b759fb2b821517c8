"""A batch larger than memory, with the loss still taken over the whole of it.

A contrastive loss compares every example with every other, so the usual sum of gradients over small
batches is another loss (fewer negatives). Here only the encoders run in chunks; their outputs are
joined and the loss sees the full batch. In the backward pass each chunk is encoded again. The idea is
GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
section 3.2), written as a scan over a rematerialised function.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from clipdistill_jax.train.sharding import BATCH_AXES


def apply_in_chunks(
    fn: Callable[..., tuple[Any, Any]],
    batch: Any,
    chunks: int,
    model_state: Any = None,
    rng: Any = None,
) -> tuple[Any, Any]:
    """`fn` over a batch at the activation memory of one chunk.

    Values and gradients equal those of `fn(batch, model_state, rng)` where `fn` treats examples apart.
    Two things inside a model do not: batch normalisation sees a chunk's statistics, and its running
    averages move once a chunk; dropout draws with `fold_in(rng, chunk)`.

    Chunk i holds rows i, i + chunks, i + 2 chunks ..., so that a batch that is split over devices gives
    each device its share of every chunk, without communication.

    Args:
      fn: (batch, model_state, rng) -> (outputs, model_state); each output is [b, ...], one row an example.
      batch: tree of arrays [B, ...].
      chunks: how many; 1 calls `fn` directly.
      model_state: carried from chunk to chunk.
      rng: a key, or None.

    Returns:
      outputs [B, ...] in the order of the batch, and the last model_state.

    Raises:
      ValueError: B does not divide into the chunks, or a chunk does not divide over the devices.
    """
    if chunks == 1:
        return fn(batch, model_state, rng)
    sizes = {x.shape[0] for x in jax.tree.leaves(batch)}
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    if len(sizes) != 1 or any(size % (chunks * ways) for size in sizes):
        raise ValueError(f"a batch of {sorted(sizes)} does not split into {chunks} chunks on {ways} devices")

    def split(x: jax.Array) -> jax.Array:  # [B, ...] -> [chunks, B / chunks, ...]
        x = x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:]).swapaxes(0, 1)
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(None, BATCH_AXES))

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(BATCH_AXES))

    @jax.checkpoint
    def body(carry: Any, item: Any) -> Any:
        index, chunk = item
        key = None if rng is None else jax.random.fold_in(rng, index)
        outputs, carry = fn(chunk, carry, key)
        return carry, outputs

    items = (jax.numpy.arange(chunks), jax.tree.map(split, batch))
    model_state, outputs = jax.lax.scan(body, model_state, items)
    return jax.tree.map(join, outputs), model_state
