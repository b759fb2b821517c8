"""The README.md of an exported model: what it is, how good it is, how it is used."""

from collections.abc import Mapping
from typing import Any

import jax

from clipdistill_jax.experiment import Config, plain, stage_config

_CARD = """---
library_name: clipdistill_jax
tags: [video-text-retrieval, clip, jax, stablehlo]
---

# {title}

A {vision} video tower with a {text} text tower{taught}: stage `{stage}`, step {step}, fingerprint
`{fingerprint}`. {parameters:,} parameters; {gflops:.3g} GFLOPs a clip of {num_frames} frames.

It takes clips of at most {num_frames} frames, chosen evenly from {fps:g} a second: centre squares of
{image_size} x {image_size} pixels, uint8 RGB. It takes texts of at most {max_tokens} tokens and cuts longer
ones. It gives vectors of length 1 and width {embed_dim}; their product is the cosine that ranks clips for a
text.

## Test split

Recalls in percent, MdR and MnR the median and mean rank; t2v is text to video, v2t video to text.{rounding}

| metric | value |
|---|---|
{metrics}

## Use

```
python -m clipdistill_jax.search index THIS_FOLDER VIDEOS --out=INDEX
python -m clipdistill_jax.search query INDEX "a red circle moves left"
```

```python
from clipdistill_jax.export import load_exported

model = load_exported("THIS_FOLDER")
text = model.encode_sentences(["a red circle moves left"])  # [1, {embed_dim}]
video = model.encode_video(frames, frame_mask)  # uint8 [B, {num_frames}, {image_size}, {image_size}, 3], bool
```

With JAX, flatbuffers and safetensors alone:

```python
import jax, jax.export, safetensors.numpy

weights = safetensors.numpy.load_file("model.safetensors")
encode_text = jax.export.deserialize(bytearray(open("encode_text.stablehlo", "rb").read()))
text = encode_text.call(weights, tokens, token_mask, word_ids)  # int32, bool and int32 [B, {max_tokens}]
```

The StableHLO files were written by JAX {jax}, and JAX promises to read them for six months;
model.safetensors lasts.

The licence of the weights is that of the weights and the data they were trained from.
"""


def model_card(config: Config, described: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The card in Markdown.

    Args:
      config: of the run.
      described: contents of config.json of the exported folder.
      result: result.json of the stage.
    """
    stage, model = stage_config(config, result["stage"]), described["model"]
    trained = plain(config[stage["model"]]).get("dtype", "float32")
    rounding = f"\nThey were measured in {trained}; this folder computes in {model['dtype']}."
    return _CARD.format(
        **described["video"],
        **described["text"],
        **{name: described[name] for name in ("stage", "step", "fingerprint", "embed_dim")},
        title=stage["title"] or result["stage"],
        vision=model["kind"],
        text=model["text"]["kind"],
        taught=f", distilled from the stage `{stage['teacher']}`" if stage["teacher"] else "",
        parameters=result["sizes"]["total"],
        gflops=result["sizes"]["flops_clip"] / 1e9,
        rounding=rounding if trained != model["dtype"] else "",
        metrics="\n".join(f"| {name} | {value:.2f} |" for name, value in result["test"].items()),
        jax=jax.__version__,
    )
