"""What a run writes of itself before it starts."""

import difflib
import json
import logging
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

PACKAGES = ("clipdistill_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def run_folder(workdir: Any, config: Mapping[str, Any], command: list[str] | None = None) -> pathlib.Path:
    """Makes the run's folder and writes down how the run was started. Only process 0 writes.

    `config.json` is the resolved config of the last start. `launches.jsonl` gets a line for every start:
    time, command line, config, package versions, devices. A start with another config than the last
    one's is logged with what changed.

    Args:
      workdir: the folder; made when missing.
      config: json-able, every field resolved.
      command: None takes this process's own.
    """
    folder = pathlib.Path(workdir).expanduser().resolve()
    if jax.process_index() != 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    file = folder / "config.json"
    if file.exists() and file.read_text() != text:
        last, now = file.read_text().splitlines(), text.splitlines()
        changes = difflib.unified_diff(last, now, "last", "now", n=0, lineterm="")
        logging.warning("the config differs from the last start in %s:\n%s", folder, "\n".join(changes))
    file.write_text(text)
    launch = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(command or sys.orig_argv),
        "config": json.loads(text),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "local": jax.local_device_count(),
            "hosts": jax.process_count(),
        },
    }
    with (folder / "launches.jsonl").open("a") as out:
        out.write(json.dumps(launch) + "\n")
    return folder


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
