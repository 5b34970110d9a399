"""The built-in corpus: the source of Python's own standard library, real text that every machine has."""

from __future__ import annotations

import sys
from dataclasses import asdict

import numpy

from actors.data.dataset import Dataset, DatasetError, Split
from actors.data.documents import STDLIB
from actors.data.ngram import LARGEST_VOCABULARY, bigram_entropy, ngram_cross_entropy, text_of_rows
from jobs.driver.summary import OWN_BIGRAM
from jobs.tokenize import load_tokenizer, tokenize
from orchestrator.config.run_config import RunConfig

_TRAINING_SEQUENCES = 1 << 17


def prepare(config: RunConfig, data: str) -> None:
    """Tokenize the built-in corpus into `data` where `data.path` is auto and that was not done yet. Raises ConfigError."""
    if config.data.path != "auto":
        return
    try:
        Dataset.open(data)
        return
    except DatasetError:
        pass  # not there, or left unfinished: tokenize resumes
    tokenizer = load_tokenizer(config.data.tokenizer)
    print(f"tokenizing the built-in corpus into {data}", file=sys.stderr, flush=True)
    tokenize([STDLIB], tokenizer, data, config)


def baselines(dataset: Dataset, sequences: int) -> dict[str, float]:
    """Levels to hold a validation loss against, in nats a token; empty for large vocabularies. The validation text is that of its first
    `sequences`, those that the loss is of.

    unigram, bigram, trigram: cross-entropy of the validation text under models counted on the training text. `own bigram`:
    entropy of the validation text given the token before, by its own counts, which no bigram model can pass.
    """
    if dataset.vocab_size > LARGEST_VOCABULARY or not min(sequences, dataset.validation.sequences):
        return {}

    def text(split: Split, most: int) -> numpy.ndarray:
        rows = range(min(split.sequences, most))
        return text_of_rows(dataset.read_rows(split, rows), dataset.valid_tokens(split, rows))

    validation = text(dataset.validation, sequences)
    found = asdict(ngram_cross_entropy(text(dataset.train, _TRAINING_SEQUENCES), validation, dataset.vocab_size))
    return found | {OWN_BIGRAM: bigram_entropy(validation, dataset.vocab_size)}
