"""The number of workers does not matter: real Ray Train workers, the same run."""

import os
import signal
import time
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import storm
from conftest import job, result, rows, start_job
from test_reference import assert_reproduces

from job.cluster.ray_extensions import FreeResourceScalingPolicy, GlooInterfaceTorchConfig
from job.cluster.resources import NO_AUTOSCALER, cluster_placement
from job.config.schema import ScaleConfig
from job.kernels.build import load_library

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("trace", "workers"),
    [("seed-rnn", 1), ("gru", 2), ("lstm", 3)],
    indirect=["trace"],
)
def test_reference_traces_hold_on_any_number_of_workers(trace, workers, tmp_path, on_cluster):
    ended = job("train", *trace.flags, "--scale.workers", workers, "--run.storage", tmp_path, "--run.name", "run")
    assert ended.status == 0, ended.err
    assert {row["workers"] for row in rows(tmp_path / "run", "epoch")} == {workers}
    assert ("in one memory" in ended.out) == (workers > 1 and load_library() is not None)
    assert_reproduces(trace, tmp_path / "run", 1e-8)


@pytest.mark.parametrize("trace", ["gru"], indirect=True)
def test_five_workers_run_on_the_cluster_that_a_job_starts_itself(trace, tmp_path):
    """Even on a machine with fewer cores, and reproduce the book's run."""
    flags = [*trace.flags, "--run.storage", tmp_path, "--run.name", "run", "--scale.workers", 5]
    process = start_job("train", *flags, env={"RAY_ADDRESS": ""})
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert "5 workers" in out
    assert_reproduces(trace, tmp_path / "run", 1e-8)


def small(prose, storage, name, *more):
    return [
        "train", "--corpus.source", prose, "--run.storage", storage, "--run.name", name, "--generate.prefix", "the",
        "--model.hidden_size", 32, "--train.epochs", 2, "--train.log_every", 1,
        "--scale.cpus_per_worker", 1, *more,
    ]  # fmt: skip


def test_reproducible_runs_have_the_same_bits_on_any_number_of_workers(prose, tmp_path, on_cluster):
    more = ["--train.reproducible", "true", "--train.precision", "fp32", "--model.dropout", 0.3]
    more += ["--model.cell", "lstm", "--model.num_layers", 2, "--corpus.validation_fraction", 0.1]
    found = {}
    for workers in (0, 3):
        ended = job(*small(prose, tmp_path, f"on-{workers}", *more, "--scale.workers", workers))
        assert ended.status == 0, ended.err
        run = tmp_path / f"on-{workers}"
        losses = [(row["split"], row["step"], row["nats"]) for row in rows(run, "train") + rows(run, "validation")]
        found[workers] = (result(run)["weights_sha256"], losses)
    assert found[0] == found[3]


def test_more_workers_than_a_cluster_can_ever_hold_are_refused(prose, tmp_path, on_cluster):
    ended = job(*small(prose, tmp_path / "runs", "big", "--scale.workers", 20))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "can never place more than 8 workers of 1 CPU each" in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_users_cell_trains_on_ray_until_its_loss_is_no_number(prose, tmp_path, on_cluster):
    more = ["--model.cell", "test_cells:Bomb", "--train.checkpoint_every", 3, "--train.precision", "fp64"]
    alone = job(*small(prose, tmp_path, "alone", *more, "--scale.workers", 0))
    assert alone.status == 1
    ended = job(*small(prose, tmp_path, "bomb", *more, "--scale.workers", 3))
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "the loss is nan at step 8" in ended.err
    assert "step 6 is kept" in ended.err
    one, three = ([row["nats"] for row in rows(tmp_path / name, "train")] for name in ("alone", "bomb"))
    assert len(one) == 7
    np.testing.assert_allclose(three, one, rtol=1e-9)


