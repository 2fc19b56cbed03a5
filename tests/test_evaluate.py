"""Evaluation: lanes and contexts against plain loops."""

import numpy as np
import pytest
import torch

from job.config.schema import EvaluateConfig, ModelConfig
from job.errors import UserError
from job.inference.evaluate import GROUP_LANES, evaluate_tokens
from job.nn.language_model import LanguageModel, build_model

TOKENS = np.random.default_rng(0).integers(0, 28, 1000)


def random_model(seed: int = 0, cell: str = "lstm", hidden_size: int = 32) -> LanguageModel:
    """A model whose predictions differ much from token to token."""
    model = build_model(ModelConfig(cell=cell, hidden_size=hidden_size), 28, seed).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return model


def token_nats(model: LanguageModel, tokens: np.ndarray) -> torch.Tensor:
    """The loss of all tokens but the first, from a zero state, by one call for all of them."""
    ids = torch.from_numpy(tokens)[:, None]
    with torch.no_grad():
        logits, _ = model(ids[:-1], None)
    return -logits.log_softmax(2).gather(2, ids[1:, :, None]).flatten()


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_evaluate_tokens_with_one_lane_is_the_loss_of_the_whole_text(cell: str) -> None:
    model = random_model(cell=cell)
    nats = evaluate_tokens([model], TOKENS, EvaluateConfig())
    assert nats == pytest.approx(float(token_nats(model, TOKENS).sum()), rel=1e-12)


@pytest.mark.parametrize("context", [1, 7, 100, 333, 999, 5000])
def test_evaluate_tokens_with_context_starts_each_block_from_a_zero_state(context: int) -> None:
    model = random_model()
    expected, targets = 0.0, 0
    for start in range(0, len(TOKENS) - 1, context):
        nats = token_nats(model, TOKENS[start : start + context + 1])
        expected, targets = expected + float(nats.sum()), targets + len(nats)
    assert targets == len(TOKENS) - 1
    summed = evaluate_tokens([model], TOKENS, EvaluateConfig(context=context))
    assert summed == pytest.approx(expected, rel=1e-12)
    assert summed != pytest.approx(float(token_nats(model, TOKENS).sum()), rel=1e-6) or context >= len(TOKENS) - 1


@pytest.mark.parametrize("lanes", [2, GROUP_LANES + 1, 999, 10**9])
def test_evaluate_tokens_with_lanes_starts_each_from_a_zero_state(lanes: int) -> None:
    model = random_model()
    pieces = np.array_split(np.arange(len(TOKENS) - 1), min(lanes, len(TOKENS) - 1))
    expected = sum(float(token_nats(model, TOKENS[piece[0] : piece[-1] + 2]).sum()) for piece in pieces)
    assert evaluate_tokens([model], TOKENS, EvaluateConfig(lanes=lanes)) == pytest.approx(expected, rel=1e-12)


def test_evaluate_config_with_lanes_and_context_raises() -> None:
    with pytest.raises(UserError, match=r"evaluate.lanes = 2: evaluate.context = 3 splits the text already; leave"):
        EvaluateConfig(lanes=2, context=3)


def test_evaluate_tokens_of_several_models_is_the_mean_of_their_probabilities() -> None:
    models = [random_model(1), random_model(2, "gru", 64), random_model(3, "rnn", 8)]
    probabilities = torch.stack([token_nats(model, TOKENS).neg().exp() for model in models]).mean(0)
    expected = float(-probabilities.log().sum())
    assert evaluate_tokens(models, TOKENS, EvaluateConfig()) == pytest.approx(expected, rel=1e-12)
    blocks = EvaluateConfig(context=100)
    expected = 0.0
    for start in range(0, len(TOKENS) - 1, 100):
        block = TOKENS[start : start + 101]
        expected -= float(torch.stack([token_nats(model, block).neg().exp() for model in models]).mean(0).log().sum())
    assert evaluate_tokens(models, TOKENS, blocks) == pytest.approx(expected, rel=1e-12)


def test_evaluate_tokens_of_a_model_twice_is_that_of_the_model() -> None:
    model = random_model()
    alone = evaluate_tokens([model], TOKENS, EvaluateConfig())
    assert evaluate_tokens([model, model], TOKENS, EvaluateConfig()) == pytest.approx(alone, rel=1e-12)
