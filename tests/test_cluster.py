"""A company's cluster: jobs submitted to it, nodes that are brought and go, and all that can be wrong with it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, job, result, rows, start_job
from nodes import RAY, Nodes, free_port
from test_workers import small

pytestmark = pytest.mark.cluster


class Company(Nodes):
    """A head of one CPU with a job server."""

    def __init__(self) -> None:
        self.jobs = f"http://127.0.0.1:{free_port()}"
        server = ("--dashboard-host=127.0.0.1", f"--dashboard-port={self.jobs.rpartition(':')[2]}")
        agent = f"--dashboard-agent-listen-port={free_port()}"  # Ray's own is taken where another head runs here
        super().__init__("--num-cpus=1", agent, *server)

    def job(self, *words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """``ray job …``, as a user types it."""
        verb, *rest = map(str, words)
        line = [str(RAY), "job", verb, "--address", self.jobs, *rest]
        return subprocess.run(
            line, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def submit(self, name: str, *words: object, wait: bool = True) -> subprocess.CompletedProcess[str]:
        how = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        return self.job("submit", *how, "--", "python", "-m", "job", *words)

    def status(self, name: str) -> str:
        """What the job server says of a job."""
        said = self.job("status", name)
        found = re.search(rf"Job '{name}' (?:was )?(\w+)", said.stdout + said.stderr)
        assert found, said.stdout + said.stderr
        return found[1]


@pytest.fixture(scope="module")
def company():
    nodes = Company()
    # Ray's head is up before the agent that starts jobs.
    until(lambda: nodes.job("submit", "--", "true").returncode == 0, 90, "no job can be submitted")
    yield nodes
    nodes.close()


def until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def test_a_job_that_fails_says_so(company, prose):
    """Relative storage would lie in the job's own folder, which goes with it."""
    ended = company.submit("relative", *small(prose, "runs", "run"))
    assert ended.returncode != 0
    assert "error: run.storage = runs: lies in this job's session folder" in ended.stdout + ended.stderr
    assert company.status("relative") == "failed"


def test_a_stopped_job_goes_on_when_it_is_submitted_again(company, prose, tmp_path):
    words = small(prose, tmp_path, "run", "--scale.workers", 1, "--train.epochs", 3000)
    started = company.submit("long", *words, wait=False)
    assert started.returncode == 0, started.stdout + started.stderr
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size, 120, "no step was taken")
    assert company.job("stop", "long").returncode == 0
    assert company.status("long") == "stopped"
    steps = len(rows(tmp_path / "run", "train"))
    assert list(tmp_path.glob(f"run/checkpoints/step-{steps:06d}-*/manifest.json"))
    again = company.submit("again", *words, "--train.max_steps", steps + 3)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"goes on from step {steps:,}" in again.stdout
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == list(range(1, steps + 4))
    # Its log reads well.
    assert not re.search(r"[\r\x1b]", again.stdout.partition("perplexity")[2].partition("curve")[0])
    assert re.search(r"^perplexity \S+ after \d+ epochs", again.stdout, re.MULTILINE)
    assert company.status("again") == "succeeded"


def test_a_search_is_submitted_as_a_run_is(company, prose, tmp_path):
    words = small(prose, tmp_path, "search", "--scale.workers", 0, "--corpus.validation_fraction", 0.1)[1:]
    line = ["--submission-id", "search", "--working-dir", ".", "--", "python", "-m", "job", "tune", "configs/tune.toml"]
    ended = company.job("submit", *line, *words, "--search.trials", 2, "--search.scheduler", "none")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "best is trial" in ended.stdout
    assert company.status("search") == "succeeded"
    assert (tmp_path / "search" / "best.toml").exists()


# --- an autoscaler ---


@pytest.fixture(scope="module")
def growing():
    """A head of one CPU, and an autoscaler that may bring two nodes of one CPU."""
    kinds = {"small": {"resources": {"CPU": 1}, "max_workers": 2}}
    nodes = Nodes("--num-cpus=1", "--include-dashboard=false", kinds=kinds)
    yield nodes
    nodes.close()


