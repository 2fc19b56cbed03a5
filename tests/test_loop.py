"""The training loop reads the statistics of a step while the next one runs; tested with the CPU in the GPU's place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job, result, rows
from test_cuda_graph import new_train_state, small_config

from job.config.training import TrainConfig
from job.distributed.gradient_sync import ControlFlags
from job.errors import Diverged
from job.training import loop
from job.training.loop import train_steps
from job.training.progress import Progress


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Reads statistics as late as on a GPU."""
    original = loop._can_read_later

    def can_read_later(progress: Progress, train_config: TrainConfig, _: torch.device) -> bool:
        return original(progress, train_config, torch.device("cuda"))

    monkeypatch.setattr(loop, "_can_read_later", can_read_later)
    return monkeypatch


def numbers(run: Path) -> list[dict[str, Any]]:
    """All rows of metrics without times."""
    return [
        {key: value for key, value in row.items() if key not in ("time", "tokens_per_second")}
        for split in ("train", "epoch", "validation")
        for row in rows(run, split)
    ]


@pytest.mark.parametrize("log_every", [0, 3])
def test_run_whose_statistics_are_read_late_has_the_same_rows_checkpoints_and_result(
    log_every: int, prose: Path, tmp_path: Path, read_late: pytest.MonkeyPatch
) -> None:
    flags = [
        "train", "--corpus.source", prose, "--corpus.max_tokens", 2000, "--corpus.validation_fraction", 0.1,
        "--stream.num_steps", 5, "--model.hidden_size", 16, "--train.epochs", 2, "--train.log_every", log_every,
        "--train.checkpoint_every", 4, "--train.keep_checkpoints", 20, "--train.max_steps", 17,
        "--generate.prefix", "the", "--scale.workers", 0, "--run.storage", tmp_path, "--run.name",
    ]  # fmt: skip
    assert job(*flags, "late").status == 0
    read_late.undo()
    assert job(*flags, "at-once").status == 0
    late, at_once = (tmp_path / name for name in ("late", "at-once"))
    assert numbers(late) == numbers(at_once)
    assert len(rows(late, "train")) == (17 // 3 if log_every else len(rows(late, "epoch")) - 1)
    assert result(late)["weights_sha256"] == result(at_once)["weights_sha256"]
    steps = [
        sorted(path.name.rpartition("-")[0] for path in (run / "checkpoints").iterdir()) for run in (late, at_once)
    ]
    assert steps[0] == steps[1]
    assert len(steps[0]) > 4


def test_train_steps_reads_statistics_of_one_step_late_and_acts_on_flags_with_complete_progress(
    read_late: pytest.MonkeyPatch,
) -> None:
    config = small_config(epochs=1)
    train_state = new_train_state(config)
    tokens, requested_at = train_state.stream.tokens_per_step, 4
    missing = []
    for step in train_steps(
        train_state, config, lambda: ControlFlags(stop=train_state.progress.step + 1 == requested_at)
    ):
        missing.append(train_state.progress.step - train_state.progress.epoch_mean.tokens // tokens)
        if step.stats.flags.stop:
            break
    assert missing == [0, 1, 1, 1, 0]  # the first step has no loss to show before it; the last acts on a request


def test_train_steps_whose_statistics_are_read_late_names_step_of_nan_loss(read_late: pytest.MonkeyPatch) -> None:
    config = small_config(epochs=1)
    train_state = new_train_state(config)
    weight = train_state.model.linear.weight
    with pytest.raises(Diverged, match="the loss is nan at step 4 "):
        for _ in train_steps(train_state, config, ControlFlags):
            if train_state.progress.step == 3:
                weight.data.fill_(torch.nan)
