"""Schedules and what is decided from validation losses, against torch's schedulers and the programs of the papers."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job, result, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from job.config.training import OptimizerConfig
from job.training.decisions import MARGIN_NATS, Decisions
from job.training.schedule import Schedule

losses = st.lists(st.integers(0, 30).map(lambda number: 1 + number / 10), max_size=60)


def decide(nats: list[float], **optimizer: Any) -> Decisions:
    """The decisions after validations at steps 10, 20, …"""
    decisions = Decisions()
    for number, loss in enumerate(nats, 1):
        decisions.add(loss if math.isfinite(loss) else None, 10 * number, OptimizerConfig(**optimizer))
    return decisions


def new_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=8.0)


@settings(deadline=None)  # the first call of torch's scheduler takes a second
@given(losses, st.integers(1, 4))
def test_plateau_reduces_the_learning_rate_when_torch_does(nats: list[float], patience: int) -> None:
    optimizer = new_optimizer()
    reference = ReduceLROnPlateau(
        optimizer, factor=0.25, patience=patience - 1, threshold=MARGIN_NATS, threshold_mode="abs", eps=0
    )
    for loss in nats:
        reference.step(loss)
    config = {"schedule": "plateau", "learning_rate": 8.0, "decay_factor": 0.25, "decay_patience": patience}
    schedule = Schedule(OptimizerConfig(**config), 100, 32)  # type: ignore[arg-type]
    assert schedule.learning_rate(7, decide(nats, **config).reductions) == optimizer.param_groups[0]["lr"]


@given(losses, st.integers(1, 6))
def test_average_is_triggered_when_that_of_awd_lstm_is(nats: list[float], nonmono: int) -> None:
    expected = None
    history: list[float] = []
    for number, loss in enumerate(nats, 1):  # as https://github.com/salesforce/awd-lstm-lm, main.py
        if expected is None and len(history) > nonmono and loss > min(history[:-nonmono]) - MARGIN_NATS:
            expected = 10 * number
        history.append(loss)
    decisions = decide(nats, averaging="nt-asgd", nonmono=nonmono)
    assert decisions.average_start == expected
    assert len(decisions.recent_nats) <= nonmono + 2


@given(losses)
def test_stale_counts_validations_since_the_lowest_loss(nats: list[float]) -> None:
    assert decide(nats).stale == (len(nats) - 1 - nats.index(min(nats)) if nats else 0)


def test_improvement_below_the_margin_and_a_loss_that_is_not_finite_are_none() -> None:
    assert decide([2.0, 2.0 - 0.9 * MARGIN_NATS, math.nan, math.inf]).stale == 3
    assert decide([2.0, 2.0 - 1.1 * MARGIN_NATS]).stale == 0
    assert decide([math.nan, 2.0]).stale == 0


@given(losses)
def test_decisions_that_were_stored_go_on_as_before(nats: list[float]) -> None:
    config = OptimizerConfig(schedule="plateau", averaging="nt-asgd", nonmono=2)
    decisions = whole = Decisions()
    for number, loss in enumerate(nats):
        decisions = Decisions.from_record(json.loads(json.dumps(dataclasses.asdict(decisions))))
        for copy in (decisions, whole):
            copy.add(loss, number, config)
    assert decisions == whole


@pytest.mark.parametrize("change", [{"stale": "1"}, {"recent_nats": ["x"]}, {"recent_nats": 3}, {"best_nats": []}])
def test_stored_decisions_of_another_type_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must have the fields|could not convert"):
        Decisions.from_record(dataclasses.asdict(Decisions()) | change)


def test_step_schedule_equals_that_of_torch() -> None:
    config = OptimizerConfig(schedule="step", learning_rate=8.0, decay_factor=0.3, decay_every=4, warmup_steps=5)
    schedule, optimizer = Schedule(config, 100, 32), new_optimizer()
    reference = StepLR(optimizer, step_size=4, gamma=0.3)
    for step in range(20):
        assert schedule.learning_rate(5 + step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert [schedule.learning_rate(step) for step in range(5)] == pytest.approx([1.6, 3.2, 4.8, 6.4, 8.0])


def test_base_batch_size_scales_the_learning_rate_by_the_root_and_the_epochs_of_the_warm_up() -> None:
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=10, schedule="cosine", base_batch_size=8)
    small, large = (Schedule(config, num_steps, batch) for num_steps, batch in ((400, 8), (100, 32)))
    assert small.peak == 0.5
    assert [large.learning_rate(step) for step in range(10)] == [2 * small.learning_rate(step) for step in range(10)]
    warm_up_epochs = 10 / 400, 10 / 100  # of a run of one epoch
    assert warm_up_epochs[1] == 4 * warm_up_epochs[0]


# --- in runs ---


def flags(prose: Path, storage: Path, *more: object) -> list[object]:
    return [
        "--corpus.source", prose, "--corpus.max_tokens", 9000, "--corpus.validation_fraction", 0.1,
        "--stream.batch_size", 8, "--stream.num_steps", 50, "--run.storage", storage, "--run.name", "run",
        "--scale.workers", 0, "--model.hidden_size", 16, "--generate.prefix", "the", "--train.validate_every", 4,
        "--optimizer.learning_rate", 20, "--train.epochs", 3, "--train.precision", "fp32", *more,
    ]  # fmt: skip


def train(prose: Path, storage: Path, *more: object) -> str:
    ended = job("train", *flags(prose, storage, *more))
    assert ended.status == 0, ended.err
    return ended.out


@pytest.mark.slow
def test_train_stops_early_and_with_more_patience_continues_as_if_it_had_not(prose: Path, tmp_path: Path) -> None:
    out = train(prose, tmp_path / "parts", "--train.patience", 2)
    assert "stopped early: no improvement in 2 validations" in out
    run = tmp_path / "parts" / "run"
    stopped = result(run)
    assert (stopped["stopped_early"], stopped["validations_without_improvement"]) == (True, 2)
    *older, before, last = [row["nats"] for row in rows(run, "validation")]
    assert min(older) < min(before, last) + MARGIN_NATS
    assert "is finished; to train longer, raise train.patience" in train(
        prose, tmp_path / "parts", "--train.patience", 2
    )
    train(prose, tmp_path / "parts", "--train.patience", 3)
    train(prose, tmp_path / "whole", "--train.patience", 3)
    whole, parts = result(tmp_path / "whole" / "run"), result(run)
    assert parts["steps"] > stopped["steps"]
    for key in ("steps", "weights_sha256", "stopped_early", "validations_without_improvement"):
        assert parts[key] == whole[key]


@pytest.mark.parametrize("field", ["train.patience", "optimizer.schedule", "optimizer.averaging"])
def test_decision_from_validations_without_a_validation_text_is_refused(
    prose: Path, tmp_path: Path, field: str
) -> None:
    value = {"train.patience": 3, "optimizer.schedule": "plateau", "optimizer.averaging": "nt-asgd"}[field]
    more = ["--corpus.validation_fraction", 0, "--train.validate_every", 0, f"--{field}", value]
    ended = job("train", *flags(prose, tmp_path, *more))
    assert ended.status == 2
    assert ended.err == (
        f"error: {field} = {value}: there is no validation text; "
        "set corpus.validation_fraction or validation_source, or leave it out\n"
    )
    assert not tmp_path.joinpath("run").exists()


def test_interval_of_validations_may_not_change_once_they_decide(prose: Path, tmp_path: Path) -> None:
    plateau = "--optimizer.schedule", "plateau", "--train.max_steps"
    train(prose, tmp_path, *plateau, 5)
    ended = job("train", *flags(prose, tmp_path, *plateau, 9, "--train.validate_every", 3))
    assert ended.status == 2
    assert "exists with another configuration: train.validate_every (4 → 3)" in ended.err
