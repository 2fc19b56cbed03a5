"""Evaluation: lanes, contexts and ensembles against plain loops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import job, search_config

from job.config.config_file import load_config
from job.config.inference import EvaluateConfig
from job.config.model import ModelConfig
from job.config.toml import config_to_toml
from job.errors import UserError
from job.inference import evaluate
from job.inference.evaluate import GROUP_LANES, evaluate_tokens
from job.inference.generate import load_model
from job.nn.language_model import LanguageModel, build_model
from job.run.run_dir import open_checkpoint
from job.storage import Folder

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


def test_evaluate_tokens_of_several_models_with_large_vocabulary_takes_fewer_tokens_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models, sizes = [random_model(1), random_model(2)], []
    expected = evaluate_tokens(models, TOKENS, EvaluateConfig(lanes=4))
    models[1].register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].numel()))
    monkeypatch.setattr(evaluate, "WINDOW_LOGITS", 101 * 28)
    assert evaluate_tokens(models, TOKENS, EvaluateConfig(lanes=4)) == pytest.approx(expected, rel=1e-12)
    assert max(sizes) == 100


def test_evaluate_tokens_of_a_model_twice_is_that_of_the_model() -> None:
    model = random_model()
    alone = evaluate_tokens([model], TOKENS, EvaluateConfig())
    assert evaluate_tokens([model, model], TOKENS, EvaluateConfig()) == pytest.approx(alone, rel=1e-12)


# --- dynamic evaluation ---


def plain_dynamic(model: LanguageModel, config: EvaluateConfig) -> torch.Tensor:
    """The losses of all tokens, by torch's LSTM and optimizer; decay is a pull towards the trained weights."""
    lstm, linear = torch.nn.LSTM(28, 32).double(), torch.nn.Linear(32, 28).double()
    lstm.load_state_dict(model.rnn.state_dict())
    linear.load_state_dict(model.linear.state_dict())
    weights = [*lstm.parameters(), *linear.parameters()]
    trained = [weight.detach().clone() for weight in weights]
    optimizer, state, losses = torch.optim.SGD(weights, lr=config.dynamic), None, []
    for start in range(0, len(TOKENS) - 1, config.dynamic_steps):
        segment = torch.from_numpy(TOKENS[start : start + config.dynamic_steps + 1])
        outputs, state = lstm(torch.nn.functional.one_hot(segment[:-1], 28).double(), state)
        nats = torch.nn.functional.cross_entropy(linear(outputs), segment[1:], reduction="none")
        pulls = [config.dynamic_decay * (old - weight.detach()) for old, weight in zip(trained, weights, strict=True)]
        optimizer.zero_grad()
        nats.mean().backward()
        optimizer.step()
        with torch.no_grad():
            for weight, pull in zip(weights, pulls, strict=True):
                weight.add_(pull)
        state = state[0].detach(), state[1].detach()
        losses.append(nats.detach())
    return torch.cat(losses)


@pytest.mark.parametrize(("steps", "decay"), [(20, 0.0), (7, 0.1), (999, 0.0), (5000, 0.0)])
def test_evaluate_tokens_with_dynamic_equals_sgd_on_the_text(steps: int, decay: float) -> None:
    model = random_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = EvaluateConfig(dynamic=0.5, dynamic_decay=decay, dynamic_steps=steps)
    nats = evaluate_tokens([model], TOKENS, config)
    assert nats == pytest.approx(float(plain_dynamic(model, config).sum()), rel=1e-9)
    is_single_segment = steps >= len(TOKENS) - 1
    static = evaluate_tokens([model], TOKENS, EvaluateConfig())
    assert (nats == pytest.approx(static, rel=1e-9)) == is_single_segment  # whose update comes too late
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_evaluate_tokens_with_dynamic_of_several_models_is_the_mean_of_their_probabilities() -> None:
    models, config = [random_model(1), random_model(2)], EvaluateConfig(dynamic=0.5)
    expected = torch.stack([-plain_dynamic(model, config) for model in models]).exp().mean(0).log().sum()
    assert evaluate_tokens(models, TOKENS, config) == pytest.approx(-float(expected), rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dynamic": 0.1, "lanes": 2}, "evaluate.dynamic = 0.1: the weights follow one lane .*; leave out"),
        ({"dynamic": 0.1, "context": 2}, "evaluate.dynamic = 0.1: the weights follow one lane .*; leave out"),
        ({"dynamic_decay": 0.1}, "evaluate.dynamic_decay = 0.1: evaluate.dynamic = 0 changes no weights; set"),
    ],
)
def test_evaluate_config_with_fields_that_contradict_dynamic_raises(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**fields)


# --- several runs, on the command line ---

