"""The token ids of a run, prepared once by the driver and read by every worker."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from job.config.text import CorpusConfig, VocabularyConfig
from job.data.corpus import Corpus, read_corpus
from job.data.text_size import TextSize, measure_targets
from job.data.token_store import OpenText, StoredTokens, open_stored
from job.data.tokens import Tokens, count_unknown, token_sha256
from job.data.vocabulary import Vocabulary
from job.data.vocabulary_builder import build_vocabulary


@dataclass(frozen=True)
class Dataset:
    """A corpus as token ids. Those of a store are not pickled: each process opens the files that it reads.

    Args:
        train_tokens: the beginning of the corpus
        validation_tokens: the end of the corpus, or another text; empty without validation
        vocabulary: the vocabulary of both
        metadata: recorded in each checkpoint: source, characters, tokens, and the SHA-256 digest of all tokens; and
            in ``validation`` those of another text for validation, without characters
    """

    train_tokens: Tokens
    validation_tokens: Tokens
    vocabulary: Vocabulary
    metadata: dict[str, Any]

    @cached_property
    def unknown_shares(self) -> dict[str, float]:
        """The share of ``<unk>`` in each text that is not empty: training and validation."""
        texts = {"training": self.train_tokens, "validation": self.validation_tokens}
        return {name: count_unknown(part, self.vocabulary) / len(part) for name, part in texts.items() if len(part)}

    @cached_property
    def validation_size(self) -> TextSize:
        """What the targets of the validation text consist of."""
        return measure_targets(self.validation_tokens, self.vocabulary)


def build_dataset(
    corpus: Corpus, corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig, known: Vocabulary | None = None
) -> Dataset:
    """Builds the vocabulary unless it is known, encodes the corpus, and splits off the validation part."""
    if known:
        vocabulary, tokens = known, known.encode_documents(corpus.documents)[: corpus_config.max_tokens or None]
    else:
        vocabulary, tokens = encode_corpus(corpus, corpus_config, vocabulary_config)
    metadata = _metadata(corpus.source, corpus.num_characters, len(tokens), token_sha256(tokens))
    split = num_train(len(tokens), corpus_config)
    return Dataset(tokens[:split], tokens[split:], vocabulary, metadata)


def encode_corpus(
    corpus: Corpus, corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig
) -> tuple[Vocabulary, np.ndarray]:
    """Returns the vocabulary of a corpus, and its token ids (tokens,) int32, at most ``corpus.max_tokens``."""
    vocabulary = build_vocabulary(vocabulary_config, corpus)
    tokens = vocabulary.encode_documents(corpus.documents)[: corpus_config.max_tokens or None]
    if vocabulary_config.scope == "training":
        vocabulary = build_vocabulary(vocabulary_config, corpus, num_train(len(tokens), corpus_config))
        tokens = vocabulary.encode_documents(corpus.documents)[: len(tokens)]
    return vocabulary, tokens


def map_dataset(stored: StoredTokens, corpus_config: CorpusConfig) -> Dataset:
    """Splits the validation part off stored tokens, none of which are read into memory."""
    tokens = stored.tokens[: corpus_config.max_tokens or None]
    sha256 = stored.sha256_of_first(len(tokens))
    metadata = _metadata(corpus_config.source, stored.num_characters, len(tokens), sha256)
    split = num_train(len(tokens), corpus_config)
    return Dataset(tokens[:split], tokens[split:], stored.vocabulary, metadata)


def add_validation_text(
    dataset: Dataset, corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig, open_large: OpenText | None
) -> Dataset:
    """Returns the dataset with the text of ``corpus.validation_source``, in the vocabulary of the training text.

    Args:
        dataset: without a validation text
        corpus_config: the source; its cleaning is that of the training text
        vocabulary_config: what is to agree with a token store
        open_large: opens a text that is too large for the memory; None: read a text of any size into memory

    Raises:
        UserError: the text cannot be read, or it is a store of another vocabulary
    """
    vocabulary, field = dataset.vocabulary, "corpus.validation_source"
    corpus_config = replace(corpus_config, source=corpus_config.validation_source, validation_source="", max_tokens=0)
    reads_flat = vocabulary.kind != "byte"
    stored = open_stored(corpus_config, vocabulary_config, vocabulary, reads_flat, field)
    if open_large and not stored:
        stored = open_large(corpus_config, vocabulary_config, vocabulary, field)
    tokens: Tokens
    if stored:
        tokens, sha256 = stored.tokens, stored.sha256
    else:
        corpus = read_corpus(corpus_config, vocabulary.kind, None, vocabulary.has_separator, field)
        tokens = vocabulary.encode_documents(corpus.documents)
        sha256 = token_sha256(tokens)
    metadata = {"source": corpus_config.source, "tokens": len(tokens), "sha256": sha256}
    return replace(dataset, validation_tokens=tokens, metadata={**dataset.metadata, "validation": metadata})


def num_train(num_tokens: int, corpus_config: CorpusConfig) -> int:
    """Returns how many of the tokens of a corpus are trained on."""
    return num_tokens - round(num_tokens * corpus_config.validation_fraction)


def _metadata(source: str, num_characters: int, num_tokens: int, sha256: str) -> dict[str, Any]:
    return {"source": source, "characters": num_characters, "tokens": num_tokens, "sha256": sha256}
