"""Averages of the weights are the averages that they claim to be, and are what validation and generation use."""

import dataclasses
import json
from io import BytesIO
from pathlib import Path
from typing import cast

import pytest
import torch
from conftest import job, not_none, result, rows
from test_cuda_graph import new_train_state, small_config
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from job.config.model import ModelConfig
from job.config.schema import Config
from job.config.training import OptimizerConfig
from job.distributed.gradient_sync import ControlFlags
from job.inference.generate import load_model
from job.run.run_dir import open_checkpoint
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.checkpoint import weights_sha256
from job.training.loop import end_epoch, evaluate_lanes, train_steps
from job.training.schedule import Schedule
from job.training.tensor_file import read_tensors
from job.training.train_step import EagerTrainStep


def averaging_config(**optimizer: object) -> Config:
    fields = {"learning_rate": 0.5, **optimizer}
    config = dataclasses.replace(small_config(epochs=3), optimizer=OptimizerConfig(**fields))  # type: ignore[arg-type]
    return dataclasses.replace(config, model=ModelConfig(hidden_size=8))


def weights_and_averages(config: Config) -> tuple[list[Tensor], list[Tensor]]:
    """All weights and their average after each step, as vectors."""
    train_state = new_train_state(config)
    averaged = not_none(train_state.average).averaged
    weights, averages = list[Tensor](), list[Tensor]()
    for _ in range(config.train.epochs):
        for _ in train_steps(train_state, config, ControlFlags):
            for model, vectors in ((train_state.model, weights), (averaged, averages)):
                vectors.append(nn.utils.parameters_to_vector(model.parameters()).clone())
        end_epoch(train_state)
    return weights, averages


@pytest.mark.parametrize(("average_start", "first"), [(0, 0), (7, 7), (0.5, 10)])
def test_mean_is_that_of_all_steps_from_its_start_and_the_weights_before(average_start: float, first: int) -> None:
    weights, averages = weights_and_averages(averaging_config(averaging="mean", average_start=average_start))
    assert len(weights) == 21
    for step in range(first):
        assert torch.equal(averages[step], weights[step])
    for step in range(first, len(weights)):
        mean = torch.stack(weights[first : step + 1]).double().mean(0)
        torch.testing.assert_close(averages[step].double(), mean, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(averages[-1], weights[-1], atol=1e-3)


def test_mean_equals_that_of_torch_averaged_model() -> None:
    config = averaging_config(averaging="mean", average_start=5)
    train_state = new_train_state(config)
    reference = AveragedModel(train_state.model)
    for step, _ in enumerate(train_steps(train_state, config, ControlFlags)):
        if step >= 5:
            reference.update_parameters(train_state.model)
    own = not_none(train_state.average).averaged.state_dict()
    torch.testing.assert_close(own, reference.module.state_dict(), rtol=1e-5, atol=1e-6)


def test_mean_equals_that_of_torch_asgd() -> None:
    config = averaging_config(averaging="mean", average_start=5)
    train_state, reference = new_train_state(config), new_train_state(config)
    optimizer = torch.optim.ASGD(reference.model.parameters(), lambd=0, t0=4)  # averages from its sixth step on
    reference.train_step = dataclasses.replace(cast(EagerTrainStep, reference.train_step), optimizer=optimizer)
    for _ in zip(*(train_steps(state, config, ControlFlags) for state in (train_state, reference)), strict=True):
        pass
    averages = [optimizer.state[parameter]["ax"] for parameter in reference.model.parameters()]
    own = [*not_none(train_state.average).averaged.parameters()]
    torch.testing.assert_close(own, averages, rtol=1e-5, atol=1e-6)


def test_ema_equals_that_of_torch_once_its_decay_is_reached() -> None:
    config = averaging_config(averaging="ema", ema_decay=0.4)  # the decay of the first steps is at most 1/10, 2/11, …
    weights, averages = weights_and_averages(config)
    assert torch.equal(averages[0], weights[0])
    average_function = get_ema_avg_fn(0.4)
    expected = averages[5]
    for step in range(6, len(weights)):
        expected = average_function(expected, weights[step], torch.tensor(step))
        torch.testing.assert_close(averages[step], expected, rtol=1e-5, atol=1e-6)


def test_ema_decay_grows_from_zero_to_its_configured_value() -> None:
    schedule = Schedule(OptimizerConfig(averaging="ema", ema_decay=0.9), 1000, 32)
    decays = [1 - schedule.average_weight(step) for step in range(200)]
    assert decays[:3] == pytest.approx([0, 2 / 11, 3 / 12])
    assert decays == sorted(decays)
    assert decays[-1] == pytest.approx(0.9)


def flags(prose: Path, storage: Path, *more: object) -> list[object]:
    return [
        "--corpus.source", prose, "--corpus.max_tokens", 8000, "--corpus.validation_fraction", 0.1, "--run.storage",
        storage, "--run.name", "run", "--scale.workers", 0, "--model.hidden_size", 16, "--stream.num_steps", 20,
        "--generate.prefix", "the", "--train.epochs", 3, "--optimizer.learning_rate", 2, *more,
    ]  # fmt: skip


def averages_sha256(run: Path) -> str:
    return weights_sha256(open_checkpoint(Folder(str(run))).average)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("averaging", "stop"),
    [
        (["ema", "--model.tied", "true", "--model.embedding_size", 16], 13),
        (["mean"], 20),
        (["mean", "--optimizer.average_start", 5], 17),
    ],
)
def test_train_stopped_and_resumed_gives_average_of_an_uninterrupted_run(
    prose: Path, tmp_path: Path, averaging: list[object], stop: int
) -> None:
    more = ["--optimizer.averaging", *averaging]
    for storage, stages in (("whole", [[]]), ("parts", [["--train.max_steps", stop], []])):
        for stage in stages:
            ended = job("train", *flags(prose, tmp_path / storage, *more, *stage))
            assert ended.status == 0, ended.err
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert result(whole)["weights_sha256"] == result(parts)["weights_sha256"]
    assert averages_sha256(whole) == averages_sha256(parts) != result(whole)["weights_sha256"]
    assert result(whole)["generated"] == result(parts)["generated"]