def test_a_users_weights_without_a_gradient_are_the_same_on_two_workers(prose, tmp_path, on_cluster):
    more = ["--model.cell", "test_cells:Idle", "--train.precision", "fp64", "--train.epochs", 1]
    for name, workers in (("alone", 0), ("two", 2)):
        ended = job(*small(prose, tmp_path, name, *more, "--scale.workers", workers))
        assert ended.status == 0, ended.err
    one, two = ([row["nats"] for row in rows(tmp_path / name, "train")] for name in ("alone", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-9)


def test_a_node_that_others_fill_does_not_end_a_group(monkeypatch):
    """Ray counts what nodes have, of which others may hold a part."""
    from ray.train import ScalingConfig

    one = {"CPU": 1.0}
    scale = ScaleConfig(workers="1-3")
    policy = FreeResourceScalingPolicy(
        ScalingConfig(num_workers=(1, 3), resources_per_worker=one, elastic_resize_monitor_interval_s=0),
        cluster_placement(scale, [one] * 3, NO_AUTOSCALER),
    )
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {"a": one, "b": one, "c": one})

    def decided(free, running=0):
        monkeypatch.setattr("job.cluster.ray_extensions.free_resources", lambda: free)
        if running:
            state = SimpleNamespace(num_workers=running, start_time=-1e9)
            return getattr(policy.make_decision_for_running_worker_group(state, None), "num_workers", None)
        return getattr(policy.make_decision_for_non_running_worker_group(), "num_workers", None)

    assert decided([]) == 3  # what an old group held may not be free yet
    assert decided([]) is None
    assert decided([one]) == 1
    assert decided([], running=1) is None
    assert decided([one], running=1) == 2
    assert decided([one, one], running=1) == 3
    assert decided([]) == 3


def test_ctrl_c_on_ray_saves_and_leaves_no_process(prose, tmp_path):
    mark = uuid.uuid4().hex
    words = small(prose, tmp_path, "run", "--train.epochs", 3000, "--scale.workers", 2)
    process = start_job(*words, env={"RAY_ADDRESS": "", storm.MARK: mark}, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all processes of the group
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    steps = len(rows(tmp_path / "run", "train"))
    assert f"stopped at step {steps:,}; step {steps:,} is kept" in out
    until = time.monotonic() + 30  # Ray's agents see that their node has gone, and go
    while left := storm.probe_file(storm.MARK, mark):
        assert time.monotonic() < until, [storm.title(one) for one in left]
        time.sleep(0.2)
    again = job(*words, "--scale.workers", 0, "--train.max_steps", steps + 2)
    assert f"goes on from step {steps:,}" in again.out


@pytest.mark.slow
def test_a_short_storm_leaves_no_trace(prose, tmp_path):
    """Every kind of blow but the stopped worker, which takes longest; ``make storm`` has it too."""
    flags = ["--corpus.source", str(prose), "--generate.prefix", "the", "--model.cell", "lstm"]
    flags += [
        "--model.num_layers",
        "2",
        "--model.hidden_size",
        "32",
        "--model.dropout",
        "0.3",
        "--train.epochs",
        "1000",
    ]
    kinds = ("kill worker", "kill node", "kill driver", "node joins")
    storm.storm(flags, 450, kinds, 5, "reproducible", tmp_path)


@pytest.mark.slow
def test_workers_that_always_die_end_the_run(prose, tmp_path, on_cluster, monkeypatch):
    """Not by trying for ever, even where nothing is left to say why."""
    monkeypatch.setattr("job.run.recorder.MAX_CONSECUTIVE_FAILURES", 2)
    ended = job(*small(prose, tmp_path, "run", "--scale.workers", 1, "--model.cell", "test_cells:Dies"))
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "the workers failed 2 times without getting to a checkpoint" in ended.err
    assert "warning: worker 0: ActorDiedError" in ended.out


def test_workers_that_cannot_meet_are_started_again():
    """Ray does so only for an error of its own, and leaves the group that never began in its place."""
    import ray.exceptions
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    class Group:
        aborted = False

        def execute(self, _):
            raise ray.exceptions.RayTaskError("execute", "a traceback", RuntimeError("connection reset"))

        def abort(self):
            self.aborted = True

    group, config = Group(), GlooInterfaceTorchConfig()
    with pytest.raises(WorkerGroupStartupFailedError) as told:
        config.backend_cls().on_start(group, config)
    assert group.aborted
    assert str(told.value.__cause__) == "connection reset"


@pytest.mark.slow
def test_before_a_node_is_taken_away_the_run_is_saved(prose, tmp_path):
    """Ray announces a pre-emption; no other checkpoint is due for a thousand seconds or an epoch."""
    flags = small(prose, tmp_path, "storm", "--model.cell", "lstm", "--train.checkpoint_every", "1000s")[1:]
    flags += ["--train.epochs", 4, "--stream.num_steps", 2, "--train.reproducible", "true", "--train.precision", "fp32"]
    flags = [str(flag) for flag in flags]
    it = storm.Storm(flags, tmp_path, "1", nodes=1)
    try:
        it.start_driver()
        assert it.wait_for_step(50)
        begun = time.monotonic()
        it.announce_preemption(it.nodes[0].node_id, 15)
        while not list(it.run.glob("checkpoints/*/manifest.json")):
            assert time.monotonic() - begun < 14, "nothing was saved before the node went"
            assert it.driver.poll() is None
            time.sleep(0.05)
    finally:
        it.close()
