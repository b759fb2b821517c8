"""A small MSR-VTT tree, written and prepared once for the tests of this folder."""

from pathlib import Path

import pytest

from clipdistill_jax.data.video import VideoOptions
from clipdistill_jax.prepare import prepare_dataset
from tests.data.msrvtt_tree import write_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """6 train, 2 validation and 3 test clips of 3 to 8 seconds; do not change it."""
    return write_tree(tmp_path_factory.mktemp("msrvtt") / "tree", test=3)


@pytest.fixture(scope="session")
def prepared(tree, tmp_path_factory) -> Path:
    """`tree` prepared at 48 pixels (stored 64 x 48); do not change it."""
    out = tmp_path_factory.mktemp("msrvtt") / "prepared"
    prepare_dataset("msrvtt", tree, out, video=VideoOptions(size=48, quality=95), workers=2, progress=False)
    return out
