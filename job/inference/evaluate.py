"""Evaluates trained models on a text: perplexity and bits per character."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import cast

import torch

from job.config.inference import EvaluateConfig
from job.config.run import ScaleConfig
from job.config.schema import Config
from job.data.corpus import Corpus, read_corpus
from job.data.lanes import split_evenly
from job.data.text_size import TextSize, measure_targets
from job.data.token_store import OpenText, StoredTokens, open_stored
from job.data.tokens import Tokens, count_characters, count_unknown
from job.data.vocabulary import END_OF_LINE, Vocabulary
from job.distributed.context import device_name, local_device, use_full_precision
from job.distributed.tree_reduce import tree_sum
from job.errors import UserError
from job.inference.dynamic import evaluate_dynamic
from job.inference.ensemble import check_same_vocabulary, evaluate_ensemble
from job.inference.generate import load_model
from job.nn.language_model import LanguageModel
from job.training.checkpoint import LoadedCheckpoint
from job.training.loop import evaluate_group
from job.training.progress import LossSum, perplexity

WINDOW_TOKENS = 1024  # per call of the model; bounds the memory and does not change the result
WINDOW_LOGITS = 1 << 24  # the same for the models of an ensemble, all of whose probabilities are computed in float64
GROUP_LANES = 16  # that are evaluated at a time


@dataclass(frozen=True)
class Evaluation:
    """The loss over all tokens of a text but the first.

    Args:
        loss: the loss
        num_characters: number of characters (or bytes) of those tokens
        unknown_share: share of ``<unk>`` among those tokens
        size: what those tokens consist of
    """

    loss: LossSum
    num_characters: int
    unknown_share: float
    size: TextSize

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token."""
        return perplexity(self.loss.nats_per_token)

    @property
    def bits_per_character(self) -> float:
        """The loss in bits per character."""
        return self.loss.nats / math.log(2) / self.num_characters


