"""The algorithm is the d2l book's: its own code's recorded runs, reproduced through the command line."""

import json

import numpy as np
import pytest
from conftest import job, result, rows
from safetensors.torch import load_file

SHORT = ["gru", "lstm", pytest.param("seed-rnn", marks=pytest.mark.slow)]


def assert_reproduces(trace, run, tolerance):
    """Every window's loss, every epoch's perplexity, the final norms, and the generated text."""
    losses = np.array([row["nats"] for row in rows(run, "train")])
    np.testing.assert_allclose(losses, trace.arrays["loss"], rtol=tolerance)
    perplexities = [row["perplexity"] for row in rows(run, "epoch")]
    np.testing.assert_allclose(perplexities, trace.arrays["perplexity"], rtol=tolerance)
    found = result(run)
    weights = load_file(str(run / found["checkpoint"] / "model.safetensors"))
    for name, weight in weights.items():
        np.testing.assert_allclose(weight.norm(), trace.arrays[f"final.{name}"], rtol=tolerance)
    assert found["generated"] == trace.meta["generated"]
    vocabulary = json.loads((run / found["checkpoint"] / "vocabulary.json").read_text())
    assert vocabulary["tokens"] == trace.meta["vocab"]


@pytest.mark.parametrize("trace", SHORT, indirect=True)
def test_a_run_reproduces_the_books(trace, tmp_path):
    ended = job("train", *trace.flags, "--scale.workers", 0, "--run.storage", tmp_path, "--run.name", "run")
    assert ended.status == 0, ended.err
    assert_reproduces(trace, tmp_path / "run", 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["seed-whole-book"], indirect=True)
def test_the_whole_book_reproduces_the_books(trace, tmp_path):
    """Its first four epochs of fifty; what is wrong shows at once."""
    flags = [*trace.flags, "--train.epochs", 4]
    ended = job("train", *flags, "--scale.workers", 0, "--run.storage", tmp_path, "--run.name", "run")
    assert ended.status == 0, ended.err
    losses = [row["nats"] for row in rows(tmp_path / "run", "train")]
    np.testing.assert_allclose(losses, trace.arrays["loss"][: len(losses)], rtol=1e-9)
    perplexities = [row["perplexity"] for row in rows(tmp_path / "run", "epoch")]
    np.testing.assert_allclose(perplexities, trace.arrays["perplexity"][:4], rtol=1e-9)
