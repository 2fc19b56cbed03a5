"""The perplexity of a text under a checkpoint."""

import math
from dataclasses import dataclass

from job.config.schema import CorpusConfig
from job.data.corpus import Corpus, read_corpus
from job.errors import UserError
from job.inference.load import load_model
from job.training.checkpoint import LoadedCheckpoint
from job.training.loop import evaluate_lanes
from job.training.progress import LossSum

WINDOW_TOKENS = 1024  # steps at a time: bounds the memory, and changes no number


@dataclass(frozen=True)
class Evaluation:
    """A text's loss, in nats over its targets, and how many characters (or bytes) it has."""

    loss: LossSum
    num_characters: int

    @property
    def bits_per_character(self) -> float:
        """Bits that each character of the text costs, its first token left out."""
        return self.loss.nats / math.log(2) / self.num_characters


def evaluate_text(checkpoint: LoadedCheckpoint, corpus_config: CorpusConfig) -> Evaluation:
    """Reads the text as one lane, from zero state, each token but the first a target once."""
    vocabulary = checkpoint.vocabulary
    text = read_corpus(corpus_config, vocabulary.kind)
    tokens = vocabulary.encode(text.lines)[: corpus_config.max_tokens or None]
    if len(tokens) < 2:
        raise UserError(f"corpus.source = {corpus_config.source}: {len(tokens)} tokens, and two are the fewest")
    (nats,) = evaluate_lanes(load_model(checkpoint), tokens, [range(1)], 1, WINDOW_TOKENS)
    return Evaluation(LossSum(nats, len(tokens) - 1), _characters(text, vocabulary.kind, len(tokens)))


def _characters(text: Corpus, kind: str, tokens: int) -> int:
    """Characters (bytes) of all tokens but the first; words with the space before each."""
    if kind != "word":
        return tokens - 1
    vocabulary = [word for line in text.lines for word in line.split()]
    return sum(len(word) + 1 for word in vocabulary[1:tokens])
