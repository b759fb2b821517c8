"""A tiny two-layer network with batch statistics: these tests' model, and, as a script, a run to kill.

`python toy_run.py WORKDIR [--steps 12 ...]` trains it and writes the last parameters to WORKDIR/final.npz.
"""

import argparse
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from clipdistill_jax.train import checkpoint, loop, optimizers, preemption, sharding, state, step, writers
from clipdistill_jax.train import metrics as metrics_lib

ROWS, WIDTH, HIDDEN, OUT = 16, 8, 32, 4
OPTIMIZER = {"learning_rate": {"kind": "cosine", "value": 0.05}, "weight_decay": 0.1, "clip_norm": 1.0}
# Small enough that FSDP takes the toy's kernels.
FSDP_MIN_SIZE = 64


def init(key):
    first, second = jax.random.split(key)
    params = {
        "first": {"kernel": jax.random.normal(first, (WIDTH, HIDDEN)) / 3, "bias": jnp.zeros(HIDDEN)},
        "second": {"kernel": jax.random.normal(second, (HIDDEN, OUT)) / 6},
    }
    return params, {"mean": jnp.zeros(HIDDEN)}


def forward(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden, hidden @ params["second"]["kernel"]


def loss_fn(params, model_state, frozen, batch, rng, step):
    """Contrastive on purpose: every example meets every other, so that a wrong split of the batch shows."""
    hidden, out = forward(params, batch["x"])
    noise = 0.01 * jax.random.normal(rng, out.shape)
    logits = (out + noise) @ batch["y"].T * (1.0 if frozen is None else frozen["scale"])
    losses = -jnp.diagonal(jax.nn.log_softmax(logits))
    mean = 0.9 * model_state["mean"] + 0.1 * hidden.mean(0)
    correct = logits.argmax(1) == jnp.arange(len(logits))
    return losses.mean(), ({"accuracy": metrics_lib.mean(correct)}, {"mean": mean})


def batch_at(step, rows=ROWS):
    rng = np.random.default_rng([3, step])
    x = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    y = (x[:, :OUT] + 0.1 * rng.normal(size=(rows, OUT))).astype(np.float32)
    return {"x": x, "y": y, "example_id": np.arange(rows, dtype=np.int32) + rows * step}


def batches(start, part=(0, 1), poison=(), sleep=0.0):
    """Endless; `part` = (index, count) of the rows; steps in `poison` (0 is the first) get a NaN."""
    index, count = part
    while True:
        batch = batch_at(start)
        if start in poison:
            batch["x"][3, 2] = np.nan
        rows = ROWS // count
        yield {name: x[index * rows : (index + 1) * rows] for name, x in batch.items()}
        time.sleep(sleep)
        start += 1


MADE = {}  # compiling is what these tests spend their time on


def make(mesh, steps=12, optimizer=OPTIMIZER, rules=(), seed=0, **step_options):
    """(state, step function, optimizer) of a run; the state is the caller's to donate."""
    key = repr((mesh, mesh.device_ids.tolist(), steps, optimizer, rules, seed, step_options))
    if key not in MADE:
        MADE[key] = build(mesh, steps, optimizer, rules, seed, **step_options)
    state, step_fn, built = MADE[key]
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), state), step_fn, built


def build(mesh, steps, optimizer, rules, seed, **step_options):
    shapes = jax.eval_shape(init, jax.random.key(0))[0]
    built = optimizers.make_optimizer(optimizer, shapes, steps)
    start = state.create(
        init,
        built,
        mesh,
        jax.random.key(seed),
        rules=rules,
        fsdp_min_size=FSDP_MIN_SIZE,
        ema=step_options.get("ema_decay") is not None,
    )
    step_fn = step.make_train_step(loss_fn, built, shardings=state.shardings_of(start), **step_options)
    return start, step_fn, built


def host(tree):
    """A flat dict of NumPy arrays."""
    return {name: np.asarray(x) for name, x in sharding.named_leaves(jax.device_get(tree)).items()}


def evaluate(state, step):
    batch = batch_at(10_000)
    _, out = forward(state.params, jnp.asarray(batch["x"]))
    return {"val/error": float(jnp.mean((out - batch["y"]) ** 2))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--mesh", type=int, nargs=3, default=(-1, 1, 1))
    args = parser.parse_args()
    sharding.init_distributed()
    mesh = sharding.make_mesh(*args.mesh)
    start, step_fn, _ = make(mesh, args.steps)
    part = sharding.process_parts(mesh)
    try:
        finished = loop.train(
            start,
            step_fn,
            lambda first: batches(first, part, sleep=args.sleep),
            loop.LoopConfig(steps=args.steps, log_every=1, save_every=args.save_every),
            mesh,
            writer=writers.on_first_host(lambda: writers.JsonlWriter(args.workdir / "metrics.jsonl")),
            checkpointer=checkpoint.Checkpointer(args.workdir / "checkpoints"),
        )
    except preemption.Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    with jax.set_mesh(mesh):
        whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(finished.state)
    if jax.process_index() == 0:
        np.savez(args.workdir / "final.npz", **host(whole))


if __name__ == "__main__":
    main()