def test_more_than_an_autoscaler_may_ever_bring_is_refused(growing, prose, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", growing.address)
    ended = job(*small(prose, tmp_path, "run", "--scale.workers", 9))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "can never place more than 3 workers of 1 CPU each" in ended.err


def test_the_autoscaler_brings_what_a_run_asks_for(growing, prose, tmp_path, monkeypatch):
    """Two workers on a head with room for one; the node goes again when it is idle."""
    monkeypatch.setenv("RAY_ADDRESS", growing.address)
    monkeypatch.setattr("job.cluster.waiting.FIRST_NOTICE_S", 0.5)
    monkeypatch.setattr("job.cluster.waiting.REPEAT_NOTICE_S", 1)
    ended = job(*small(prose, tmp_path, "run", "--scale.workers", 2))
    assert ended.status == 0, ended.err
    assert re.search(r"waiting for 1 of 2 workers \(1 CPU each\): .*autoscaler has been asked for more", ended.out)
    assert {row["workers"] for row in rows(tmp_path / "run", "epoch")} == {2}
    until(lambda: growing.raylets() == 1, 120, "the node that was brought stays")


def test_the_doctor_looks_at_a_cluster(growing, prose, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")  # which --address sets for the command's process
    words = ["doctor", "--address", growing.address, "--corpus.source", prose, "--run.storage", tmp_path / "runs"]
    words += ["--generate.prefix", "the"]
    well = job(*words, "--scale.workers", 3)
    assert well.status == 0, well.out
    assert "an autoscaler adds more" in well.out
    assert "3 of 1 CPU each can be placed once the autoscaler has added nodes" in well.out
    assert not (tmp_path / "runs").exists()
    ill = job(*words, "--scale.workers", 9, "--stream.num_steps", 10**6)
    assert ill.status == 1
    failed = [line.split()[1] for line in ill.out.splitlines() if line.startswith("FAIL")]
    assert failed == ["text", "workers"]
    assert "→ lower scale.workers" in ill.out


# --- what can be wrong with a cluster ---


@pytest.fixture(scope="module")
def head():
    """A head of two CPUs and nothing else."""
    nodes = Nodes("--num-cpus=2", "--include-dashboard=false")
    yield nodes
    nodes.close()


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("127.0.0.1:1", "cannot connect: Connection refused"),
        ("127.0.0.1", "must be HOST:PORT"),
        ("ray://127.0.0.1:10001", "use ray job submit"),
    ],
)
def test_a_wrong_address_is_told(prose, tmp_path, monkeypatch, address, part):
    monkeypatch.setenv("RAY_ADDRESS", address)
    ended = job(*small(prose, tmp_path / "runs", "run"))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f"RAY_ADDRESS = {address}: " in ended.err
    assert part in ended.err
    assert not (tmp_path / "runs").exists()


def refused(head: Nodes, prose: Path, tmp_path: Path, *words: object, **env: str) -> str:
    """The one line that a command ends with."""
    process = start_job(*small(prose, tmp_path / "runs", "run", *words), env={"RAY_ADDRESS": head.address, **env})
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.count("\n")) == (2, 1), err
    return err


def test_a_refused_token_is_told(head, prose, tmp_path):
    assert "its token in RAY_AUTH_TOKEN" in refused(head, prose, tmp_path, RAY_AUTH_TOKEN="b" * 40)