def evaluate_text(
    checkpoints: Sequence[LoadedCheckpoint], config: Config, evaluate: "Evaluate | None" = None,
    open_large: OpenText | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluates models on a text: each token but the first is a target once.

    Args:
        checkpoints: of one model, or of several whose mean of probabilities is evaluated
        config: its sections ``corpus`` and ``evaluate``, and the cell of ``model`` as the user gave it
        evaluate: computes the loss; None: in this process, on its GPU if it has one
        open_large: opens a text that is too large for the memory; None: read a text of any size into memory

    Raises:
        UserError: the text cannot be read, or has fewer than two tokens, a checkpoint
            has another vocabulary than the first one, or as ``load_model``
    """
    check_same_vocabulary(checkpoints)
    vocabulary, corpus_config = checkpoints[0].vocabulary, config.corpus
    stored = open_stored(corpus_config, config.vocabulary, vocabulary, reads_flat=vocabulary.kind != "byte")
    if open_large and not stored:
        stored = open_large(corpus_config, config.vocabulary, vocabulary, "corpus.source")
    all_tokens: Tokens
    if stored:
        all_tokens, count = stored.tokens, partial(_stored_characters, stored)
    else:
        corpus = read_corpus(corpus_config, vocabulary.kind, has_separator=vocabulary.has_separator)
        all_tokens, count = (
            vocabulary.encode_documents(corpus.documents),
            partial(count_target_characters, corpus, vocabulary),
        )
    tokens = all_tokens[: corpus_config.max_tokens or None]
    if len(tokens) < 2:
        problem = f"corpus.source = {corpus_config.source}: {len(tokens)} tokens, and evaluation needs two"
        blanks = " with blanks between its words" if vocabulary.kind == "word" else ""
        raise UserError(problem, f"give more text{blanks}")
    num_characters = count(tokens[1:])
    nats = (evaluate or partial(evaluate_here, local_device(ScaleConfig())))(checkpoints, config, tokens)
    unknown_share = count_unknown(tokens[1:], vocabulary) / (len(tokens) - 1)
    return Evaluation(
        LossSum(nats, len(tokens) - 1), num_characters, unknown_share, measure_targets(tokens, vocabulary)
    )


Evaluate = Callable[[Sequence[LoadedCheckpoint], Config, Tokens], float]  # returns the summed loss of the tokens


def evaluate_here(
    device: torch.device, checkpoints: Sequence[LoadedCheckpoint], config: Config, tokens: Tokens
) -> float:
    """Returns the loss of all tokens but the first in nats, summed, computed in this process.

    Raises:
        UserError: as ``load_model``, or the memory of the GPU is too small
    """
    try:
        return evaluate_tokens(load_models(checkpoints, config, device), tokens, config.evaluate)
    except torch.OutOfMemoryError:
        remedy = "set scale.accelerator = cpu, or evaluate fewer models at a time"
        raise UserError(f"evaluation has run out of memory on {device_name(device)}", remedy) from None


def load_models(checkpoints: Sequence[LoadedCheckpoint], config: Config, device: torch.device) -> list[LanguageModel]:
    """Returns the models with the weights that ``evaluate.weights`` chooses. Raises UserError as ``load_model``."""
    use_full_precision()
    weights = config.evaluate.weights
    return [load_model(checkpoint, config.model, weights).to(device) for checkpoint in checkpoints]


def evaluate_tokens(models: Sequence[LanguageModel], tokens: Tokens, evaluate_config: EvaluateConfig) -> float:
    """Returns the loss of all tokens but the first in nats, summed; the arguments are those of ``evaluate_groups``."""
    numbers = range(count_groups(len(tokens) - 1, evaluate_config))
    return tree_sum(evaluate_groups(models, tokens, evaluate_config, numbers))


def evaluate_groups(
    models: Sequence[LanguageModel], tokens: Tokens, evaluate_config: EvaluateConfig, numbers: range
) -> list[float]:
    """Returns the loss of some groups of lanes in nats, each summed over its targets.

    Args:
        models: several are an ensemble, whose probabilities are the mean of theirs
        tokens: token ids of the whole text (N,), N at least 2
        evaluate_config: how the text is split into lanes, or the weights follow it
        numbers: of the groups
    """
    for model in models:
        model.eval()
    if evaluate_config.dynamic:
        return [evaluate_dynamic(models, tokens, evaluate_config)]
    groups = islice(lane_groups(len(tokens) - 1, evaluate_config), numbers.start, numbers.stop)
    return [_evaluate_group(models, tokens, group) for group in groups]


def _evaluate_group(models: Sequence[LanguageModel], tokens: Tokens, lanes: Sequence[range]) -> float:
    if len(models) == 1:
        return evaluate_group(models[0], tokens, lanes, max(1, WINDOW_TOKENS // len(lanes)))
    window_tokens = min(WINDOW_TOKENS, WINDOW_LOGITS // models[0].vocabulary_size)
    return evaluate_ensemble(models, tokens, lanes, max(1, window_tokens // len(lanes)))


def count_groups(num_targets: int, evaluate_config: EvaluateConfig) -> int:
    """Returns the number of groups that ``lane_groups`` yields, which does not depend on workers."""
    return math.ceil(_count_lanes(num_targets, evaluate_config) / GROUP_LANES)


def _count_lanes(num_targets: int, evaluate_config: EvaluateConfig) -> int:
    context = evaluate_config.context
    return math.ceil(num_targets / context) if context else min(evaluate_config.lanes, num_targets)


def lane_groups(num_targets: int, evaluate_config: EvaluateConfig) -> Iterator[list[range]]:
    """Yields the lanes of a text in groups that are evaluated at a time.

    With ``evaluate.context`` a lane is that many targets long (the last one may be shorter), and the first of them is
    predicted from a zero state and the token before it.

    >>> list(lane_groups(5, EvaluateConfig(context=2)))
    [[range(0, 2), range(2, 4), range(4, 5)]]
    """
    size, num_lanes = evaluate_config.context, _count_lanes(num_targets, evaluate_config)
    lanes = [] if size else split_evenly(num_targets, num_lanes)
    for first in range(0, num_lanes, GROUP_LANES):
        numbers = range(first, min(first + GROUP_LANES, num_lanes))
        yield [range(n * size, min((n + 1) * size, num_targets)) if size else lanes[n] for n in numbers]


def _stored_characters(stored: StoredTokens, targets: Tokens) -> int:
    """Counts the characters of all tokens but the first. Raises UserError if they are words whose length is unknown."""
    if stored.target_characters is not None and len(targets) + 1 == len(stored.tokens):
        return stored.target_characters
    num_characters = count_characters(targets, stored.vocabulary)
    if num_characters is None:
        raise UserError("the number of characters of these words is not known", "evaluate the text, or a whole store")
    return num_characters


def count_target_characters(corpus: Corpus, vocabulary: Vocabulary, targets: Tokens) -> int:
    """Counts the characters (or bytes) of all tokens but the first; a word includes the space before it.

    A separator and an end of line are one character, and there is no space after them.
    """
    num_characters = count_characters(targets, vocabulary)
    if num_characters is not None:
        return num_characters
    tokens = islice(vocabulary.split(cast(list[list[str]], corpus.documents)), len(targets) + 1)
    breaks = (None, END_OF_LINE)
    return sum(
        1 if token is None or token in breaks else len(token) + (previous not in breaks)
        for previous, token in pairwise(tokens)
    )
