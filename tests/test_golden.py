"""Numbers and files of an earlier version: the same configuration computes the same, and what it stored resumes.

``tests/golden/63eb800`` was recorded by ``tests/record_golden.py`` from commit 63eb800. Losses agree to 1e-9 in
float64 on every machine, and bit for bit where processor, compiler and libraries are those of the recording.

The values of ``fp32`` were recorded again when the output layer's kernel began to serve models of 8 hidden units, whose
loss had been computed by torch: the losses changed by at most two parts in 10 million.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record_golden
from conftest import ROOT, job
from record_golden import FP32, FP64, outcome, search_arguments, train_arguments

from job.kernels.build import load_library

GOLDEN = ROOT / "tests" / "golden" / "63eb800"
VALUES = json.loads((GOLDEN / "golden.json").read_text())
IS_MACHINE_OF_RECORDING = record_golden.machine() == VALUES["machine"] and load_library() is not None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the corpus and the search space in it."""
    record_golden.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder: Path, name: str, *more: object) -> tuple[dict[str, Any], str]:
    """The outcome of a run in ``folder``, and what it printed."""
    finished = job(*train_arguments(name, *more))
    assert finished.status == 0, finished.err
    return outcome(folder / "runs" / name), finished.out


def assert_equal_numbers(computed: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Losses to 1e-9; on the machine of the recording every bit of losses and weights."""
    np.testing.assert_allclose(computed["train"], recorded["train"], rtol=1e-9)
    for step, nats in recorded["validation"].items():
        np.testing.assert_allclose(computed["validation"][step], nats, rtol=1e-9)
    assert computed["generated"] == recorded["generated"]
    if IS_MACHINE_OF_RECORDING:
        # A run that stopped also validated where it stopped.
        assert computed["validation"].items() >= recorded["validation"].items()
        assert {**computed, "validation": recorded["validation"]} == recorded


@pytest.mark.slow
def test_train_in_float64_reproduces_golden_curve(folder: Path) -> None:
    computed, _ = train(folder, "fp64", *FP64, "--scale.workers", 0)
    assert_equal_numbers(computed, VALUES["fp64"])


@pytest.mark.slow
def test_train_from_interrupted_golden_run_gives_uninterrupted_weights(folder: Path) -> None:
    shutil.copytree(GOLDEN / "run", folder / "runs" / "run")
    resumed, out = train(folder, "run", *FP64, "--scale.workers", 0)
    assert f"from step {record_golden.NUM_STEPS_OF_INTERRUPTED_RUN}" in out
    assert_equal_numbers(resumed, VALUES["fp64"])


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [2, *(pytest.param(count, marks=pytest.mark.long) for count in (3, 4))])
def test_train_reproducibly_on_workers_gives_golden_weights_of_one_process(
    workers: int, folder: Path, on_cluster: None
) -> None:
    alone, _ = train(folder, "alone", *FP32, "--scale.workers", 0)
    together, _ = train(folder, "together", *FP32, "--scale.workers", workers, "--scale.cpus_per_worker", 1)
    assert together == alone
    if IS_MACHINE_OF_RECORDING:
        assert alone == VALUES["fp32"]


@pytest.mark.cluster
@pytest.mark.long
def test_tune_from_interrupted_golden_search_gives_uninterrupted_trials(folder: Path, on_cluster: None) -> None:
    shutil.copytree(GOLDEN / "search", folder / "runs" / "search")
    finished_trial = folder / "runs" / "search" / "trials" / "00000" / "result.json"
    written_at = finished_trial.stat().st_mtime_ns
    finished = job(*search_arguments("search"))
    assert finished.status == 0, finished.err
    assert finished_trial.stat().st_mtime_ns == written_at
    for number, recorded in VALUES["search"].items():
        assert_equal_numbers(outcome(folder / "runs" / "search" / "trials" / number), recorded)
