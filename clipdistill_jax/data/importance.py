"""How much each word matters in its text (CLIP-TD's S_si), by YAKE: computed once, and stored.

YAKE (Campos et al. 2020) scores n-grams of a text by statistics of the text alone, the lower the more
important. Scores are made in worker processes that import this file; it imports no TensorFlow.
"""

import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Int64

from clipdistill_jax.data.progress import progress_bar
from clipdistill_jax.data.words import split_words
from clipdistill_jax.data.workers import end_with_parent

NGRAM = 3  # YAKE's default; longer ones, with two stop words in a row, can have negative scores
_CHUNK = 512  # texts that a worker takes at once
_NO_LIMIT = 1 << 30


def spread_over_words(words: Sequence[str], keywords: Iterable[tuple[str, float]]) -> list[float]:
    """Importance of each word from YAKE's keywords of the text: shares that sum to 1, or all 0.

    A keyword's importance is 1 / score, for YAKE's scores have no unit, and the shares do not depend on it.
    Each of its occurrences divides it equally among its words; a word gets the sum over all keywords that it
    is part of. Words that are no keyword by themselves, nor part of a single hyphenated one, get 0: stop
    words, numbers and punctuation.

    Args:
      words: of the text, as `split_words` gives them.
      keywords: n-grams, lower-cased, with YAKE's scores.
    """
    # YAKE drops punctuation and clitics ("'s") from n-grams; case folding, as "Σ" has two lower cases.
    places = [i for i, word in enumerate(words) if _is_spoken(word)]
    said = [words[i].casefold() for i in places]
    found = []
    for keyword, score in keywords:
        parts = [word.casefold() for word in split_words([keyword])[0] if _is_spoken(word)]
        starts = [k for k in range(len(said) - len(parts) + 1) if said[k : k + len(parts)] == parts]
        if parts:
            found.append((" " not in keyword, score, [places[k : k + len(parts)] for k in starts]))
    content = {i for single, _, where in found if single for run in where for i in run}
    scores = [0.0] * len(words)
    for _, score, where in found:
        for run in where:
            share = [i for i in run if i in content]
            for i in share:
                scores[i] += 1 / (score * len(share))
    total = sum(scores)
    return [value / total for value in scores] if total else scores


def _is_spoken(word: str) -> bool:
    return not word.startswith("'") and any(letter.isalnum() for letter in word)


def word_importance(
    texts: Sequence[str], *, workers: int = 1, progress: bool = False
) -> list[Float32[np.ndarray, " _"]]:
    """Importance of every word of every text: for each text as many shares as `split_words` gives words.

    A pure function of each text, of English: YAKE's English stop words, n-grams of up to 3 words, no removal
    of similar ones. About a millisecond a text and core; a text that comes again is not computed again.

    Args:
      texts: as they are given to the teacher.
      workers: processes; 1 computes in this one.
      progress: show a progress bar.
    """
    unique = list(dict.fromkeys(texts))
    scores: dict[str, np.ndarray] = {}
    with progress_bar("scoring words", len(unique), show=progress) as advance:
        for text, values in zip(unique, _score_all(unique, workers), strict=True):
            scores[text] = np.array(values, np.float32)
            advance(0)
    return [scores[text] for text in texts]


def _score_all(texts: list[str], workers: int) -> Iterator[list[float]]:
    size = max(1, min(_CHUNK, -(-len(texts) // workers)))
    chunks = [texts[start : start + size] for start in range(0, len(texts), size)]
    if workers == 1 or len(chunks) < 2:
        yield from itertools.chain.from_iterable(map(_score_texts, chunks))
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context, initializer=end_with_parent)
    try:
        yield from itertools.chain.from_iterable(pool.map(_score_texts, chunks))
    finally:
        pool.shutdown(cancel_futures=True)


def _score_texts(texts: list[str]) -> list[list[float]]:
    import yake  # here, for only the preparation needs it

    extractor = yake.KeywordExtractor(lan="en", n=NGRAM, dedup_lim=1.0, top=_NO_LIMIT)
    return [
        spread_over_words(words, extractor.extract_keywords(text))
        for text, words in zip(texts, split_words(texts), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Importance:
    """The importance of the words of N texts, one after the other.

    Attributes:
      values: shares of all words.
      starts: where each text begins in them, and the end of the last.
    """

    values: Float32[np.ndarray, " words"]
    starts: Int64[np.ndarray, " texts_and_1"]

    def rows(self, ids: Int[np.ndarray, "*b"], slots: int) -> Float32[np.ndarray, "*b {slots}"]:
        """What a batch carries: the first `slots` words of the texts `ids`, 0 where a text has fewer.

        Raises:
          IndexError: an id is out of range.
        """
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self.starts) - 1):
            raise IndexError(
                f"text ids {ids.min()} .. {ids.max()} are not all in 0 .. {len(self.starts) - 2}"
            )
        places = self.starts[ids][..., None] + np.arange(slots)
        padded = np.append(self.values, np.float32(0))
        inside = places < self.starts[ids + 1][..., None]
        return np.where(inside, padded[np.where(inside, places, -1)], np.float32(0))


def write_importance(path: Path, texts: Sequence[str], scores: Sequence[Float32[np.ndarray, " _"]]) -> None:
    """Stores what `word_importance` gave for these texts as .npz, which is there whole or not at all."""
    starts = np.cumsum([0, *map(len, scores)], dtype=np.int64)
    values = np.concatenate([np.zeros(0, np.float32), *scores])
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, values=values, starts=starts, texts=_digest(texts))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_importance(path: Path, texts: Sequence[str] | None) -> Importance:
    """Reads what `write_importance` stored.

    Args:
      path: the file.
      texts: those that it must have been made for; None where the caller knows.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or was made for other texts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no importance of words; prepare the data first")
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in ("values", "starts", "texts")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it and prepare the data again") from error
    if texts is not None and (
        stored["texts"].tobytes() != _digest(texts).tobytes() or len(stored["starts"]) != len(texts) + 1
    ):
        raise ValueError(f"{path} was made for other texts: remove it and prepare the data again")
    return Importance(stored["values"], stored["starts"])


def _digest(texts: Sequence[str]) -> np.ndarray:
    """SHA-256 of the texts and of the rule by which they are scored."""
    digest = hashlib.sha256(f"yake en {NGRAM}".encode())
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return np.frombuffer(digest.digest(), np.uint8)
