"""The training algorithm is that of the d2l book: the command line reproduces recorded runs of the book's own code."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Trace, job, result, rows
from safetensors.torch import load_file

PORTABLE = ["portable-rnn", "portable-gru", "portable-lstm"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in PORTABLE[1:]]
SLOW += [pytest.param(name, marks=[pytest.mark.shared, pytest.mark.slow]) for name in ("gru", "lstm")]


def assert_reproduces(trace: Trace, run: Path, tolerance: float) -> None:
    """Every window's loss, every epoch's perplexity, the final norms, and the generated text."""
    losses = np.array([row["nats"] for row in rows(run, "train")])
    np.testing.assert_allclose(losses, trace.arrays["loss"], rtol=tolerance)
    perplexities = [row["perplexity"] for row in rows(run, "epoch")]
    np.testing.assert_allclose(perplexities, trace.arrays["perplexity"], rtol=tolerance)
    summary = result(run)
    weights = load_file(str(run / summary["checkpoint"] / "model.safetensors"))
    for name, weight in weights.items():
        np.testing.assert_allclose(weight.norm(), trace.arrays[f"final.{name}"], rtol=tolerance)
    assert summary["generated"] == trace.meta["generated"]
    vocabulary = json.loads((run / summary["checkpoint"] / "vocabulary.json").read_text())
    assert vocabulary["tokens"] == trace.meta["vocab"]


def train(trace: Trace, folder: Path, *more: object) -> None:
    """Trains in this process as the trace was recorded; the run is stored in ``folder/run``."""
    finished = job("train", *trace.arguments, *more, "--scale.workers", 0, "--run.storage", folder, "--run.name", "run")
    assert finished.status == 0, finished.err


@pytest.mark.parametrize("trace", [PORTABLE[0], *SLOW], indirect=True)
def test_train_with_recorded_settings_reproduces_reference_trace(trace: Trace, tmp_path: Path) -> None:
    train(trace, tmp_path)
    assert_reproduces(trace, tmp_path / "run", 1e-9)


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.parametrize("trace", ["seed-rnn"], indirect=True)
def test_train_on_first_characters_of_book_reproduces_reference_trace(trace: Trace, tmp_path: Path) -> None:
    train(trace, tmp_path)
    assert_reproduces(trace, tmp_path / "run", 1e-9)


@pytest.mark.long
@pytest.mark.shared
@pytest.mark.parametrize("trace", ["seed-whole-book"], indirect=True)
def test_train_on_whole_book_reproduces_first_epochs_of_reference_trace(trace: Trace, tmp_path: Path) -> None:
    train(trace, tmp_path, "--train.epochs", 4)
    losses = [row["nats"] for row in rows(tmp_path / "run", "train")]
    np.testing.assert_allclose(losses, trace.arrays["loss"][: len(losses)], rtol=1e-9)
    perplexities = [row["perplexity"] for row in rows(tmp_path / "run", "epoch")]
    np.testing.assert_allclose(perplexities, trace.arrays["perplexity"][:4], rtol=1e-9)
