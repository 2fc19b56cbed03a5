"""The perplexity of a text under a checkpoint."""

import math
from dataclasses import dataclass

from job import config, corpus, loop
from job.checkpoint import Restored
from job.errors import UserError
from job.loop import Mean
from job.model import LanguageModel

WINDOW = 1024  # steps at a time: bounds the memory, and changes no number


@dataclass(frozen=True)
class Evaluation:
    """A text's loss, in nats over its targets, and how many characters (or bytes) it has."""

    mean: Mean
    characters: int

    @property
    def bits_per_character(self) -> float:
        """Bits that each character of the text costs, its first token left out."""
        return self.mean.nats / math.log(2) / self.characters


def evaluate(restored: Restored, model: LanguageModel, options: config.Corpus) -> Evaluation:
    """Reads the text as one lane, from zero state, each token but the first a target once."""
    words = restored.vocabulary
    text = corpus.read(options, words.kind)
    tokens = words.encode(text.lines)[: options.max_tokens or None]
    if len(tokens) < 2:
        raise UserError(f"corpus.source = {options.source}: {len(tokens)} tokens, and two are the fewest")
    (nats,) = loop.evaluate(model, tokens, [range(1)], 1, WINDOW)
    return Evaluation(Mean(nats, len(tokens) - 1), _characters(text, words.kind, len(tokens)))


def _characters(text: corpus.Text, kind: str, tokens: int) -> int:
    """Characters (bytes) of all tokens but the first; words with the space before each."""
    if kind != "word":
        return tokens - 1
    words = [word for line in text.lines for word in line.split()]
    return sum(len(word) + 1 for word in words[1:tokens])
