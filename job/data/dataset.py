"""The token ids of a run, prepared once by the driver and read by every worker."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from job.config.schema import CorpusConfig, VocabularyConfig
from job.data.corpus import Corpus
from job.data.vocabulary import Vocabulary, build_vocabulary


@dataclass(frozen=True)
class Dataset:
    """A corpus as token ids, one-dimensional int32 arrays.

    Args:
        train_tokens: the beginning of the corpus
        validation_tokens: the end of the corpus; empty without validation
        vocabulary: the vocabulary of both
        metadata: recorded in each checkpoint: source, characters, tokens, and the SHA-256 digest of all tokens
    """

    train_tokens: np.ndarray
    validation_tokens: np.ndarray
    vocabulary: Vocabulary
    metadata: dict[str, Any]

    @cached_property
    def unknown_shares(self) -> dict[str, float]:
        """The share of ``<unk>`` in each text that is not empty: training and validation."""
        texts = {"training": self.train_tokens, "validation": self.validation_tokens}
        return {name: self.vocabulary.unknown_share(tokens) for name, tokens in texts.items() if len(tokens)}


def build_dataset(corpus: Corpus, corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig) -> Dataset:
    """Builds the vocabulary, encodes the corpus, and splits off the validation part."""
    vocabulary = build_vocabulary(vocabulary_config, corpus)
    tokens = vocabulary.encode_documents(corpus.documents)[: corpus_config.max_tokens or None]
    num_train = len(tokens) - round(len(tokens) * corpus_config.validation_fraction)
    if vocabulary_config.scope == "training":
        vocabulary = build_vocabulary(vocabulary_config, corpus, num_train)
        tokens = vocabulary.encode_documents(corpus.documents)[: len(tokens)]
    metadata = {
        "source": corpus.source,
        "characters": corpus.num_characters,
        "tokens": len(tokens),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    return Dataset(tokens[:num_train], tokens[num_train:], vocabulary, metadata)
