"""The three small trees, prepared once for the tests of this folder; do not change them."""

import pytest

from clipdistill_jax.data.questions.prepare import prepare_questions
from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.tokenizer import open_tokenizer
from tests.data.questions.trees import SIZES, TEXTS, WRITERS


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """Format -> raw tree."""
    return {name: write(tmp_path_factory.mktemp(name) / "raw") for name, write in WRITERS.items()}


@pytest.fixture(scope="session")
def prepared(trees, tmp_path_factory):
    """Format -> prepared folder."""
    pytest.importorskip("tensorflow", reason="the pipeline runs on tf.data")
    folders = {}
    for name, tree in trees.items():
        folders[name] = tmp_path_factory.mktemp(name) / "prepared"
        options = {"min_count": 3} if name == "vqa" else {}
        prepare_questions(name, tree, folders[name], regions=tree / "regions", **SIZES, **options)
    return folders


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Tokenizer:
    return open_tokenizer("train:600", "bert", lambda: TEXTS, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Tokenizer:
    return open_tokenizer("train:900", "clip", lambda: TEXTS, tmp_path_factory.mktemp("clip"))
