from __future__ import annotations

import math
from collections import Counter

import numpy
import pytest

from actors.data import ngram
from actors.data.ngram import bigram_entropy, ngram_cross_entropy, text_of_rows


def by_dictionary(train, text, vocab):
    """Witten-Bell read literally, one token at a time."""
    counts = [Counter(tuple(train[i:i + n]) for i in range(len(train) - n + 1)) for n in (1, 2, 3)]

    def probability(history, word):
        lower = probability(history[1:], word) if history else 1 / vocab
        followers = {g[-1]: c for g, c in counts[len(history)].items() if g[:-1] == history}
        total, kinds = sum(followers.values()), len(followers)
        return (followers.get(word, 0) + kinds * lower) / (total + kinds) if total else lower

    return [sum(-math.log(probability(tuple(text[i - n:i]), text[i])) for i in range(2, len(text))) / (len(text) - 2)
            for n in (0, 1, 2)]


@pytest.mark.parametrize("vocab, seed", [(3, 0), (7, 1), (40, 2)])
def test_cross_entropy_is_what_a_dictionary_gives(vocab, seed):
    rng = numpy.random.default_rng(seed)
    train, text = (numpy.minimum(rng.geometric(0.3, size) - 1, vocab - 1) for size in (300, 90))
    text[10] = vocab - 1
    found = ngram_cross_entropy(train, text, vocab)
    expected = by_dictionary(train.tolist(), text.tolist(), vocab)
    assert [found.unigram, found.bigram, found.trigram] == pytest.approx(expected, rel=1e-12)


def test_probabilities_sum_to_one():
    """exp(-cross-entropy) of each possible continuation of one history adds up to 1."""
    rng = numpy.random.default_rng(3)
    train, vocab = rng.integers(0, 5, 60), 6
    for pick in ("unigram", "bigram", "trigram"):
        losses = [getattr(ngram_cross_entropy(train, numpy.array([2, 3, word]), vocab), pick) for word in range(vocab)]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0)


def test_bigram_entropy_by_definition():
    text = [0, 1, 0, 1, 0, 2, 2, 0, 1, 1]
    pairs, heads = Counter(zip(text, text[1:])), Counter(text[:-1])
    expected = -sum(c / 9 * math.log(c / heads[a]) for (a, b), c in pairs.items())
    assert bigram_entropy(numpy.array(text), 3) == pytest.approx(expected)


def test_a_long_training_text_is_subsampled_to_the_bound(monkeypatch):
    monkeypatch.setattr(ngram, "MOST_TRAINING_TOKENS", 640)
    train = numpy.arange(6400) % 4
    assert len(ngram._subsample(train)) == 640
    assert ngram_cross_entropy(train, train[:50], 4).bigram < 0.2


def test_text_of_rows_joins_rows_at_their_shared_token():
    text = numpy.arange(2 * 4 + 3, dtype=numpy.int32)
    rows = numpy.stack([text[0:5], text[4:9], numpy.array([8, 9, 10, 99, 99], numpy.int32)])
    assert text_of_rows(rows, numpy.array([5, 5, 3])).tolist() == text.tolist()


@pytest.mark.parametrize("tokens, vocab, message", [
    ([0, 1, 5], 5, "ids from 0 to 5"), ([0, 1], 5, "at least 3"), ([0, 1, 2], 5000, "1 to 1024")])
def test_refusals(tokens, vocab, message):
    with pytest.raises(ValueError, match=message):
        ngram_cross_entropy(numpy.array(tokens), numpy.array([0, 1, 2]), vocab)
