"""The launchers parse, and name only what the project has."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SHELL = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_parse(name):
    done = subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_what_launchers_name_is_there():
    texts = {name: (LAUNCH / name).read_text() for name in SHELL}
    cells = json.loads((LAUNCH / "colab.ipynb").read_text())["cells"]
    texts["colab.ipynb"] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    modules = {m for text in texts.values() for m in re.findall(r"python -m (clipdistill_jax[\w.]*)", text)}
    assert {"clipdistill_jax.main", "clipdistill_jax.export", "clipdistill_jax.search"} <= modules
    assert all(importlib.util.find_spec(module) for module in modules)
    files = {f for text in texts.values() for f in re.findall(r"(?:configs|launch)/[\w/.]+\.\w+", text)}
    assert len(files) > 3 and all((ROOT / file).is_file() for file in files), files


def test_the_pod_launcher_asks_for_the_slice():
    done = subprocess.run(
        ["bash", str(LAUNCH / "tpu_pod.sh")], capture_output=True, text=True, env={"PATH": "/bin:/usr/bin"}
    )
    assert done.returncode and "name the slice" in done.stderr