FLAGS = {"scale.workers": "0", "model.hidden_size": "16", "train.epochs": "1", "generate.prefix": "the"}
GRID = {"run.seed": {"grid": [0, 1, 2]}}


def train(storage: Path, name: str, text: Path, **flags: object) -> Path:
    words = {**FLAGS, "corpus.source": text, "run.storage": storage, "run.name": name, **flags}
    ended = job("train", *(word for flag, value in words.items() for word in (f"--{flag}", value)))
    assert ended.status == 0, ended.err
    return storage / name


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Path:
    """The folder of a search over three seeds, of which the last trial has not started."""
    folder = tmp_path_factory.mktemp("storage") / "search"
    for seed in (0, 1):
        train(folder / "trials", f"{seed:05d}", prose, **{"run.seed": seed})
    config = load_config(None, {**FLAGS, "corpus.source": str(prose)})
    (folder / "search.toml").write_text(config_to_toml(config, search_config(metric="perplexity", space=GRID)))
    return folder


def test_evaluate_several_runs_and_a_search_is_the_mean_of_their_probabilities(
    search: Path, prose: Path, tmp_path: Path
) -> None:
    runs = [search / "trials" / "00000", search / "trials" / "00001"]
    (tmp_path / "text").write_text(prose.read_text()[:300])
    arguments = ["--corpus.source", tmp_path / "text", "--json"]
    found = json.loads(job("evaluate", *runs, *arguments).out)
    loaded = [open_checkpoint(Folder(str(run))) for run in runs]
    tokens = loaded[0].vocabulary.encode([(tmp_path / "text").read_text()]).astype(np.int64)
    log_probabilities = [-token_nats(load_model(checkpoint).double(), tokens) for checkpoint in loaded]
    expected = -float((torch.stack(log_probabilities).exp().sum(0) / 2).log().mean())
    assert found["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert found["targets"] == 299
    assert found["checkpoints"] == [checkpoint.checkpoint.path.address for checkpoint in loaded]
    assert json.loads(job("evaluate", search, *arguments).out) == found
    line = job("evaluate", search, *arguments[:2]).out
    assert f"over 299 targets (2 models, {tmp_path}/text)" in line


def test_evaluate_runs_of_other_vocabularies_is_one_line(search: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("other words " * 900)
    other = train(tmp_path, "other", tmp_path / "text")
    ended = job("evaluate", search, other)
    first = f"{search}/trials/00000/checkpoints/"
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f": has another vocabulary than {first}" in ended.err


def test_evaluate_search_without_finished_trials_is_one_line(search: Path, tmp_path: Path) -> None:
    (tmp_path / "search.toml").write_text((search / "search.toml").read_text())
    ended = job("evaluate", tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {tmp_path}: no trial of this search is finished; ")


# --- workers ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_evaluate_that_requires_a_gpu_without_one_is_one_line(search: Path) -> None:
    """The text, which may take minutes to prepare, is not read before."""
    ended = job("evaluate", search, "--scale.accelerator", "gpu", "--corpus.source", "/absent")
    problem = "scale.accelerator = gpu: this machine has no GPU that torch can use"
    assert (ended.status, ended.out, ended.err) == (2, "", f"error: {problem}; leave it out\n")


def test_evaluate_out_of_memory_of_the_gpu_is_one_line(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(evaluate, "evaluate_tokens", fail)
    ended = job("evaluate", search)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith("error: evaluation has run out of memory on ")


@pytest.mark.cluster
@pytest.mark.usefixtures("on_cluster")
def test_evaluate_on_workers_has_the_same_bits_as_in_one_process(search: Path, prose: Path, tmp_path: Path) -> None:
    run = search / "trials" / "00000"
    vocabulary = next(run.glob("checkpoints/*/vocabulary.json"))
    flags = ["--corpus.source", prose, "--corpus.store", tmp_path / "store", "--vocabulary.file", vocabulary]
    prepared = job("prepare", *flags, "--scale.workers", 0)
    assert prepared.status == 0, prepared.err
    for source, lanes in ((prose, ["--evaluate.lanes", 50]), (tmp_path / "store", ["--evaluate.context", 100])):
        words = ["evaluate", search, "--corpus.source", source, "--corpus.max_tokens", 20_000, *lanes, "--json"]
        alone, found = job(*words), job(*words, "--scale.workers", 3)
        assert (found.status, found.err) == (0, "")
        assert found.out == alone.out


def test_evaluate_with_more_workers_than_groups_of_lanes_is_one_line(search: Path) -> None:
    ended = job("evaluate", search, "--scale.workers", 2)
    problem = "scale.workers = 2: each worker needs 16 lanes, and there are fewer"
    assert (ended.status, ended.err) == (2, f"error: {problem}; set evaluate.lanes = 32, or evaluate.context\n")
