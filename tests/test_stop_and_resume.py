"""A run that is stopped and resumed has the same weights, average and decisions as one that was not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from conftest import result, rows
from test_validation import run, stop_at

from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.training.checkpoint import weights_sha256
from job.training.decisions import Decisions

SGD = {"optimizer__name": "sgd", "optimizer__learning_rate": 20}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "constant, ema": {"optimizer__averaging": "ema"},
    "constant, mean": {"optimizer__averaging": "mean", "optimizer__base_batch_size": 2, "optimizer__warmup_steps": 9},
    "cosine, mean": {"optimizer__schedule": "cosine", "optimizer__averaging": "mean", "optimizer__average_start": 0.3},
    "step, ema": {**SGD, "optimizer__schedule": "step", "optimizer__decay_every": 7, "optimizer__averaging": "ema"},
    "plateau, none": {**SGD, "optimizer__schedule": "plateau", "optimizer__momentum": 0.5},
    "plateau, nt-asgd": {
        **SGD, "optimizer__schedule": "plateau", "optimizer__averaging": "nt-asgd", "optimizer__nonmono": 1,
        "optimizer__decay_patience": 2,
    },
    "constant, nt-asgd, patience": {
        **SGD, "optimizer__averaging": "nt-asgd", "optimizer__nonmono": 1, "train__patience": 3,
    },
}  # fmt: skip
STOPS = [("max_steps", 13), ("Ctrl-C", 15), ("max_steps", 15), ("Ctrl-C", 18), ("max_steps", 20)]


def outcome(folder: Path) -> tuple[Any, ...]:
    """All that a resumed run must have in common with an uninterrupted one."""
    loaded = open_checkpoint(Folder(str(folder)))
    validations = {row["step"]: (row["nats"], row.get("nats_raw")) for row in rows(folder, "validation")}
    regular = {step: nats for step, nats in validations.items() if step % 5 == 0}
    digests = weights_sha256(loaded.weights), weights_sha256(loaded.average)
    last = result(folder)
    return digests, loaded.progress.decisions, regular, last["steps"], last["generated"], last["best_checkpoint"][:-8]


def cases() -> list[Any]:
    """Each combination with one stop; with all of them if there is more time."""
    return [
        pytest.param(name, stop, marks=pytest.mark.slow if number % len(STOPS) == place else pytest.mark.long)
        for number, name in enumerate(COMBINATIONS)
        for place, stop in enumerate(STOPS)
    ]


@pytest.mark.parametrize(("name", "stop"), cases())
def test_run_that_is_stopped_and_resumed_equals_an_uninterrupted_one(
    prose: Path, tmp_path: Path, name: str, stop: tuple[str, int]
) -> None:
    more, (kind, step) = COMBINATIONS[name], stop
    whole = outcome(run(prose, tmp_path, "whole", **more))
    if kind == "Ctrl-C":
        stop_at(prose, tmp_path, "parts", step, **more)
    else:
        run(prose, tmp_path, "parts", train__max_steps=step, **more)
    assert outcome(run(prose, tmp_path, "parts", **more)) == whole
    decisions = whole[1]
    assert (decisions.reductions > 0) == ("plateau" in name)
    assert (decisions.average_start is not None) == ("nt-asgd" in name)
    assert dataclasses.asdict(decisions) != dataclasses.asdict(Decisions())
