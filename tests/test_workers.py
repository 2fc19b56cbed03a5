"""Ray Train workers: any number of them gives the same run, and what happens when they fail."""

import contextlib
import os
import re
import signal
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chaos import CAN_MOUNT, MARK, ChaosRun, command_line, marked_processes, run_chaos
from conftest import Trace, job, not_none, rows, start_job
from test_reference import assert_reproduces

from job.cluster.ray_extensions import FreeResourceScalingPolicy, NodeAddressTorchConfig
from job.cluster.resources import cluster_placement
from job.config.run import ScaleConfig
from job.kernels.build import load_library

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("trace", "workers"),
    [
        ("portable-gru", 2),
        pytest.param("portable-rnn", 1, marks=pytest.mark.long),
        pytest.param("portable-lstm", 3, marks=pytest.mark.long),
    ],
    indirect=["trace"],
)
def test_train_on_workers_reproduces_reference_trace(
    trace: Trace, workers: int, tmp_path: Path, on_cluster: None
) -> None:
    ended = job("train", *trace.arguments, "--scale.workers", workers, "--run.storage", tmp_path, "--run.name", "run")
    assert ended.status == 0, ended.err
    assert {row["workers"] for row in rows(tmp_path / "run", "epoch")} == {workers}
    assert ("in shared memory" in ended.out) == (workers > 1 and load_library() is not None)
    assert_reproduces(trace, tmp_path / "run", 1e-8)


@pytest.mark.long
@pytest.mark.parametrize("trace", ["portable-gru"], indirect=True)
def test_train_with_more_workers_than_cores_starts_cluster_and_reproduces_trace(trace: Trace, tmp_path: Path) -> None:
    flags = [*trace.arguments, "--run.storage", tmp_path, "--run.name", "run", "--scale.workers", 5]
    process = start_job("train", *flags, env={"RAY_ADDRESS": ""})
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert "5 workers" in out
    assert_reproduces(trace, tmp_path / "run", 1e-8)


def train_flags(prose: Path, storage: Path, name: str, *more: object) -> list[object]:
    """The command line of a short run."""
    return [
        "train", "--corpus.source", prose, "--run.storage", storage, "--run.name", name, "--generate.prefix", "the",
        "--model.hidden_size", 32, "--train.epochs", 2, "--train.log_every", 1,
        "--scale.cpus_per_worker", 1, *more,
    ]  # fmt: skip


def test_train_with_more_workers_than_cluster_can_hold_is_refused(
    prose: Path, tmp_path: Path, on_cluster: None
) -> None:
    ended = job(*train_flags(prose, tmp_path / "runs", "big", "--scale.workers", 20))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "can never place more than 8 workers of 1 CPU each" in ended.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_custom_cell_with_nan_loss_stops_on_workers_at_same_step_as_without(
    prose: Path, tmp_path: Path, on_cluster: None
) -> None:
    more = ["--model.cell", "cells:DivergingCell", "--train.checkpoint_every", 3, "--train.precision", "fp64"]
    alone = job(*train_flags(prose, tmp_path, "alone", *more, "--scale.workers", 0))
    assert alone.status == 1
    ended = job(*train_flags(prose, tmp_path, "bomb", *more, "--scale.workers", 3))
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "the loss is nan at step 8" in ended.err
    assert "saved at step 6" in ended.err
    one, three = ([row["nats"] for row in rows(tmp_path / name, "train")] for name in ("alone", "bomb"))
    assert len(one) == 7
    np.testing.assert_allclose(three, one, rtol=1e-9)


