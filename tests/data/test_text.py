"""Tokens and word ids, against transformers' CLIP tokenizers on CLIP's own vocabulary."""

import functools
import gzip
import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.bpe import BOS, EOT, train_clip_bpe
from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.tokenizer import load_tokenizer, open_tokenizer
from clipdistill_jax.data.words import split_words

transformers = pytest.importorskip("transformers", reason="transformers gives the reference tokenizers")

CAPTIONS = [
    "A red ball rolls left, then right.",
    "the man doesn't play 2nd guitar!!",
    "  two\tchildren\n run   ",
    "Ein großer Hund läuft über die Straße",
    "猫が走る 123",
    "naïve café - crème brûlée…",
    "🙂🙂 emoji 👨‍👩‍👧 family",
    "it's we're I'll you've he'd I'm don't 'tis o'clock",
    "x" * 300,
    "İstanbul ΣΑΣ ﬁne ½ ² ①",
]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


def write_clip_vocabulary(merges_file: Path, folder: Path) -> Path:
    """vocab.json and merges.txt from OpenAI's file, laid out as openai/CLIP clip/simple_tokenizer.py does."""
    with gzip.open(merges_file, "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + k) for k in range(256 - len(plain))]
    vocab = [*letters, *(v + "</w>" for v in letters), *(m.replace(" ", "") for m in merges), BOS, EOT]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({v: k for k, v in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def clip_folder(shared_data, tmp_path_factory):
    merges = shared_data / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
    return write_clip_vocabulary(merges, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load_tokenizer(clip_folder)


@pytest.fixture(scope="module")
def reference(clip_folder):
    return transformers.CLIPTokenizerFast.from_pretrained(clip_folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return open_tokenizer("train:700", "clip", lambda: CAPTIONS * 3, tmp_path_factory.mktemp("small"))


def ids_of(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    return [row[m].tolist() for row, m in zip(tokens, mask, strict=True)]


def check_words(tokenizer: Tokenizer, text: str) -> None:
    """Encoding the words one by one gives the ids of the whole text; word_ids says which came from which."""
    (words,) = split_words([text])
    length = 4 * len(text.encode()) + 8
    whole = tokenizer.encode([text], length)
    each = tokenizer.encode(words, length)
    expected_ids, expected_words = [tokenizer.bos_id], [-1]
    for k, row in enumerate(ids_of(each.tokens, each.token_mask)):
        expected_ids += row[1:-1]
        expected_words += [k] * len(row[1:-1])
        assert len(row) > 2, f"the word {words[k]!r} has no token"
    mask = whole.token_mask[0]
    assert whole.tokens[0][mask].tolist() == [*expected_ids, tokenizer.eot_id]
    assert whole.word_ids[0][mask].tolist() == [*expected_words, -1]


def test_known_ids(clip):
    """ids that openai/CLIP's README and tests give: "hello world!" and the empty text."""
    found = clip.encode(["hello world!", ""], 6)
    assert found.tokens.tolist() == [[49406, 3306, 1002, 256, 49407, 0], [49406, 49407, 0, 0, 0, 0]]
    assert found.token_mask.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]
    assert found.word_ids.tolist() == [[-1, 0, 1, 2, -1, -1], [-1] * 6]
    assert found.tokens.dtype == found.word_ids.dtype == np.int32
    assert clip.vocab_size == 49408


def test_same_ids_as_transformers(clip, reference):
    found = clip.encode(CAPTIONS, 400)
    assert ids_of(found.tokens, found.token_mask) == reference(CAPTIONS)["input_ids"]


def test_same_ids_as_the_python_tokenizer(clip, clip_folder):
    """The slow tokenizer is OpenAI's own algorithm; without ftfy it treats CJK otherwise: Latin text here."""
    slow = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    letters = string.ascii_letters + string.digits + string.punctuation + " éßÉñ\n"

    @settings(max_examples=150, deadline=None)
    @given(st.text(letters, max_size=30))
    def check(text):
        assume(BOS not in text.lower() and EOT not in text.lower())  # theirs takes these as the special ids
        found = clip.encode([text], 200)
        assert ids_of(found.tokens, found.token_mask)[0] == slow(text)["input_ids"]

    check()


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("İstanbul!")
@example("a\u0301\u0327b ﬁ 2² ½")
@example("''s 's't '' re 've")
@example("\u200b\u00a0\u3000x\x00y\x1c")
@example(f"stop {EOT} here {BOS}")
def test_words_one_by_one_give_the_ids_of_the_text(clip, reference, text):
    check_words(clip, text)
    if BOS not in text.lower() and EOT not in text.lower():  # theirs takes these as the special ids
        found = clip.encode([text], 4 * len(text.encode()) + 8)
        assert ids_of(found.tokens, found.token_mask)[0] == reference(text)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(f"stop {EOT} here")
def test_trained_tokenizer_knows_every_text(small, text):
    check_words(small, text)
    (words,) = split_words([text])
    found = small.encode([text], 4 * len(text.encode()) + 8)
    inner = ids_of(found.tokens, found.token_mask)[0][1:-1]
    assert small.bos_id not in inner and small.eot_id not in inner
    # Nothing is lost: the bytes come back, each word followed by the mark of its end.
    pieces = "".join(small.backend.id_to_token(i) for i in inner)
    table = {letter: byte for byte, letter in zip_bytes()}
    decoded = [bytes(table[c] for c in word).decode() for word in pieces.split("</w>")[:-1]]
    assert decoded == words


@functools.cache
def zip_bytes() -> list[tuple[int, str]]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [*((b, chr(b)) for b in plain), *((b, chr(256 + k)) for k, b in enumerate(rest))]


def test_trained_folder_loads_in_transformers(tmp_path):
    train_clip_bpe(CAPTIONS * 3, 640, tmp_path / "bpe", max_length=40)
    tokenizer = load_tokenizer(tmp_path / "bpe")
    assert tokenizer.vocab_size == 640
    assert (tokenizer.bos_id, tokenizer.eot_id) == (638, 639)
    for load in (transformers.CLIPTokenizerFast, transformers.AutoTokenizer):
        theirs = load.from_pretrained(tmp_path / "bpe")
        found = tokenizer.encode(CAPTIONS, 400)
        assert ids_of(found.tokens, found.token_mask) == theirs(CAPTIONS)["input_ids"]
        assert theirs.model_max_length == 40
    # The same from vocab.json and merges.txt alone, as older folders have it.
    (tmp_path / "bpe" / "tokenizer.json").unlink()
    again = load_tokenizer(tmp_path / "bpe")
    assert again.encode(CAPTIONS, 400).tokens.tolist() == found.tokens.tolist()


def test_training_is_repeatable_and_learns_frequent_words(tmp_path):
    captions = ["the red circle moves left"] * 9 + ["the blue square spins"] * 7
    train_clip_bpe(captions, 600, tmp_path / "a")
    train_clip_bpe(captions, 600, tmp_path / "b")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.encode(["the circle"], 8).token_mask.sum() == 4  # a token a word
    assert tokenizer.vocab_size <= 600
    with pytest.raises(ValueError, match="vocab_size=500.*514"):
        train_clip_bpe(captions, 500, tmp_path / "c")


def test_truncation_keeps_eot(clip):
    long = "guitar " * 500
    found = clip.encode([long, "guitar"], 32)
    (row, short), mask = found.tokens, found.token_mask
    assert mask[0].all() and mask[1].sum() == 3
    assert row[0] == clip.bos_id and row[-1] == clip.eot_id
    assert (row[1:-1] == short[1]).all()
    assert found.word_ids[0].tolist() == [-1, *range(30), -1]
    whole = clip.encode(["three words exactly"], 5)
    assert whole.tokens[0][-1] == clip.eot_id and whole.token_mask.all()
    # The last True of the mask is EOT in every row, which is where the text tower looks.
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    assert (found.tokens[np.arange(2), last] == clip.eot_id).all()
    with pytest.raises(ValueError, match="max_tokens=2"):
        clip.encode(["a"], 2)
    with pytest.raises(ValueError, match="list of texts"):
        clip.encode("a caption", 8)


def test_more_texts_than_a_chunk(small):
    texts = [f"number {k}" for k in range(9000)]
    found = small.encode(texts, 12)
    for k in (0, 8191, 8192, 8999):
        assert found.tokens[k].tolist() == small.encode([texts[k]], 12).tokens[0].tolist()
    assert small.encode([], 12).tokens.shape == (0, 12)


def test_special_words_in_a_caption_are_text(clip):
    found = clip.encode([f"stop {EOT} here"], 20)
    row = found.tokens[0][found.token_mask[0]]
    assert (row == clip.eot_id).sum() == 1 and row[-1] == clip.eot_id


def test_folders_that_are_no_clip_tokenizer(tmp_path, small):
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load_tokenizer("./no-such-folder")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
    backend = type(small.backend).from_str(small.backend.to_str())
    backend.pre_tokenizer = __import__("tokenizers").pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not a CLIP tokenizer"):
        load_tokenizer(tmp_path)
    bert = {"version": "1.0", "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0}}}
    bert["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    (tmp_path / "tokenizer.json").write_text(json.dumps(bert))
    with pytest.raises(ValueError, match=r"no <\|startoftext\|>"):
        load_tokenizer(tmp_path)


def test_broken_merges_file(tmp_path, small):
    (tmp_path / "vocab.json").write_text(json.dumps(small.backend.get_vocab()))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nthree parts here\n")
    with pytest.raises(ValueError, match=r"merges\.txt, line 3"):
        load_tokenizer(tmp_path)
