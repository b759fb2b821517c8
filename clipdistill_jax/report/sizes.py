"""Parameters and FLOPs of a model."""

from typing import Any

import jax
import numpy as np

from clipdistill_jax.experiment import Config, example_batch
from clipdistill_jax.models.dual_encoder import DualEncoder


def count(tree: Any) -> int:
    """Elements of all leaves."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def flops(fn: Any, *args: Any) -> float:
    """FLOPs of a function as XLA counts them before optimisation: a multiply-add is two.

    Custom calls (a fused attention kernel, say) are not counted; the models here use none.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # not every backend can count
        analysis: Any = jax.jit(fn).lower(*args).cost_analysis()
    return float(analysis["flops"])


def model_sizes(module: DualEncoder, config: Config, stage: str) -> dict[str, Any]:
    """Parameters of each part, and forward FLOPs of one clip and of one caption, of a stage's model.

    The clip has the stage's number of frames at its size, the caption all of its tokens.
    """
    batch = example_batch(config, stage, size=1)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, method="complete"))

    def clip(variables: Any, frames: Any, frame_mask: Any) -> Any:
        seen: Any = module.apply(variables, frames, frame_mask, method="encode_video")
        return seen.video

    def caption(variables: Any, tokens: Any, token_mask: Any, word_ids: Any) -> Any:
        said: Any = module.apply(variables, tokens, token_mask, word_ids, method="encode_text")
        return said.text

    return {
        "parameters": {part: count(tree) for part, tree in variables["params"].items()},
        "total": count(variables["params"]),
        "flops_clip": flops(clip, variables, batch["frames"], batch["frame_mask"]),
        "flops_caption": flops(caption, variables, batch["tokens"], batch["token_mask"], batch["word_ids"]),
    }
