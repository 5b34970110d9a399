"""How well counting predicts a text: n-gram cross-entropies, the yardstick for a trained model's validation loss.

For small vocabularies (at most 1024 ids, so that a trigram fits an int32). All results are nats a token.

Smoothing: interpolated Witten-Bell. With c(h w) the count of w after history h, c(h) its sum and T(h) the number of distinct
w seen after h:  P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h)),  h' being h without its oldest token; below the
unigrams lies the uniform distribution, and a history never seen passes P(w | h') on.
Source: Witten and Bell 1991, method C; interpolated as in Chen and Goodman 1998, section 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

LARGEST_VOCABULARY = 1024
MOST_TRAINING_TOKENS = 16_000_000
_BLOCKS = 64


@dataclass(frozen=True)
class NgramLosses:
    unigram: float
    bigram: float
    trigram: float


def ngram_cross_entropy(train_tokens: numpy.ndarray, validation_tokens: numpy.ndarray, vocab: int) -> NgramLosses:
    """Mean -log P of the validation text's tokens from the third on, under models counted on the training text.

    Args:
        train_tokens, validation_tokens: integers [n], ids below `vocab`, in text order. Of a training text above
            MOST_TRAINING_TOKENS, 64 evenly spaced stretches of that total length are counted.
    Raises ValueError: the vocabulary is too large, an id is outside it, or a text has fewer than 3 tokens.
    """
    train = _subsample(_checked(train_tokens, vocab, "training"))
    text = _checked(validation_tokens, vocab, "validation")
    before, last, word = text[:-2], text[1:-1], text[2:]
    unigram, bigram = numpy.bincount(train, minlength=vocab), _pairs(train, vocab)
    p1 = _interpolate(unigram[word], unigram.sum(), numpy.count_nonzero(unigram), 1.0 / vocab)
    p2 = _interpolate(bigram[last, word], bigram.sum(1)[last], numpy.count_nonzero(bigram, axis=1)[last], p1)
    p3 = _interpolate(*_trigram_counts(train, vocab, before * vocab + last, word), p2)
    return NgramLosses(*(float(-numpy.log(p).mean()) for p in (p1, p2, p3)))


def bigram_entropy(tokens: numpy.ndarray, vocab: int) -> float:
    """Entropy of a text's token given the one before it, from the text's own counts (the plug-in estimate, no smoothing).

    A lower bound for any bigram model of that text, hence a level that a model which uses context must pass.
    Args: tokens: integers [n], ids below `vocab`. Raises ValueError as `ngram_cross_entropy`.
    """
    pairs = _pairs(_checked(tokens, vocab, "given"), vocab).astype(numpy.float64)
    first, second = numpy.nonzero(pairs)
    counts = pairs[first, second]
    return float(-(counts * numpy.log(counts / pairs.sum(1)[first])).sum() / counts.sum())


def text_of_rows(tokens: numpy.ndarray, valid: numpy.ndarray) -> numpy.ndarray:
    """The text [m] that consecutive rows, int [n, S+1], were cut from: each row begins with the last token of the one before."""
    parts = [row[: count if last else count - 1] for row, count, last in
             zip(tokens, valid, numpy.arange(len(tokens)) == len(tokens) - 1)]
    return numpy.concatenate(parts) if parts else numpy.empty(0, dtype=numpy.int32)


def _checked(tokens: numpy.ndarray, vocab: int, name: str) -> numpy.ndarray:
    if not 1 <= vocab <= LARGEST_VOCABULARY:
        raise ValueError(f"vocabulary of {vocab}: n-grams are counted for 1 to {LARGEST_VOCABULARY} ids")
    tokens = numpy.asarray(tokens)
    if tokens.ndim != 1 or len(tokens) < 3:
        raise ValueError(f"the {name} text has shape {tokens.shape}: at least 3 tokens in a row are needed")
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"the {name} text has ids from {tokens.min()} to {tokens.max()}, the vocabulary has {vocab}")
    return tokens.astype(numpy.int32)


def _subsample(tokens: numpy.ndarray) -> numpy.ndarray:
    if len(tokens) <= MOST_TRAINING_TOKENS:
        return tokens
    length = MOST_TRAINING_TOKENS // _BLOCKS
    starts = numpy.linspace(0, len(tokens) - length, _BLOCKS).astype(numpy.int64)
    return numpy.concatenate([tokens[start: start + length] for start in starts])


def _pairs(tokens: numpy.ndarray, vocab: int) -> numpy.ndarray:
    """int64 [vocab, vocab]: how often the second id follows the first."""
    return numpy.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab * vocab).reshape(vocab, vocab)


def _trigram_counts(train: numpy.ndarray, vocab: int, history: numpy.ndarray, word: numpy.ndarray) -> tuple[numpy.ndarray, ...]:
    """c(h w), c(h) and T(h) for each (history, word), counted sparsely: only trigrams that occur take memory."""
    seen, counts = numpy.unique((train[:-2] * vocab + train[1:-1]) * vocab + train[2:], return_counts=True)
    of_history = numpy.bincount(seen // vocab, weights=counts, minlength=vocab * vocab)
    kinds = numpy.bincount(seen // vocab, minlength=vocab * vocab)
    wanted = history * vocab + word
    place = numpy.minimum(numpy.searchsorted(seen, wanted), len(seen) - 1)
    together = numpy.where(seen[place] == wanted, counts[place], 0)
    return together, of_history[history], kinds[history]


def _interpolate(together, of_history, kinds, lower) -> numpy.ndarray:
    weight = numpy.asarray(of_history + kinds, dtype=numpy.float64)
    return numpy.where(weight > 0, (together + kinds * lower) / numpy.where(weight > 0, weight, 1.0), lower)
