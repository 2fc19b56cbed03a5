"""The number of workers does not matter: real Ray Train workers, the same run."""

import numpy as np
import pytest
from conftest import job, result, rows, start_job
from test_reference import assert_reproduces

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("trace", "workers"),
    [("seed-rnn", 1), ("seed-rnn", 3), ("gru", 2), ("gru", 5), ("lstm", 3), ("lstm", 5)],
    indirect=["trace"],
)
def test_reference_traces_hold_on_any_number_of_workers(trace, workers, tmp_path, on_cluster):
    ended = job("train", *trace.flags, "--scale.workers", workers, "--run.storage", tmp_path, "--run.name", "run")
    assert ended.status == 0, ended.err
    assert {row["workers"] for row in rows(tmp_path / "run", "epoch")} == {workers}
    assert_reproduces(trace, tmp_path / "run", 1e-8)


def test_five_workers_run_on_the_cluster_that_a_job_starts_itself(prose, tmp_path):
    """Even on a machine with fewer cores."""
    flags = ["--corpus.source", prose, "--train.epochs", 2, "--run.storage", tmp_path, "--generate.prefix", "the"]
    flags += ["--train.precision", "fp64", "--model.hidden_size", 32]
    alone = job("train", *flags, "--run.name", "alone", "--scale.workers", 0)
    assert alone.status == 0, alone.err
    five = start_job("train", *flags, "--run.name", "five", "--scale.workers", 5, env={"RAY_ADDRESS": ""})
    out, err = five.communicate(timeout=180)
    assert five.returncode == 0, err
    assert err == ""
    assert "5 workers" in out
    np.testing.assert_allclose(
        [row["nats"] for row in rows(tmp_path / "five", "epoch")],
        [row["nats"] for row in rows(tmp_path / "alone", "epoch")],
        rtol=1e-9,
    )
    assert result(tmp_path / "five")["generated"] == result(tmp_path / "alone")["generated"]
