"""What a checkpoint says of itself, and whether it is whole.

Orbax writes a step into a temporary directory and renames it when every host is done. Just before the
rename the first host adds `manifest.json`: the arrays (path, shape, dtype), the files (path, bytes), and
whatever the run wants to be held to. So a step with a manifest whose files are all there is finished.
"""

import json
import logging
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
from etils import epath

NAME = "manifest.json"
FORMAT = 1
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
_VOLATILE = {"_CHECKPOINT_METADATA", "commit_success.txt", NAME}  # touched after the manifest is written


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message says which, why, and what to do."""


def step_name(step: int) -> str:
    """Directory name of a step."""
    return f"{step:08d}"


def compose(step: int, arrays: Mapping[str, Any], **said: Any) -> dict[str, Any]:
    """The manifest of a state, without its files: arrays is path -> (shape, dtype name)."""
    kind = jax.devices()[0].device_kind
    return {
        "format": FORMAT,
        "step": step,
        "arrays": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in arrays.items()},
        **said,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "devices": {"kind": kind, "count": jax.device_count(), "hosts": jax.process_count()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write(directory: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Adds the files that are in `directory` to the manifest and writes it there."""
    files = {name: (directory / name).stat().length for name in sorted(_files(directory))}
    (directory / NAME).write_text(json.dumps({**manifest, "files": files}, indent=1))


def _files(directory: epath.Path, prefix: str = "") -> list[str]:
    found = []
    for path in directory.iterdir():
        if path.is_dir():
            found += _files(path, f"{prefix}{path.name}/")
        elif path.name not in _VOLATILE:
            found.append(f"{prefix}{path.name}")
    return found


def read(directory: epath.Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint.

    Raises:
      CheckpointError: it is not there, was never finished, or lost files or parts of them.
    """
    if not directory.exists():
        unfinished = [p.name for p in unfinished_saves(directory.parent) if p.name.startswith(directory.name)]
        why = f"it was never finished (there is only {unfinished[0]})" if unfinished else "it does not exist"
        raise CheckpointError(_refusal(directory, why))
    try:
        manifest = json.loads((directory / NAME).read_text())
        files = manifest["files"]
    except FileNotFoundError:
        why = f"it has no {NAME}: a save or a copy was cut short"
        raise CheckpointError(_refusal(directory, why)) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(_refusal(directory, f"its {NAME} cannot be read ({error})")) from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(_refusal(directory, f"its format is {manifest.get('format')}, not {FORMAT}"))
    for name, size in files.items():
        if not (directory / name).exists():
            raise CheckpointError(_refusal(directory, f"the file {name} is missing"))
        found = (directory / name).stat().length
        if found != size:
            raise CheckpointError(_refusal(directory, f"the file {name} has {found} bytes instead of {size}"))
    return manifest


def _refusal(directory: epath.Path, why: str) -> str:
    return (
        f"checkpoint {directory} cannot be used: {why}. Delete or move it away and start again: "
        f"the run then resumes from the newest whole checkpoint in {directory.parent}"
    )


def unfinished_saves(root: epath.Path) -> list[epath.Path]:
    """Temporary directories that a save which was cut short left behind."""
    if not root.exists():
        return []
    return sorted(path for path in root.iterdir() if ".orbax-checkpoint-tmp" in path.name)


def whole_steps(root: epath.Path, warn: bool = False) -> list[int]:
    """Steps whose checkpoints are whole, ascending; `warn` names the others in the log."""
    whole = []
    for path in sorted(root.iterdir()) if root.exists() else []:
        if path.name.isdecimal() and path.is_dir():
            try:
                whole.append(int(read(path)["step"]))
            except CheckpointError as error:
                if warn:
                    logging.warning("passing over a checkpoint: %s", error)
    if warn:
        for path in unfinished_saves(root):
            logging.warning("passing over %s: that save was never finished", path)
    return sorted(whole)
