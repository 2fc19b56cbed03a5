"""The adaptive softmax equals torch's in float64; its probabilities sum to one; runs resume and use several models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job, not_none, result
from torch import Tensor, nn

from job.config.inference import EvaluateConfig
from job.config.model import ModelConfig
from job.config.schema import Config
from job.config.text import VocabularyConfig
from job.errors import UserError
from job.inference.ensemble import Ensemble
from job.inference.evaluate import evaluate_tokens
from job.inference.generate import continue_greedily
from job.nn.adaptive_softmax import resolve_cutoffs
from job.nn.language_model import LanguageModel, build_model
from job.nn.state import State
from job.run.estimate import count_weights

TOKENS, UNITS, CUTOFFS = 90, 64, (7, 30, 61)
ADAPTIVE: dict[str, Any] = {"softmax": "adaptive", "adaptive_cutoffs": CUTOFFS}
CONFIG = ModelConfig(cell="lstm", hidden_size=UNITS, embedding_size=8, **ADAPTIVE)


def random_model(seed: int = 0) -> LanguageModel:
    """A model in float64 whose probabilities differ much from token to token."""
    model = build_model(CONFIG, TOKENS, seed).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return model


def random_tokens(steps: int = 6, lanes: int = 5, high: int = TOKENS) -> Tensor:
    return torch.randint(0, high, (steps, lanes), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: not_none(weight.grad) for name, weight in model.named_parameters()}


def test_adaptive_softmax_equals_that_of_torch(implementation: str) -> None:
    has_kernel, exact = implementation == "kernel", random_model()
    with torch.no_grad():
        for tail in exact.tails:
            tail.linear.bias.zero_()  # torch's have none
    model = build_model(CONFIG, TOKENS, 0).to(torch.float32 if has_kernel else torch.float64)
    model.load_state_dict(exact.state_dict())
    torchs = nn.AdaptiveLogSoftmaxWithLoss(UNITS, TOKENS, list(CUTOFFS), div_value=4, head_bias=True).double()
    ours = exact.linear, *(layer for tail in exact.tails for layer in (tail.projection, tail.linear))
    theirs = torchs.head, *(layer for pair in torchs.tail for layer in pair)  # type: ignore[attr-defined]
    for mine, their in zip(ours, theirs, strict=True):
        their.weight = mine.weight
    torchs.head.bias = exact.linear.bias
    tokens_TB, targets_TB = random_tokens(), random_tokens().flip(0)
    hidden_RH = exact.rnn(tokens_TB, None, None, not_none(exact.embedding).weight, None)[0].flatten(0, 1)

    nats, _ = model.cross_entropy_sum(tokens_TB, targets_TB, None)
    nats.backward()  # type: ignore[no-untyped-call]
    expected = -torchs(hidden_RH, targets_TB.flatten()).output.sum()
    expected.backward()
    tolerance = 1e-5 if has_kernel else 1e-12
    torch.testing.assert_close(nats.double(), expected, rtol=tolerance, atol=0)
    found = gradients(model)
    for number in range(len(CUTOFFS)):
        found.pop(f"tails.{number}.linear.bias")
    for name, weight in exact.named_parameters():
        if name in found:
            gradient = not_none(weight.grad)
            assert (found[name] - gradient).norm() <= 10 * tolerance * gradient.norm(), name
    log_RV = model(tokens_TB, None)[0].flatten(0, 1).double()
    torch.testing.assert_close(log_RV, torchs.log_prob(hidden_RH), rtol=0, atol=1e2 * tolerance)


def test_adaptive_losses_of_training_and_validation_are_those_of_the_probabilities() -> None:
    model, tokens_TB, targets_TB = random_model(), random_tokens(), random_tokens().flip(0)
    log_TBV, _ = model(tokens_TB, None)
    assert log_TBV.shape == (*tokens_TB.shape, TOKENS)
    torch.testing.assert_close(log_TBV.exp().sum(2), torch.ones(tokens_TB.shape, dtype=torch.float64))
    nats_TB = -log_TBV.gather(2, targets_TB[..., None])[..., 0]
    torch.testing.assert_close(model.cross_entropy_sum(tokens_TB, targets_TB, None)[0], nats_TB.sum())
    missing_TB = torch.arange(targets_TB.numel()).view_as(targets_TB) % 3 == 0
    counted, _ = model.evaluation_nats(tokens_TB, targets_TB.masked_fill(missing_TB, -1), None)
    torch.testing.assert_close(counted, nats_TB[~missing_TB].sum())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_adaptive_gradient_of_clusters_without_targets_is_zero(autocast: torch.dtype | None) -> None:
    model, tokens_TB = build_model(CONFIG, TOKENS, 0), random_tokens(high=CUTOFFS[0])
    for _ in range(20):  # memory that is not written has the values of what was there before
        model.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            nats, _ = model.cross_entropy_sum(tokens_TB, tokens_TB, None)
        nats.backward()  # type: ignore[no-untyped-call]
        found = gradients(model)
        assert all(not gradient.any() for name, gradient in found.items() if name.startswith("tails."))
        assert found["linear.weight"].any()


def test_adaptive_loss_under_bf16_autocast_is_close_to_float32() -> None:
    model, tokens_TB, targets_TB = build_model(CONFIG, TOKENS, 0), random_tokens(), random_tokens().flip(0)
    expected, _ = model.cross_entropy_sum(tokens_TB, targets_TB, None)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model.cross_entropy_sum(tokens_TB, targets_TB, None)
        log_TBV, _ = model(tokens_TB, None)
    torch.testing.assert_close(found, expected, rtol=3e-3, atol=0)
    assert log_TBV.dtype == torch.float32
    torch.testing.assert_close(log_TBV.exp().sum(2), torch.ones(tokens_TB.shape))


def test_adaptive_ensemble_is_the_mean_of_probabilities() -> None:
    models = [random_model(1), random_model(2)]
    tokens = random_tokens(200, 1).numpy()[:, 0]
    ids = torch.from_numpy(tokens)[:, None]
    logs = [model(ids[:-1], None)[0].detach().gather(2, ids[1:, :, None]) for model in models]
    expected = -torch.stack([log.exp() for log in logs]).mean(0).log().sum()
    assert evaluate_tokens(models, tokens, EvaluateConfig()) == pytest.approx(float(expected), rel=1e-12)
    assert evaluate_tokens(models[:1], tokens, EvaluateConfig()) == pytest.approx(-float(logs[0].sum()), rel=1e-12)
    dynamic = EvaluateConfig(dynamic=1e-9, dynamic_steps=50)
    assert evaluate_tokens(models, tokens, dynamic) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("num_models", [1, 2])
def test_adaptive_continuations_are_by_the_probabilities_without_the_forbidden_token(num_models: int) -> None:
    models, first = [random_model(seed).float() for seed in range(num_models)], torch.tensor([3])
    tokens_TB, logs = first[None], []
    for _ in range(20):
        likely_V = torch.stack([model(tokens_TB, None)[0][-1, 0].detach().exp() for model in models]).mean(0)
        logs.append(likely_V.index_fill(0, torch.tensor(0), 0).log())
        tokens_TB = torch.cat([tokens_TB, logs[-1].argmax().view(1, 1)])
    ensemble = Ensemble(models, 0)
    states: list[State] = [None] * num_models
    assert continue_greedily(ensemble, first, states, 20)[:, 0].tolist() == tokens_TB[1:, 0].tolist()
    for token_1, log_V in zip(tokens_TB, logs, strict=False):
        logits_BV, states = ensemble.step(token_1, states)
        torch.testing.assert_close(logits_BV[0].double().log_softmax(0).exp(), log_V.double().softmax(0))


@pytest.mark.parametrize(
    ("vocabulary_size", "expected"), [(100_000, [5000, 25_000]), (90, [4, 22]), (20, [1, 5]), (7, [1]), (3, [])]
)
def test_automatic_cutoffs_are_a_twentieth_and_a_quarter_of_the_vocabulary(
    vocabulary_size: int, expected: list[int]
) -> None:
    config = ModelConfig(softmax="adaptive", hidden_size=5)
    assert resolve_cutoffs(config, vocabulary_size) == expected
    model = build_model(config, vocabulary_size, 0)
    assert count_weights(config, vocabulary_size) == sum(weight.numel() for weight in model.parameters())
    assert model(torch.zeros(1, 1, dtype=torch.int64), None)[0].shape[2] == vocabulary_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {**ADAPTIVE, "tied": True, "embedding_size": 256},
            "model.tied = true: model.softmax = adaptive has no weight for each token; set one of them only",
        ),
        (
            {"adaptive_cutoffs": (3, 5)},
            r"model.adaptive_cutoffs = \[3, 5\]: model.softmax = full has no clusters; leave",
        ),
        ({**ADAPTIVE, "adaptive_cutoffs": (5, 3)}, r"model.adaptive_cutoffs = \[5, 3\]: must be one or more rising"),
        ({**ADAPTIVE, "adaptive_cutoffs": ()}, r"model.adaptive_cutoffs = \[\]: must be one or more rising integers"),
        ({**ADAPTIVE, "adaptive_cutoffs": (0, 3)}, r"model.adaptive_cutoffs = \[0, 3\]: must be at least 1"),
    ],
)
def test_adaptive_softmax_that_does_not_fit_the_model_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_adaptive_softmax_of_tokens_that_are_not_ordered_by_frequency_raises(kind: str) -> None:
    with pytest.raises(UserError, match=f"ids of vocabulary.kind = {kind} are not ordered by frequency; set"):
        Config(model=CONFIG, vocabulary=VocabularyConfig(kind=kind))


@pytest.mark.slow
def test_adaptive_run_resumes_exactly_and_is_evaluated_and_generates(prose: Path, tmp_path: Path) -> None:
    flags = [
        "--corpus.source", prose, "--vocabulary.kind", "word", "--corpus.validation_fraction", 0.2, "--run.storage",
        tmp_path, "--train.epochs", 2, "--model.hidden_size", 16, "--model.embedding_size", 8, "--scale.workers", 0,
        "--stream.num_steps", 10, "--stream.batch_size", 4, "--model.softmax", "adaptive", "--generate.prefix", "the",
        "--vocabulary.min_frequency", 2, "--vocabulary.size", 300, "--corpus.max_tokens", 2000,
    ]  # fmt: skip
    too_large = job("train", *flags, "--model.adaptive_cutoffs", "[3, 99999]", "--run.name", "large")
    assert (too_large.status, list(tmp_path.iterdir())) == (2, [])
    assert "error: model.adaptive_cutoffs = [3, 99999]: the vocabulary has " in too_large.err
    parts = ["train", *flags, "--run.name", "parts"]
    assert job(*parts, "--train.max_steps", 5).status == 0
    assert job(*parts).status == 0
    assert job("train", *flags, "--run.name", "whole").status == 0
    results = [result(tmp_path / name) for name in ("parts", "whole")]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert results[0]["nats"] == pytest.approx(results[1]["nats"], rel=1e-12)
    runs = [tmp_path / "parts", tmp_path / "whole"]
    one, two = (job("evaluate", *chosen, "--corpus.source", prose) for chosen in (runs[:1], runs))
    assert one.status == two.status == 0
    assert one.out.split()[:2] == two.out.split()[:2]  # of a model and itself: the perplexity
    sampled = job("generate", *runs, "--generate.temperature", 1, "--generate.length", 5, "--generate.prefix", "the")
    assert sampled.status == 0