def test_a_cell_that_only_the_driver_has_is_told(head, prose, tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\n\nclass Cell(nn.GRU):\n    pass\n")
    err = refused(head, prose, tmp_path, "--model.cell", "mine:Cell", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert "cannot import model.cell = mine:Cell" in err


def test_a_cluster_of_another_version_is_told(prose, tmp_path):
    nodes = Nodes("--num-cpus=1", "--include-dashboard=false")
    try:
        code = f"""
import json
from ray._raylet import GcsClient
from ray._common.usage import usage_constants, usage_lib
client = GcsClient(address="{nodes.address}")
facts = {{**usage_lib.get_cluster_metadata(client), "ray_version": "2.1.0"}}
client.internal_kv_put(usage_constants.CLUSTER_METADATA_KEY, json.dumps(facts).encode(), True, namespace=b"cluster")
"""
        subprocess.run([sys.executable, "-c", code], env=nodes.env, check=True)
        err = refused(nodes, prose, tmp_path)
        assert "The cluster was started with: Ray: 2.1.0" in err
        assert "use the versions that the cluster has" in err
    finally:
        nodes.close()


# --- across hosts ---


def allowed(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


CAN_UNSHARE = allowed("unshare", "--mount", "true")
CAN_NAME = allowed("ip", "netns", "add", "lanes-try") and allowed("ip", "netns", "del", "lanes-try")


@pytest.mark.skipif(not CAN_UNSHARE, reason="this machine allows no mount namespaces")
def test_storage_that_only_the_head_sees_is_told(prose, tmp_path):
    """The other node has a disk of its own in that place."""
    storage = tmp_path / "runs"
    storage.mkdir()
    nodes = Nodes("--num-cpus=1", "--include-dashboard=false")
    try:
        apart = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {storage} && exec "$@"', "sh")
        nodes.start(f"--address={nodes.address}", "--num-cpus=1", inside=apart)
        err = refused(nodes, prose, tmp_path, "--scale.workers", "2")
        assert re.search(rf"run.storage = {storage}: node \S+ does not see files that this machine writes there", err)
        assert list(storage.iterdir()) == []
    finally:
        nodes.close()


class Hosts:
    """Two hosts of our own making: network namespaces, joined by a cable of one veth pair."""

    def __init__(self) -> None:
        self.names = [f"lanes-{os.getpid()}-{number}" for number in (1, 2)]
        self.ips = ["10.213.77.1", "10.213.77.2"]
        ends = [f"v{os.getpid() % 10**6}-{number}" for number in (1, 2)]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", self.names[0], "type", "veth", "peer", ends[1], "netns", self.names[1])
        self.cable = ends[1]
        for name, end, address in zip(self.names, ends, self.ips, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def inside(self, host: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[host]]

    def link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", self.cable, state)

    def close(self) -> None:
        for name in self.names:
            ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.mark.skipif(not CAN_NAME, reason="this machine allows no network namespaces")
def test_a_run_across_hosts_is_the_run_on_one_and_outlives_a_cut_cable(prose, tmp_path):
    words = small(prose, tmp_path, "across", "--train.precision", "fp64", "--scale.workers", 2, "--train.epochs", 20)
    alone = job(
        *small(prose, tmp_path, "alone", "--train.precision", "fp64", "--scale.workers", 0, "--train.epochs", 20)
    )
    assert alone.status == 0, alone.err
    hosts = Hosts()
    try:
        nodes = Nodes("--num-cpus=1", "--include-dashboard=false", inside=hosts.inside(0), ip=hosts.ips[0])
        try:
            nodes.start(f"--address={nodes.address}", "--num-cpus=1", inside=hosts.inside(1), ip=hosts.ips[1])
            process = subprocess.Popen(
                [*hosts.inside(0), sys.executable, "-m", "job", *map(str, words)],
                cwd=ROOT,
                env={**nodes.env, "RAY_ADDRESS": nodes.address},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            metrics = tmp_path / "across" / "metrics.jsonl"
            until(lambda: (metrics.exists() and metrics.stat().st_size) or process.poll() is not None, 120, "no step")
            hosts.link("down")
            time.sleep(3)
            before = metrics.stat().st_size
            time.sleep(1)
            assert metrics.stat().st_size == before, "the workers do not use the cable"
            hosts.link("up")
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
