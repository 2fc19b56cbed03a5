"""Existing clusters: submitted jobs, an autoscaler, wrong configurations and several hosts."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chaos import CAN_MOUNT
from conftest import ROOT, job, result, rows, start_job, wait_until
from ray_nodes import RAY, RayNodes, free_port
from test_tracking import mlflow_rows
from test_workers import train_flags

from job.kernels.build import load_library

pytestmark = pytest.mark.cluster


class JobServer(RayNodes):
    """A head with one CPU and a job server."""

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        dashboard = ("--dashboard-host=127.0.0.1", f"--dashboard-port={self.url.rpartition(':')[2]}")
        agent = (
            f"--dashboard-agent-listen-port={free_port()}"  # the default is in use if another head runs on this machine
        )
        super().__init__("--num-cpus=1", agent, *dashboard)

    def ray_job(self, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Runs ``ray job``."""
        verb, *rest = map(str, arguments)
        command = [str(RAY), "job", verb, "--address", self.url, *rest]
        return subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def submit(self, name: str, *command: object, wait: bool = True) -> subprocess.CompletedProcess[str]:
        options = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        return self.ray_job("submit", *options, "--", "python", "-m", "job", *command)

    def status(self, name: str) -> str:
        reply = self.ray_job("status", name)
        match = re.search(rf"Job '{name}' (?:was )?(\w+)", reply.stdout + reply.stderr)
        assert match, reply.stdout + reply.stderr
        return match[1]


@pytest.fixture(scope="module")
def job_server() -> Iterator[JobServer]:
    nodes = JobServer()
    # The agent that starts jobs is ready later than the head.
    wait_until(lambda: nodes.ray_job("submit", "--", "true").returncode == 0, 90, "no job can be submitted")
    yield nodes
    nodes.close()


def test_submitted_job_with_relative_storage_fails(job_server: JobServer, prose: Path) -> None:
    """Relative storage would be in the job's own folder, which is deleted with it."""
    ended = job_server.submit("relative", *train_flags(prose, Path("runs"), "run"))
    assert ended.returncode != 0
    assert "error: run.storage = runs: is in this job's session folder" in ended.stdout + ended.stderr
    assert job_server.status("relative") == "failed"


def test_stopped_job_resumes_when_submitted_again(job_server: JobServer, stored_prose: Path, tmp_path: Path) -> None:
    """So does its run of a tracker, to which the driver sends each step once."""
    tracker = ["--tracking.mlflow", f"sqlite:///{tmp_path}/mlflow.db", "--tracking.checkpoint", "false"]
    size = ["--model.hidden_size", 1024]  # a step takes longer than the driver needs to record it
    command = train_flags(stored_prose, tmp_path, "run", "--scale.workers", 1, "--train.epochs", 3000, *size, *tracker)
    started = job_server.submit("long", *command, wait=False)
    assert started.returncode == 0, started.stdout + started.stderr
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, 120, "no step was taken")
    tracking = tmp_path / "run" / "tracking" / "mlflow.json"
    wait_until(lambda: tracking.exists() and json.loads(tracking.read_text())["run"], 120, "no run was created")
    assert job_server.ray_job("stop", "long").returncode == 0
    assert job_server.status("long") == "stopped"
    steps = len(rows(tmp_path / "run", "train"))
    assert list(tmp_path.glob(f"run/checkpoints/step-{steps:06d}-*/manifest.json"))
    again = job_server.submit("again", *command, "--train.max_steps", steps + 3)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resuming from step {steps:,}" in again.stdout
    assert load_library() is None or "without the compiled kernel" not in again.stdout
    trained = rows(tmp_path / "run", "train")
    assert [row["step"] for row in trained] == list(range(1, steps + 4))
    assert mlflow_rows(tmp_path / "mlflow.db", "train/nats") == [(row["step"], row["nats"]) for row in trained]
    # The log has no control characters.
    assert not re.search(r"[\r\x1b]", again.stdout.partition("perplexity")[2].partition("curve")[0])
    assert re.search(r"^perplexity \S+ after \d+ epochs", again.stdout, re.MULTILINE)
    assert job_server.status("again") == "succeeded"