@pytest.fixture(scope="module")
def run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a mean of its weights."""
    storage = tmp_path_factory.mktemp("runs")
    ended = job("train", *flags(prose, storage, "--optimizer.averaging", "mean"))
    assert ended.status == 0, ended.err
    return storage / "run"


def test_evaluate_uses_the_average_unless_raw_weights_are_chosen(run: Path, prose: Path) -> None:
    loaded = open_checkpoint(Folder(str(run)))
    text = run.parent / "text.txt"
    text.write_text(prose.read_text()[:500])
    tokens = loaded.vocabulary.encode([text.read_text()])
    found = {}
    for choice, weights in (("auto", loaded.average), ("average", loaded.average), ("raw", loaded.weights)):
        ended = job("evaluate", run, "--corpus.source", text, "--evaluate.weights", choice, "--json")
        model = load_model(dataclasses.replace(loaded, weights=weights, average={}))
        (nats,) = evaluate_lanes(model, tokens, [range(1)], 1, 100)
        found[choice] = json.loads(ended.out)["nats_per_token"]
        assert found[choice] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert found["auto"] == found["average"] != found["raw"]


def test_model_init_takes_the_average_of_a_run(run: Path) -> None:
    config = open_checkpoint(Folder(str(run))).config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=str(run)))
    init = not_none(build_run_spec(config, Folder(str(run.parent / "other"))).init)
    weights, _ = read_tensors(BytesIO(init), len(init))
    assert weights_sha256(weights) == averages_sha256(run)


def test_generate_from_the_average_of_a_run_without_one_is_refused(prose: Path, tmp_path: Path) -> None:
    assert job("train", *flags(prose, tmp_path, "--train.max_steps", 1)).status == 0
    ended = job("generate", tmp_path / "run", "--evaluate.weights", "average")
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert ended.err == (
        "error: evaluate.weights = average: optimizer.averaging = none, so there is no average; set the first to raw, "
        "or the second\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_run_from_a_checkpoint_without_an_average_of_its_kind_starts_it_there(
    averaging: str, prose: Path, tmp_path: Path
) -> None:
    source = flags(prose, tmp_path, "--train.max_steps", 9, "--optimizer.averaging", averaging)
    assert job("train", *source).status == 0
    more = ["--run.name", "next", "--run.resume_from", tmp_path / "run", "--optimizer.averaging", "mean"]
    more += ["--optimizer.average_start", 2, "--train.checkpoint_every", 1, "--train.keep_checkpoints", 9]
    assert job("train", *flags(prose, tmp_path, *more, "--train.max_steps", 12)).status == 0
    folders = sorted(path.name for path in (tmp_path / "next" / "checkpoints").iterdir())
    assert len(folders) == 4  # after 9 steps, the source's, to 12
    *_, last = loaded = [open_checkpoint(Folder(str(tmp_path / "next" / "checkpoints" / name))) for name in folders]
    for name, average in last.average.items():
        torch.testing.assert_close(average, torch.stack([step.weights[name] for step in loaded[1:]]).mean(0))


def test_validation_reports_the_average_in_nats_and_the_weights_in_nats_raw(run: Path, prose: Path) -> None:
    loaded = open_checkpoint(Folder(str(run)))
    dataset = build_run_spec(loaded.config, Folder(str(run))).dataset
    *first, last = rows(run, "validation")
    for key, weights in (("nats", loaded.average), ("nats_raw", loaded.weights)):
        model = load_model(dataclasses.replace(loaded, weights=weights, average={}))
        sums = evaluate_lanes(model, dataset.validation_tokens, [range(32)], 32, 20)
        assert last[key] == pytest.approx(sum(sums) / (len(dataset.validation_tokens) - 1), rel=1e-3)  # of bf16
    assert last["nats"] != last["nats_raw"]
    assert [row["nats"] for row in first] == [row["nats_raw"] for row in first]  # before the mean starts
    found = result(run)
    assert (found["validation_nats"], found["validation_nats_raw"]) == (last["nats"], last["nats_raw"])
    assert loaded.checkpoint.validation_nats == last["nats"]
