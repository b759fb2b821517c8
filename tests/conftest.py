"""Test-wide settings: eight forced CPU devices, run-time shape checks, a compilation cache."""

import gc
import logging
import os
import tempfile
from pathlib import Path

# The models are tiny, so that compiling is what takes time: a quarter less with XLA's plain emitters.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " ".join(
    ["", "--xla_force_host_platform_device_count=8", "--xla_cpu_use_fusion_emitters=false"]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import jaxtyping
import pytest

# Tracing makes so many small objects that looking for cycles at the usual rate is a fifth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# Every shape annotation of the package is checked at run time in the tests.
jaxtyping.install_import_hook("clipdistill_jax", "beartype.beartype")

# pytest keeps what is logged, and autograph's warnings hold the data iterators of a test in their tracebacks.
logging.getLogger("tensorflow").setLevel("ERROR")

jax.config.update(
    "jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "clipdistill_jax_test_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)

SAMPLES = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole commands, at the top, come first: none is left to one worker at the end."""
    items.sort(key=lambda item: len(item.path.parts))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of small real samples (photos, clips, vocabularies); tests skip where it is absent."""
    if not SAMPLES.is_dir():
        pytest.skip(f"no folder of real samples at {SAMPLES}")
    return SAMPLES