@pytest.mark.long
def test_submitted_search_succeeds(job_server: JobServer, prose: Path, tmp_path: Path) -> None:
    command = train_flags(prose, tmp_path, "search", "--scale.workers", 0, "--corpus.validation_fraction", 0.1)[1:]
    options = ["--submission-id", "search", "--working-dir", "."]
    tune = ["python", "-m", "job", "tune", "configs/tune.toml"]
    ended = job_server.ray_job(
        "submit", *options, "--", *tune, *command, "--search.trials", 2, "--search.scheduler", "none"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "best is trial" in ended.stdout
    assert job_server.status("search") == "succeeded"
    assert (tmp_path / "search" / "best.toml").exists()


# --- an autoscaler ---


@pytest.fixture(scope="module")
def autoscaled() -> Iterator[RayNodes]:
    """A head with one CPU, and an autoscaler that may add two nodes with one CPU."""
    node_types = {"small": {"resources": {"CPU": 1}, "max_workers": 2}}
    nodes = RayNodes("--num-cpus=1", "--include-dashboard=false", node_types=node_types)
    yield nodes
    nodes.close()


@pytest.mark.long
def test_train_with_more_workers_than_autoscaler_can_add_is_refused_train(
    autoscaled: RayNodes, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", autoscaled.address)
    ended = job(*train_flags(prose, tmp_path, "run", "--scale.workers", 9))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "can never place more than 3 workers of 1 CPU each" in ended.err


@pytest.mark.long
def test_train_waits_for_autoscaled_node(
    autoscaled: RayNodes, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on a head with one CPU. The node is removed again when it is idle."""
    monkeypatch.setenv("RAY_ADDRESS", autoscaled.address)
    monkeypatch.setattr("job.cluster.waiting.FIRST_NOTICE_S", 0.5)
    monkeypatch.setattr("job.cluster.waiting.REPEAT_NOTICE_S", 1)
    ended = job(*train_flags(prose, tmp_path, "run", "--scale.workers", 2))
    assert ended.status == 0, ended.err
    assert re.search(r"waiting for 1 of 2 workers \(1 CPU each\): .*autoscaler has been asked for more", ended.out)
    assert {row["workers"] for row in rows(tmp_path / "run", "epoch")} == {2}
    wait_until(lambda: autoscaled.num_raylets() == 1, 120, "the added node is not removed")


@pytest.mark.long
def test_doctor_on_cluster_checks_nodes_and_workers(
    autoscaled: RayNodes, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")  # which --address sets for the command's process
    command = ["doctor", "--address", autoscaled.address, "--corpus.source", prose, "--run.storage", tmp_path / "runs"]
    command += ["--generate.prefix", "the"]
    healthy = job(*command, "--scale.workers", 3)
    assert healthy.status == 0, healthy.out
    assert "an autoscaler adds more" in healthy.out
    assert "3 of 1 CPU each can be placed once the autoscaler has added nodes" in healthy.out
    assert not (tmp_path / "runs").exists()
    failing = job(*command, "--scale.workers", 9, "--stream.num_steps", 10**6)
    assert failing.status == 1
    failed = [line.split()[1] for line in failing.out.splitlines() if line.startswith("FAIL")]
    assert failed == ["text", "workers"]
    assert "→ lower scale.workers" in failing.out


# --- wrong configurations ---


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("127.0.0.1:1", "cannot connect: Connection refused"),
        ("127.0.0.1", "must be HOST:PORT"),
        ("ray://127.0.0.1:10001", "use ray job submit"),
    ],
)
def test_train_with_wrong_address_is_refused_train(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, part: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    ended = job(*train_flags(prose, tmp_path / "runs", "run"))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f"RAY_ADDRESS = {address}: " in ended.err
    assert part in ended.err
    assert not (tmp_path / "runs").exists()


def refused_train(cluster: RayNodes, prose: Path, tmp_path: Path, *flags: object, **env: str) -> str:
    """Runs a training that is refused. Returns its message."""
    process = start_job(
        *train_flags(prose, tmp_path / "runs", "run", *flags), env={"RAY_ADDRESS": cluster.address, **env}
    )
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.count("\n")) == (2, 1), err
    return err


def test_train_with_wrong_token_is_refused(job_server: JobServer, prose: Path, tmp_path: Path) -> None:
    assert "its token in RAY_AUTH_TOKEN" in refused_train(job_server, prose, tmp_path, RAY_AUTH_TOKEN="b" * 40)


def test_train_with_cell_missing_on_node_is_refused(job_server: JobServer, prose: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\n\nclass Cell(nn.GRU):\n    pass\n")
    flags, python_path = ["--scale.workers", 1, "--model.cell", "mine:Cell"], f"{ROOT}{os.pathsep}{tmp_path}"
    err = refused_train(job_server, prose, tmp_path, *flags, PYTHONPATH=python_path)
    assert "cannot import model.cell = mine:Cell" in err


@pytest.mark.long
def test_train_on_cluster_of_another_version_is_refused(prose: Path, tmp_path: Path) -> None:
    nodes = RayNodes("--num-cpus=1", "--include-dashboard=false")
    try:
        code = f"""
import json
from ray._raylet import GcsClient
from ray._common.usage import usage_constants, usage_lib
client = GcsClient(address="{nodes.address}")
metadata = {{**usage_lib.get_cluster_metadata(client), "ray_version": "2.1.0"}}
client.internal_kv_put(usage_constants.CLUSTER_METADATA_KEY, json.dumps(metadata).encode(), True, namespace=b"cluster")
"""
        subprocess.run([sys.executable, "-c", code], env=nodes.env, check=True)
        err = refused_train(nodes, prose, tmp_path)
        assert "The cluster was started with: Ray: 2.1.0" in err
        assert "use the versions that the cluster has" in err
    finally:
        nodes.close()


# --- across hosts ---


def succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


CAN_ADD_NETWORK_NAMESPACES = succeeds("ip", "netns", "add", "lanes-try") and succeeds("ip", "netns", "del", "lanes-try")


@pytest.mark.long
@pytest.mark.skipif(not CAN_MOUNT, reason="this machine allows no mount namespaces")
def test_train_with_storage_missing_on_node_is_refused(prose: Path, tmp_path: Path) -> None:
    """The other node has its own disk mounted there."""
    storage = tmp_path / "runs"
    storage.mkdir()
    nodes = RayNodes("--num-cpus=1", "--include-dashboard=false")
    try:
        private_mount = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {storage} && exec "$@"', "sh")
        nodes.start(f"--address={nodes.address}", "--num-cpus=1", namespace=private_mount)
        err = refused_train(nodes, prose, tmp_path, "--scale.workers", "2")
        assert re.search(rf"run.storage = {storage}: node \S+ does not see files that this machine writes there", err)
        assert list(storage.iterdir()) == []
    finally:
        nodes.close()


class VirtualHosts:
    """Two hosts: network namespaces connected by a veth pair."""

    def __init__(self) -> None:
        self.names = [f"lanes-{os.getpid()}-{number}" for number in (1, 2)]
        self.ips = ["10.213.77.1", "10.213.77.2"]
        ends = [f"v{os.getpid() % 10**6}-{number}" for number in (1, 2)]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", self.names[0], "type", "veth", "peer", ends[1], "netns", self.names[1])
        self.interface = ends[1]
        for name, end, address in zip(self.names, ends, self.ips, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def namespace(self, host: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[host]]

    def set_link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", self.interface, state)

    def close(self) -> None:
        for name in self.names:
            ip("netns", "del", name)


def ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True)


@pytest.mark.long
@pytest.mark.skipif(not CAN_ADD_NETWORK_NAMESPACES, reason="this machine allows no network namespaces")
def test_train_across_hosts_survives_interrupted_network_and_equals_one_process(prose: Path, tmp_path: Path) -> None:
    command = train_flags(
        prose, tmp_path, "across", "--train.precision", "fp64", "--scale.workers", 2, "--train.epochs", 20
    )
    alone = job(
        *train_flags(prose, tmp_path, "alone", "--train.precision", "fp64", "--scale.workers", 0, "--train.epochs", 20)
    )
    assert alone.status == 0, alone.err
    hosts = VirtualHosts()
    try:
        nodes = RayNodes("--num-cpus=1", "--include-dashboard=false", namespace=hosts.namespace(0), ip=hosts.ips[0])
        try:
            nodes.start(f"--address={nodes.address}", "--num-cpus=1", namespace=hosts.namespace(1), ip=hosts.ips[1])
            process = subprocess.Popen(
                [*hosts.namespace(0), sys.executable, "-m", "job", *map(str, command)],
                cwd=ROOT,
                env={**nodes.env, "RAY_ADDRESS": nodes.address},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            metrics = tmp_path / "across" / "metrics.jsonl"
            wait_until(
                lambda: (metrics.exists() and metrics.stat().st_size) or process.poll() is not None, 120, "no step"
            )
            hosts.set_link("down")
            time.sleep(3)
            before = metrics.stat().st_size
            time.sleep(1)
            assert metrics.stat().st_size == before, "the workers do not use this network"
            hosts.set_link("up")
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, err + out
        finally:
            nodes.close()
    finally:
        hosts.close()
    assert {row["workers"] for row in rows(tmp_path / "across", "epoch")} == {2}
    np.testing.assert_allclose(
        [row["nats"] for row in rows(tmp_path / "across", "epoch")],
        [row["nats"] for row in rows(tmp_path / "alone", "epoch")],
        rtol=1e-9,
    )
    assert result(tmp_path / "across")["generated"] == result(tmp_path / "alone")["generated"]