@pytest.mark.long
def test_custom_cell_with_unused_weights_trains_equally_on_two_workers(
    prose: Path, tmp_path: Path, on_cluster: None
) -> None:
    more = ["--model.cell", "cells:UnusedWeightsCell", "--train.precision", "fp64", "--train.epochs", 1]
    for name, workers in (("alone", 0), ("two", 2)):
        ended = job(*train_flags(prose, tmp_path, name, *more, "--scale.workers", workers))
        assert ended.status == 0, ended.err
    one, two = ([row["nats"] for row in rows(tmp_path / name, "train")] for name in ("alone", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-9)


def test_scaling_policy_does_not_grow_onto_occupied_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import ScalingConfig

    node = {"CPU": 1.0}
    scale = ScaleConfig(workers="1-3")
    policy = FreeResourceScalingPolicy(
        ScalingConfig(num_workers=(1, 3), resources_per_worker=node, elastic_resize_monitor_interval_s=0),
        cluster_placement(scale, [node] * 3, []),
    )
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {"a": node, "b": node, "c": node})

    def decide(free: list[dict[str, float]], running: int = 0) -> int | None:
        monkeypatch.setattr("job.cluster.ray_extensions.free_resources", lambda: free)
        if running:
            state = SimpleNamespace(num_workers=running, start_time=-1e9)
            return getattr(policy.make_decision_for_running_worker_group(state, None), "num_workers", None)
        return getattr(policy.make_decision_for_non_running_worker_group(), "num_workers", None)

    assert decide([]) == 3  # what an old group held may not be free yet
    assert decide([]) is None
    assert decide([node]) == 1
    assert decide([], running=1) is None
    assert decide([node], running=1) == 2
    assert decide([node, node], running=1) == 3
    assert decide([]) == 3


def listening_addresses(processes: list[int]) -> set[str]:
    """The addresses, in hexadecimal as in /proc, on which processes accept connections over IPv4 and IPv6."""
    sockets = set()
    for process in processes:
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir()}
    tables = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = "0A"
    return {row[1].partition(":")[0] for row in tables if row[3] == listening and f"socket:[{row[9]}]" in sockets}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the sockets of processes are read from /proc")
