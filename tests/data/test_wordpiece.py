"""WordPiece ids and word ids, against transformers' BERT tokenizers, and its words against CLIP's."""

import json
import shutil
import string

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.text import Tokenizer
from clipdistill_jax.data.tokenizer import load_tokenizer, open_tokenizer
from clipdistill_jax.data.wordpiece import SPECIAL, WordPiece, train_wordpiece
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
    "İstanbul ΣΑΣ ﬁne ½ ² ① b\u0327 हिन्दी",
    "[CLS] a [MASK] in a caption [SEP]",
    "",
]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
CASED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_letters, "'", ".", "!", "Hello", "##T"]
CASED += ["##" + letter for letter in string.ascii_lowercase]


@pytest.fixture(scope="module")
def bert_folder(shared_data, tmp_path_factory):
    """A folder with nothing but bert-base-uncased's vocab.txt."""
    folder = tmp_path_factory.mktemp("bert")
    shutil.copy(shared_data / "vocab" / "bert-base-uncased-vocab.txt", folder / "vocab.txt")
    return folder


@pytest.fixture(scope="module")
def bert(bert_folder):
    return load_tokenizer(bert_folder)


@pytest.fixture(scope="module")
def reference(bert_folder):
    return transformers.BertTokenizerFast(str(bert_folder / "vocab.txt"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return open_tokenizer("train:300", "bert", lambda: CAPTIONS * 3, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return open_tokenizer("train:600", "clip", lambda: CAPTIONS * 3, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def cased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cased")
    _write(folder, CASED)
    return load_tokenizer(folder)


def _write(folder, entries):
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")


def room(text: str) -> int:
    return 4 * len(text.encode()) + 8


def by_word(tokenizer: Tokenizer, text: str) -> dict[int, list[int]]:
    """The ids of each word that has any; checks that words follow each other and the ends belong to none."""
    found = tokenizer.encode([text], room(text))
    mask, words = found.token_mask[0], found.word_ids[0]
    ids, words = found.tokens[0][mask].tolist(), words[mask].tolist()
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eot_id)
    assert words[0] == words[-1] == -1 and not (found.word_ids[0][~mask] != -1).any()
    assert words[1:-1] == sorted(words[1:-1])
    assert tokenizer.bos_id not in ids[1:-1] and tokenizer.eot_id not in ids[1:-1]
    made: dict[int, list[int]] = {}
    for token, word in zip(ids[1:-1], words[1:-1], strict=True):
        made.setdefault(word, []).append(token)
    return made


def test_known_ids(bert):
    """ids of bert-base-uncased: [CLS] 101, hello 7592, world 2088, ! 999, [SEP] 102."""
    assert isinstance(bert, WordPiece) and not bert.cased
    assert bert.vocab_size == 30522
    found = bert.encode(["Hello world!", ""], 6)
    assert found.tokens.tolist() == [[101, 7592, 2088, 999, 102, 0], [101, 102, 0, 0, 0, 0]]
    assert found.token_mask.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]
    assert found.word_ids.tolist() == [[-1, 0, 1, 2, -1, -1], [-1] * 6]
    assert found.tokens.dtype == found.word_ids.dtype == np.int32


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("İstanbul!")
@example("a\u0301\u0327b ﬁ 2² ½ 1999")
@example("''s 's't '' re 've don't!!?")
@example("\u200b\u00a0\u3000x\x00y\x1c")
@example("[CLS] [UNK] [SEP] [PAD]")
@example("हिन्दी 猫が走る 🙂🙂")
def test_same_ids_and_word_ids_as_transformers_for_the_words(bert, reference, text):
    words = split_words([text])[0]
    if any(word.upper() in SPECIAL for word in words):
        return  # theirs takes these as the special ids
    theirs = reference(words, is_split_into_words=True)
    found = bert.encode([text], room(text))
    mask = found.token_mask[0]
    assert found.tokens[0][mask].tolist() == theirs["input_ids"]
    assert found.word_ids[0][mask].tolist() == [-1 if k is None else k for k in theirs.word_ids()]


def test_same_ids_as_the_python_tokenizer_for_whole_texts(bert, bert_folder):
    """Google's own algorithm, which knows nothing of words: without digits, the ids are the same.

    Nor may a quotation begin as a clitic does: of 'dance, CLIP's tokenizer makes 'd and ance.
    """
    letters = string.ascii_letters + string.punctuation.replace("'", "") + " éßÉñ猫\n"
    slow = transformers.BertTokenizer(str(bert_folder / "vocab.txt"))

    @settings(max_examples=150, deadline=None)
    @given(st.text(letters, max_size=30))
    @example("It's the man's café, they'll say 'hello' and don't stop!!")
    def check(text):
        assume(not any(token in text for token in SPECIAL))
        found = bert.encode([text], room(text))
        assert found.tokens[0][found.token_mask[0]].tolist() == slow(text)["input_ids"]

    check()


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("a\u0301\u0327b ﬁ 2² ½ 1999")
@example("don't 2nd [MASK] 12:30pm\u200b!!")
@example(CAPTIONS[8])
@example(" ".join(CAPTIONS) * 40)
def test_word_i_is_the_same_word_in_both_tokenizers(clip, small, text):
    """Whatever the words alone give is what they give in the text, under the same number, in either."""
    (words,) = split_words([text])
    for tokenizer, empty in ((clip, False), (small, True)):
        alone = [by_word(tokenizer, word) for word in dict.fromkeys(words)]
        assert all(set(made) <= {0} for made in alone)  # a word is one word
        ids = dict(zip(dict.fromkeys(words), (made.get(0, []) for made in alone), strict=True))
        assert by_word(tokenizer, text) == {k: ids[word] for k, word in enumerate(words) if ids[word]}
        assert empty or all(ids.values())


def test_pieces_spell_the_words(small):
    """Of captions that it learned from, no character is lost."""
    for text in CAPTIONS[:4]:
        (words,) = split_words([text])
        made = by_word(small, text)
        spelt = ["".join(small.backend.id_to_token(i).removeprefix("##") for i in made[k]) for k in made]
        plain = str.maketrans("äöüéèïû", "aoueeiu")
        assert spelt == [word.translate(plain) for word in words]


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
@example("İSTANBUL DON'T cafe\u0301 STOP!! ẞ ǅ")
@example("A\u0327\u0301B\u3000 \tΣΑΣ")
def test_words_as_written_are_the_same_words(text):
    (lower,), (written,) = split_words([text]), split_words([text], keep_case=True)
    assert [split_words([word]) for word in written] == [split_words([word]) for word in lower]
    assert len(written) == len(lower)


def test_case_is_kept_where_the_vocabulary_has_it(cased, tmp_path):
    assert cased.cased
    assert split_words(["DON'T Stop, İs"], keep_case=True) == [["DON", "'T", "Stop", ",", "i", "̇", "s"]]
    ids = {token: k for k, token in enumerate(CASED)}
    made = by_word(cased, "Hello hello T's")
    assert made == {
        0: [ids["Hello"]],
        1: [ids[token] for token in ("h", "##e", "##l", "##l", "##o")],
        2: [ids["T"]],
        3: [ids["'"], ids["s"]],
    }
    # The settings' word counts more than what the vocabulary looks like.
    _write(tmp_path, CASED)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert not load_tokenizer(tmp_path).cased


def test_folders_of_transformers(bert, bert_folder, reference, tmp_path):
    """tokenizer.json alone, as newer folders have it, and both with the settings."""
    reference.save_pretrained(tmp_path / "fast")
    transformers.BertTokenizer(str(bert_folder / "vocab.txt"), do_lower_case=False).save_pretrained(
        tmp_path / "cased"
    )
    (tmp_path / "fast" / "vocab.txt").unlink()
    again = load_tokenizer(tmp_path / "fast")
    assert isinstance(again, WordPiece)
    assert again.encode(CAPTIONS, 400).tokens.tolist() == bert.encode(CAPTIONS, 400).tokens.tolist()
    assert load_tokenizer(tmp_path / "cased").cased


def test_a_trained_folder_loads_in_transformers(tmp_path):
    train_wordpiece(CAPTIONS * 3, 250, tmp_path / "made")
    tokenizer = load_tokenizer(tmp_path / "made")
    assert tokenizer.vocab_size == 250
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    found = tokenizer.encode(CAPTIONS[:-2], 400)
    for load in (transformers.BertTokenizerFast, transformers.AutoTokenizer):
        theirs = load.from_pretrained(tmp_path / "made")
        for k, words in enumerate(split_words(CAPTIONS[:-2])):
            ids = theirs(words, is_split_into_words=True)["input_ids"]
            assert found.tokens[k][found.token_mask[k]].tolist() == ids
        assert theirs.model_max_length == 512 and theirs.mask_token_id == 4
    # The same from vocab.txt alone.
    (tmp_path / "made" / "tokenizer.json").unlink()
    again = load_tokenizer(tmp_path / "made")
    assert again.encode(CAPTIONS, 400).tokens.tolist() == tokenizer.encode(CAPTIONS, 400).tokens.tolist()


def test_training_is_repeatable_and_learns_frequent_words(tmp_path):
    captions = ["the red circle moves left"] * 9 + ["the blue square spins"] * 7
    train_wordpiece(captions, 80, tmp_path / "a")
    train_wordpiece(captions, 80, tmp_path / "b")
    assert (tmp_path / "a" / "vocab.txt").read_bytes() == (tmp_path / "b" / "vocab.txt").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.encode(["the circle"], 8).token_mask.sum() == 4  # a token a word
    with pytest.raises(ValueError, match="size=20: needs at least"):
        train_wordpiece(captions, 20, tmp_path / "c")


def test_truncation_keeps_the_end(bert):
    found = bert.encode(["guitar, " * 500, "guitar"], 77)
    assert found.token_mask[0].all() and found.token_mask[1].sum() == 3
    assert found.tokens[0][0] == bert.bos_id and found.tokens[0][-1] == bert.eot_id
    assert found.word_ids[0].tolist() == [-1, *range(75), -1]
    assert found.tokens[0][1] == found.tokens[0][3] == found.tokens[1][1]
    with pytest.raises(ValueError, match="max_tokens=2"):
        bert.encode(["a"], 2)


@pytest.mark.parametrize(
    "entries, message",
    [
        (["[UNK]", "[CLS]", "[SEP]", "a", "a"], "vocab.txt: the entry 'a' is there twice"),
        (["[CLS]", "[SEP]", "a"], r"vocab.txt has no \[UNK\]"),
        (["[UNK]", "[CLS]", "a"], r"nor BERT's \(it has no \[CLS\] or no \[SEP\]\)"),
    ],
)
def test_vocabularies_that_are_not_berts(tmp_path, entries, message):
    _write(tmp_path, entries)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@example("İstanbul don't 2nd-hand x\u0302!")
def test_words_one_by_one(small, clip, cased, text):
    """`encode` puts together what `encode_words` gives for the words."""
    for tokenizer in (small, clip, cased):
        (words,) = split_words([text], keep_case=True)
        whole = by_word(tokenizer, text)
        apart = tokenizer.encode_words(words)
        assert {i: ids for i, ids in enumerate(apart) if ids} == whole
    assert small.encode_words([]) == []
