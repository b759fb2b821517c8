"""The folder of a finished stage with random weights: no training, no compiling."""

import json

import flax.traverse_util
import jax
import numpy as np

from clipdistill_jax.convert import dual_encoder
from clipdistill_jax.data.tokenizer import open_tokenizer
from clipdistill_jax.distill.teacher import fingerprint
from clipdistill_jax.experiment import plain, stage_module
from clipdistill_jax.train.checkpoint import Checkpointer

SAID = ["a red circle moves left", "a blue square grows", "a green triangle stays still"]


def random_variables(module, frames, side, tokens, seed=0):
    """{"params", "batch_stats"} of a module in which every array matters: gains near 1, variances above 0."""
    rng = np.random.default_rng(seed)
    shapes = {"video": {"num_frames": frames, "image_size": side}, "text": {"max_tokens": tokens}}

    def fill(name, x):
        drawn = rng.normal(size=x.shape).astype(np.float32)
        leaf = name.split(".")[-1]
        if leaf in ("scale", "var"):
            return np.asarray(1 + 0.3 * np.tanh(drawn), np.float32)
        if leaf == "logit_scale":
            return np.float32(2.5)
        fan = np.prod(x.shape[:-1]) if leaf == "kernel" else 4
        return np.asarray(drawn / np.sqrt(fan), np.float32)

    made = {name: fill(name, x) for name, x in dual_encoder.weight_shapes(module, shapes).items()}
    return flax.traverse_util.unflatten_dict(made, sep=".")


def write_stage(workdir, config, name):
    """workdir/NAME as a run leaves it. Returns (module, variables)."""
    config = plain(config)
    data, stage = config["data"], config["stages"][name]
    tokenizer = open_tokenizer(data["tokenizer"], "clip", lambda: SAID, workdir / "tokenizer")
    module = stage_module(config, name, {stage["model"]: tokenizer.vocab_size})
    variables = random_variables(
        module, stage["num_frames"] or data["num_frames"], data["image_size"], data["max_tokens"]
    )
    folder = workdir / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {"params": {"student": variables["params"], "terms": {"spatial": {"kernel": np.ones((4, 4))}}}}
    if "batch_stats" in variables:
        state["model_state"] = {"batch_stats": variables["batch_stats"]}
    checkpointer = Checkpointer(folder / "checkpoints")
    checkpointer.save(3, jax.device_put(state))
    checkpointer.close()
    result = {
        "stage": name,
        "step": 3,
        "fingerprint": fingerprint(variables),
        "test": {"t2v_R@1": 12.5, "t2v_MdR": 4.0},
        "sizes": {"parameters": {"vision": 1000}, "total": 1000, "flops_clip": 1.5e6, "flops_caption": 1e5},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return module, variables