def test_own_cluster_is_closed_to_others_and_an_interrupt_saves_and_leaves_nothing(prose: Path, tmp_path: Path) -> None:
    """It starts without a home or a token, and although the path of TMPDIR is too long for Ray's sockets."""
    mark, home = uuid.uuid4().hex, tmp_path / "home"
    long_folder = tmp_path / ("x" * 100)
    for folder in (home, long_folder):
        folder.mkdir()
    command = train_flags(prose, tmp_path, "run", "--train.epochs", 3000, "--scale.workers", 2)
    env = {"RAY_ADDRESS": "", "HOME": str(home), "TMPDIR": str(long_folder), MARK: mark}
    process = start_job(*command, env=env, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    processes = marked_processes(mark)
    # 127.0.0.1, also in the notation of IPv6
    assert listening_addresses(processes) == {"0100007F", "0000000000000000FFFF00000100007F"}
    raylet = next(process for process in processes if "/raylet/raylet " in command_line(process))
    (option,) = (word for word in command_line(raylet).split() if word.startswith("--session_dir="))
    session = Path(option.partition("=")[2])
    assert session.parents[1].stat().st_mode & 0o777 == 0o700
    environment = Path(f"/proc/{raylet}/environ").read_bytes().split(b"\0")
    (token,) = (word.partition(b"=")[2] for word in environment if word.startswith(b"RAY_AUTH_TOKEN="))
    assert token.decode() != os.environ["RAY_AUTH_TOKEN"]
    files = [path for folder in (session, home, long_folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if token in path.read_bytes()] == []
    assert [process for process in processes if token.decode() in command_line(process)] == []
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the whole process group
    out, err = process.communicate(timeout=90)
    assert (process.returncode, err) == (130, "")
    steps = len(rows(tmp_path / "run", "train"))
    assert f"stopped at step {steps:,}; saved at step {steps:,}." in out
    deadline = time.monotonic() + 30  # Ray's agents end after their node
    while left := marked_processes(mark):
        assert time.monotonic() < deadline, [command_line(process) for process in left]
        time.sleep(0.2)
    assert not session.parent.exists()
    again = job(*command, "--scale.workers", 0, "--train.max_steps", steps + 2)
    assert f"resuming from step {steps:,}" in again.out


@pytest.mark.long
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_train_whose_cluster_dies_fails_with_what_was_saved(prose: Path, tmp_path: Path, name: str) -> None:
    """Ray itself would end the driver without an error, after up to a minute."""
    mark = uuid.uuid4().hex
    flags = train_flags(prose, tmp_path, "run", "--train.epochs", 3000, "--scale.workers", 2)
    process = start_job(*flags, "--train.checkpoint_every", 10, env={"RAY_ADDRESS": "", MARK: mark})
    while not list(tmp_path.glob("run/checkpoints/*/manifest.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    (victim,) = (other for other in marked_processes(mark) if f"/{name} " in command_line(other))
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert (process.returncode, err.count("\n")) == (1, 1), err
    assert err.startswith(f"error: Ray's process {name} ended unexpectedly")
    assert re.search(r"saved at step \d[\d,]*\. Resume: the same command with --run\.name run\.", err)


@pytest.mark.long
def test_chaos_run_gives_result_of_undisturbed_run(stored_prose: Path, tmp_path: Path) -> None:
    """``make storm`` has more faults, among them a stopped worker, which takes longest."""
    flags = ["--corpus.source", str(stored_prose), "--generate.prefix", "the", "--model.cell", "lstm"]
    flags += ["--model.num_layers", "2", "--model.hidden_size", "[32, 24]", "--model.dropout", "0.3"]
    flags += ["--model.embedding_size", "24", "--model.tied", "true", "--model.dropout_locked", "true"]
    flags += ["--model.input_dropout", "0.1", "--model.embedding_dropout", "0.1", "--model.weight_drop", "0.2"]
    flags += ["--model.activation_regularization", "2", "--model.temporal_regularization", "1"]
    flags += ["--train.epochs", "1000"]
    faults = ("kill worker", "kill node", "kill driver", "node joins")
    run_chaos(flags, 450, faults, 5, "reproducible", tmp_path)


@pytest.mark.long
@pytest.mark.skipif(not CAN_MOUNT, reason="this machine allows no mount namespaces")
def test_run_that_a_lost_mount_ends_resumes_with_the_same_result(prose: Path, tmp_path: Path) -> None:
    flags = ["--corpus.source", str(prose), "--generate.prefix", "the", "--train.epochs", "1000"]
    run_chaos(flags, 300, ["lose mount"], 5, "reproducible", tmp_path)


@pytest.mark.long
def test_run_that_a_dead_head_or_another_kernel_ends_resumes_with_the_same_result(prose: Path, tmp_path: Path) -> None:
    flags = ["--corpus.source", str(prose), "--generate.prefix", "the", "--train.epochs", "1000"]
    run_chaos(flags, 400, ["no kernel", "kill GCS"], 5, "reproducible", tmp_path)


@pytest.mark.long
def test_workers_that_always_die_fail_the_run(
    prose: Path, tmp_path: Path, on_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if they are killed before they can report an error."""
    monkeypatch.setattr("job.run.run_status.MAX_CONSECUTIVE_FAILURES", 2)
    ended = job(*train_flags(prose, tmp_path, "run", "--scale.workers", 1, "--model.cell", "cells:ExitingCell"))
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "the workers failed 2 times without reaching a checkpoint" in ended.err
    assert "warning: worker 0: ActorDiedError" in ended.out


def test_backend_aborts_group_that_cannot_connect_with_error_that_ray_retries() -> None:
    import ray.exceptions
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    class Group:
        aborted = False

        def execute_single(self, *_: Any) -> None:
            raise ray.exceptions.RayTaskError("execute", "a traceback", RuntimeError("connection reset"))

        def abort(self) -> None:
            self.aborted = True

    group, config = Group(), NodeAddressTorchConfig()
    with pytest.raises(WorkerGroupStartupFailedError) as raised:
        config.backend_cls().on_start(group, config)
    assert group.aborted
    assert str(raised.value.__cause__) == "connection reset"


@pytest.mark.slow
def test_announced_preemption_saves_checkpoint(prose: Path, tmp_path: Path) -> None:
    """No other checkpoint is due for a thousand seconds or an epoch."""
    flags = train_flags(prose, tmp_path, "disturbed", "--model.cell", "lstm", "--train.checkpoint_every", "1000s")[1:]
    flags += ["--train.epochs", 4, "--stream.num_steps", 2, "--train.reproducible", "true", "--train.precision", "fp32"]
    run = ChaosRun([str(flag) for flag in flags], tmp_path, "1", nodes=1)
    try:
        run.start_driver()
        assert run.wait_for_step(50)
        started = time.monotonic()
        run.announce_preemption(run.nodes[0].node_id, 15)
        while not list(run.run.glob("checkpoints/*/manifest.json")):
            assert time.monotonic() - started < 14, "nothing was saved before the deadline"
            assert not_none(run.driver).poll() is None
            time.sleep(0.05)
    finally:
        run.close()
