"""Text that a model generates while it trains: a greedy continuation of the run's prefix, and a random one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from job.errors import NonFiniteLogits
from job.inference.ensemble import Ensemble
from job.inference.generate import StopCondition, continuation_text, continue_greedily, continue_randomly, read_tokens
from job.inference.prefix import encode_prefix
from job.inference.sampling import sample_generator
from job.nn.language_model import LanguageModel
from job.training.run_spec import RunSpec
from job.training.train_state import TrainState

MAX_TOKENS = 64  # of a continuation
MAX_PREFIX = 256  # characters that are shown, and tokens that are read, from the end


def generate_samples(spec: RunSpec, train_state: TrainState) -> list[dict[str, Any]]:
    """Returns the rows of ``samples.jsonl`` after the last step, a function of its weights and its number alone.

    The weights are those that ``generate`` uses: the average, if there is one. Nothing of the training state changes.
    There are no rows if the model has diverged, for which the loss of the next step ends the run.
    """
    config, progress = spec.config.generate, train_state.progress
    model = train_state.average.averaged if train_state.average else train_state.model
    generator = sample_generator(spec.config.run.seed, progress.step)
    try:
        continuations = _continuations(model, spec, generator)
    except NonFiniteLogits:
        return []
    row = {"step": progress.step, "epoch": progress.epoch + 1, "prefix": config.prefix[-MAX_PREFIX:]}
    row["time"] = round(time.time(), 3)
    return [{**row, "kind": kind, "continuation": text} for kind, text in continuations.items()]


def _continuations(model: LanguageModel, spec: RunSpec, generator: torch.Generator) -> dict[str, str]:
    """Returns a continuation of ``generate.prefix`` of each kind."""
    config, vocabulary = spec.config.generate, spec.dataset.vocabulary
    ids = encode_prefix(config.prefix, spec.config.corpus, vocabulary)[-MAX_PREFIX:]
    config = replace(config, length=min(config.length, MAX_TOKENS), temperature=config.temperature or 1.0)
    with _evaluated(model, None if config.unknown else vocabulary.unknown_id) as ensemble:
        state = read_tokens(ensemble, ids)
        first_1 = torch.tensor([state.token], device=next(model.parameters()).device)
        has_ended = StopCondition(vocabulary, config.stop, 1)
        tokens_T1 = {
            "greedy": continue_greedily(ensemble, first_1, state.states, config.length),
            "sampled": continue_randomly(ensemble, first_1, state.states, config, [generator], has_ended),
        }
    return {
        kind: continuation_text(tokens[:, 0].tolist(), state.token, config.prefix, vocabulary, config.stop)
        for kind, tokens in tokens_T1.items()
    }


@contextmanager
def _evaluated(model: LanguageModel, forbidden: int | None) -> Iterator[Ensemble]:
    """Gives a model that generates text, and then restores its mode and its weights, one of which may be replaced."""
    was_training, weights = model.training, [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        yield Ensemble([model], forbidden)
    finally:
        for parameter, weight in weights:
            parameter.data = weight
        model.train(was_training)
