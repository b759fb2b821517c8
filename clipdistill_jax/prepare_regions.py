"""Computes region features of a dataset's images, for students that read UNITER's npz files.

    python -m clipdistill_jax.prepare regions --format=vcr --source=DIR --out=DIR \\
      --tower=openai/clip-vit-base-patch16 --image_size=448 --boxes=boxes.json

The tower is a CLIP (Hugging Face directory or hub id, OpenAI's .pt), of which the patch grid is pooled within
each box, or a ResNet (torchvision's or timm's file, directory or hub id), of which a map is. A stopped
command goes on when it is repeated.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipdistill_jax import commands
from clipdistill_jax.convert import files, hf_clip, openai_clip, resnet
from clipdistill_jax.data.prepared import is_prepared, locked
from clipdistill_jax.data.regions.box_file import read_classes
from clipdistill_jax.data.regions.boxes import FORMATS, METADATA, SPLITS, plan_boxes
from clipdistill_jax.data.regions.extract import MANIFEST, extract_regions
from clipdistill_jax.models.regions import LEVELS, RegionTower, clip_tower, resnet_tower

_RESNET_SIZE = 800  # 25 cells a side


def load_tower(
    source: str,
    *,
    image_size: int | None = None,
    project: bool = False,
    level: str | None = None,
    dtype: str = "float32",
) -> RegionTower:
    """The tower that a weights source holds.

    Args:
      source: of a CLIP or a ResNet, see the module.
      image_size: pixels a side of the square that images are fitted into; a CLIP's position table is
        interpolated to it. None: what the CLIP was trained on, or 800.
      project: CLIP only, see `clip_tower`.
      level: ResNet only, see `resnet_tower`; None is "c5".
      dtype: compute dtype.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is neither, its tensors do not fit, or an option is of the other kind.
    """
    path = Path(source).expanduser()
    config: dict[str, Any] = {}
    if not path.is_file():
        path = files.resolve(source)
        described = path / "config.json"
        config = json.loads(described.read_text()) if described.is_file() else {}
    if config.get("model_type") == "clip":
        vision, _, params = hf_clip.load(path)
    else:
        weights = files.read_weights(path)
        if "layer1.0.conv1.weight" in weights:
            if project:
                raise ValueError(f"{source}: a ResNet has no projection; leave --project out")
            pixels = config.get("pretrained_cfg", {})  # timm's
            fields = {name: tuple(pixels[name]) for name in ("mean", "std") if name in pixels}
            model, variables = resnet.from_state_dict(weights, source, dtype=jnp.dtype(dtype), **fields)
            return resnet_tower(model, variables, image_size=image_size or _RESNET_SIZE, level=level or "c5")
        if "visual.conv1.weight" not in weights:
            raise ValueError(
                f"{source}: neither a CLIP with a vision transformer nor a ResNet of torchvision or timm; it "
                f"has {', '.join(list(weights)[:3])} ..."
            )
        vision, _, params = openai_clip.from_state_dict(weights, source)
    if level is not None:
        raise ValueError(f"{source}: a CLIP has no levels; leave --level out")
    if image_size is not None:
        vision, params = hf_clip.at_image_size(vision, params, image_size)
    return clip_tower(vision, params["vision"], project=project, dtype=jnp.dtype(dtype))


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clipdistill_jax.prepare regions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="how the raw tree is laid out")
    parser.add_argument("--source", required=True, help="the raw tree")
    parser.add_argument("--out", required=True, type=Path, help="folder of the npz files")
    parser.add_argument("--tower", required=True, help="weights of a CLIP or a ResNet")
    parser.add_argument(
        "--boxes",
        required=True,
        help="detections: a JSON file {image name: [[x1, y1, x2, y2, confidence, class], ...]}; grid:N for "
        "N x N tiles; 'metadata' for none: VCR's annotated boxes alone, which VCR gets in any case",
    )
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--splits", default=",".join(SPLITS), help="default all: %(default)s")
    parser.add_argument("--image_size", type=int, help="pixels a side; default the CLIP's own, ResNet 800")
    parser.add_argument("--project", action="store_true", help="CLIP: through the projection to its texts")
    parser.add_argument("--level", choices=LEVELS, help="ResNet: which map; default c5")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="to compute in")
    parser.add_argument("--batch_size", type=int, default=16, help="images computed at a time")
    parser.add_argument("--workers", type=int, default=4, help="threads that decode images")
    parser.add_argument("--max_unreadable", type=float, default=0.05, help="fraction of the images")
    parser.add_argument("--allow_missing", action="store_true", help="leave out images that are missing")
    args = parser.parse_args(argv)
    return commands.run(lambda: _prepare(args))


def _prepare(args: argparse.Namespace) -> str:
    for name in ("batch_size", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} should be at least 1")
    if not 0 <= args.max_unreadable <= 1:
        raise ValueError(f"--max_unreadable={args.max_unreadable} must be a fraction, 0 to 1")
    if is_prepared(args.out):
        raise ValueError(f"{args.out} holds a prepared dataset: give another folder")
    classes = read_classes(args.classes) if args.classes else ()
    splits = tuple(args.splits.split(","))
    plan = plan_boxes(
        args.format, args.source, args.boxes, classes=classes, splits=splits, allow_missing=args.allow_missing
    )
    tower = load_tower(
        args.tower, image_size=args.image_size, project=args.project, level=args.level, dtype=args.dtype
    )
    options = {
        "format": args.format,
        "boxes": _box_source(args.boxes),
        "classes": list(classes),
        "tower": _fingerprint(tower.variables),
        "image_size": tower.image_size,
        "project": args.project,
        "level": args.level,
        "dtype": args.dtype,
    }
    with locked(args.out):
        manifest = extract_regions(
            plan,
            tower,
            args.out,
            options,
            num_classes=len(classes),
            batch_size=args.batch_size,
            workers=args.workers,
            max_unreadable=args.max_unreadable,
        )
    counts = "{files} files of {images} images, {written} of them written now".format(**manifest)
    lines = [f"{args.out}: {counts}"]
    lines += [f"  {count} x {kind} (listed in {MANIFEST})" for kind, count in manifest["counts"].items()]
    lines += [f"    {p['file']}, {p['record']}: {p['reason']}" for p in manifest["skipped"][:10]]
    return "\n".join(lines)


def _box_source(boxes: str) -> str:
    if boxes == METADATA or boxes.startswith("grid:"):
        return boxes
    with open(boxes, "rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _fingerprint(variables: Any) -> str:
    """Of the weights, wherever they lie."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_flatten_with_path(variables)[0]:
        digest.update(f"{jax.tree_util.keystr(path)} {np.shape(value)}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return f"sha256 {digest.hexdigest()}"
