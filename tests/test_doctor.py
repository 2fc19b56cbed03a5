"""The checks before a run that need no cluster: the doctor's table, and what a node's report means."""

import os
import pickle
import subprocess
import sys

import pytest
import ray
import torch
from conftest import job

from job.cluster.connection import join_cluster
from job.cluster.node_probe import NodeReport, cell_problem, probe, storage_problem, version_problem
from job.cluster.ray_extensions import read_cluster_config
from job.errors import UserError


@pytest.fixture
def local(tmp_path):
    return probe(str(tmp_path))


def report(local, **changes):
    return NodeReport("10.0.0.2", {"CPU": 1}, {**local, **changes})


def doctor(prose, storage, *flags):
    return job("doctor", "--corpus.source", prose, "--run.storage", storage, "--generate.prefix", "the", *flags)


def test_doctor_without_problems_exits_with_zero(prose, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    ended = doctor(prose, tmp_path / "runs", "--scale.accelerator", "cpu")
    assert ended.status == 0
    assert [line.split()[:2] for line in ended.out.splitlines()[:3]] == [
        ["ok", "versions"],
        ["ok", "text"],
        ["ok", "storage"],
    ]
    assert ended.out.endswith("all checks passed\n")
    assert not (tmp_path / "runs").exists()


def test_doctor_with_problem_exits_with_one(prose, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    ended = doctor(prose, tmp_path, "--stream.num_steps", 10**6, "--scale.workers", 0)
    assert ended.status == 1
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("FAIL")] == ["text"]
    assert ended.out.endswith("1 problem to fix\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_doctor_without_required_gpu_fails(prose, tmp_path, monkeypatch, workers):
    monkeypatch.setenv("RAY_ADDRESS", "")
    ended = doctor(prose, tmp_path, "--scale.workers", workers, "--scale.accelerator", "gpu")
    assert ended.status == 1
    assert "this machine has 0 GPUs" in ended.out


def test_doctor_with_refused_address_prints_remedy(prose, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    ended = doctor(prose, tmp_path, "--address", "127.0.0.1:1")
    assert ended.status == 1
    assert "RAY_ADDRESS = 127.0.0.1:1: cannot connect: Connection refused" in ended.out
    assert "→ check that the cluster is up" in ended.out


def test_version_problem_with_same_versions_is_none(local):
    assert version_problem(report(local), local) is None


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"python": "3.11.0"}, "has python 3.11.0, this machine 3", "one image"),
        ({"torch": ""}, "has no torch", "one image"),
        ({"package": ""}, "has not this package", "ray job submit"),
        ({"package": "other"}, "has another version of this package", "ray job submit"),
    ],
)
def test_version_problem_with_difference_names_it(local, changes, problem, remedy):
    error = version_problem(report(local, **changes), local)
    assert problem in error.problem
    assert remedy in error.remedy


def test_version_problem_of_node_without_report_is_its_error(local):
    node = NodeReport("10.0.0.2", {}, {}, "did not answer within 60 s")
    assert version_problem(node, local).problem == "node 10.0.0.2: did not answer within 60 s"


def test_storage_problem_reports_unseen_marker_and_write_error(local):
    assert storage_problem(report(local, seen=True, write_error=""), "/runs") is None
    assert "does not see files" in storage_problem(report(local, seen=False, write_error=""), "/runs").problem
    error = storage_problem(report(local, seen=True, write_error="read-only"), "/runs")
    assert "cannot write there: read-only" in error.problem


def test_probe_finds_users_cells_that_cannot_be_imported(tmp_path):
    metadata = probe(str(tmp_path), cells=("gru", "json:Cell", "missing_module:Cell"))
    assert metadata["cells_missing"] == ["missing_module:Cell"]
    assert "cannot import model.cell = missing_module:Cell" in cell_problem(report(metadata)).problem


def test_probe_without_marker_writes_nothing(tmp_path):
    assert probe(str(tmp_path))["seen"] is False
    assert list(tmp_path.iterdir()) == []


def test_probe_reads_gpus_from_nvidia_smi(tmp_path, monkeypatch):
    """A partitioned GPU (MIG) shows no memory; it does not count as in use."""
    lines = "550.54, NVIDIA H100, 80000, 81559\\n550.54, NVIDIA A100, [N/A], [N/A]"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('{lines}')\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    metadata = probe(str(tmp_path), gpus=True)
    assert metadata["driver"] == "550.54"
    assert metadata["gpus"] == [("NVIDIA H100", 80000 << 20, 81559 << 20), ("NVIDIA A100", 0, 0)]


def test_probe_without_nvidia_smi_finds_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe(str(tmp_path), gpus=True)["gpus"] == []


@pytest.mark.parametrize(
    ("address", "problem", "remedy"),
    [
        ("127.0.0.1:1", "cannot connect: Connection refused", "check that the cluster is up"),
        ("127.0.0.1", "must be HOST:PORT", "use ray job submit"),
        ("ray://127.0.0.1:10001", "must be HOST:PORT", "use ray job submit"),
    ],
)
def test_join_cluster_with_wrong_address_raises(address, problem, remedy):
    with pytest.raises(UserError) as raised:
        join_cluster(address)
    assert raised.value.problem.startswith(f"RAY_ADDRESS = {address}: {problem}")
    assert remedy in raised.value.remedy


# --- without this package ---


def run_without_package(function, *arguments):
    """Runs a function as Ray would on a node that does not have this package."""
    code = "import sys, pickle; sys.modules['job'] = None; call, arguments = pickle.load(sys.stdin.buffer); "
    code += "sys.stdout.buffer.write(pickle.dumps(call(*arguments)))"
    payload = ray.cloudpickle.dumps((function, arguments))
    done = subprocess.run([sys.executable, "-c", code], input=payload, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


def test_probe_without_package_reports_that(local, tmp_path):
    metadata = run_without_package(probe, str(tmp_path), "marker", ("gru",), True)
    assert metadata["package"] == ""
    assert version_problem(report(metadata), local).remedy.startswith("install it there")


def test_read_cluster_config_runs_without_package(monkeypatch):
    """On a head that is not part of a cluster it finds no autoscaler."""
    functions = []
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: functions.append(function) or function)
    with pytest.raises(AttributeError):  # a plain function has no .remote
        read_cluster_config(1.0)
    assert run_without_package(functions[0], "127.0.0.1:1") is None
