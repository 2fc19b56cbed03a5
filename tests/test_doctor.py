"""The checks before a run that need no cluster: the doctor's table, and what a node's report means."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from conftest import Ended, job, not_none, start_job

from job.cluster.connection import join_cluster
from job.cluster.local_cluster import check_machine, child_processes, create_ray_folder, start_local_cluster
from job.cluster.node_probe import NodeReport, cell_problem, probe, storage_problem, version_problem
from job.cluster.ray_extensions import read_cluster_config
from job.errors import UserError


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Any]:
    return probe(str(tmp_path))


def report(local: dict[str, Any], **changes: Any) -> NodeReport:
    return NodeReport("10.0.0.2", {"CPU": 1}, {**local, **changes})


def doctor(prose: Path, storage: Path, *flags: object) -> Ended:
    return job("doctor", "--corpus.source", prose, "--run.storage", storage, "--generate.prefix", "the", *flags)


def test_doctor_without_problems_exits_with_zero(prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    ended = doctor(prose, tmp_path / "runs", "--scale.accelerator", "cpu")
    assert ended.status == 0
    assert [line.split()[:2] for line in ended.out.splitlines()[:4]] == [
        ["ok", "versions"],
        ["ok", "name"],
        ["ok", "text"],
        ["ok", "storage"],
    ]
    assert ended.out.endswith("all checks passed\n")
    assert not (tmp_path / "runs").exists()


def test_doctor_with_problem_exits_with_one(prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    ended = doctor(prose, tmp_path, "--stream.num_steps", 10**6, "--scale.workers", 0)
    assert ended.status == 1
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("FAIL")] == ["text"]
    assert ended.out.endswith("1 problem to fix\n")


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        ("abc " * 500, ["--train.epochs", 1], "exists with another configuration: train.epochs (2 → 1)"),
        ("abx " * 500, [], "is not the text that this run was started with"),
        ("abc " * 500, ["--run.resume", "never"], "run.resume = never"),
    ],
)
def test_doctor_of_a_run_that_cannot_resume_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, flags: list[int | str], problem: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    corpus = tmp_path / "text.txt"
    corpus.write_text("abc " * 500)
    arguments = ["--run.name", "mine", "--scale.workers", 0, "--model.hidden_size", 8, "--train.epochs", 2]
    arguments += ["--stream.batch_size", 2, "--optimizer.schedule", "cosine"]
    assert job("train", "--corpus.source", corpus, "--run.storage", tmp_path, *arguments).status == 0
    assert doctor(corpus, tmp_path, *arguments, "--generate.prefix", "a").status == 0
    corpus.write_text(text)
    ended = doctor(corpus, tmp_path, *arguments, "--generate.prefix", "a", *flags)
    assert ended.status == 1
    assert problem in ended.out


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ('metric = "perplexity"\nscheduler = "asha"', 'search.scheduler = "asha": has no effect'),
        ('metric = "validation_perplexity"', "is never reported"),
        ('metric = "perplexity"', "4 trials can start"),
    ],
)
def test_doctor_checks_the_search_of_a_configuration(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str, text: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    config = tmp_path / "search.toml"
    space = '[search.space]\n"optimizer.learning_rate" = { uniform = [0.1, 1] }'
    config.write_text(f"[train]\nepochs = 1\n[search]\ntrials = 4\n{search}\n{space}")
    ended = doctor(prose, tmp_path / "runs", "--scale.workers", 0, config)
    assert ended.status == int("can start" not in text)
    assert text in ended.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_doctor_without_required_gpu_fails(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    ended = doctor(prose, tmp_path, "--scale.workers", workers, "--scale.accelerator", "gpu")
    assert ended.status == 1
    assert "this machine has 0 GPUs" in ended.out


def test_doctor_with_refused_address_prints_remedy(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    ended = doctor(prose, tmp_path, "--address", "127.0.0.1:1")
    assert ended.status == 1
    assert "RAY_ADDRESS = 127.0.0.1:1: cannot connect: Connection refused" in ended.out
    assert "→ check that the cluster is up" in ended.out


def test_version_problem_with_same_versions_is_none(local: dict[str, Any]) -> None:
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
def test_version_problem_with_difference_names_it(
    local: dict[str, Any], changes: dict[str, str], problem: str, remedy: str
) -> None:
    error = not_none(version_problem(report(local, **changes), local))
    assert problem in error.problem
    assert remedy in error.remedy


def test_version_problem_of_node_without_report_is_its_error(local: dict[str, Any]) -> None:
    node = NodeReport("10.0.0.2", {}, {}, "did not answer within 60 s")
    assert not_none(version_problem(node, local)).problem == "node 10.0.0.2: did not answer within 60 s"


def test_storage_problem_reports_unseen_marker_and_write_error(local: dict[str, Any]) -> None:
    assert storage_problem(report(local, seen=True, write_error=""), "/runs") is None
    assert "does not see files" in not_none(storage_problem(report(local, seen=False, write_error=""), "/runs")).problem
    error = not_none(storage_problem(report(local, seen=True, write_error="read-only"), "/runs"))
    assert "cannot write there: read-only" in error.problem


def test_probe_finds_users_cells_that_cannot_be_imported(tmp_path: Path) -> None:
    metadata = probe(str(tmp_path), cells=("gru", "json:Cell", "missing_module:Cell"))
    assert metadata["cells_missing"] == ["missing_module:Cell"]
    assert "cannot import model.cell = missing_module:Cell" in not_none(cell_problem(report(metadata))).problem


def test_probe_without_marker_writes_nothing(tmp_path: Path) -> None:
    assert probe(str(tmp_path))["seen"] is False
    assert list(tmp_path.iterdir()) == []


def test_probe_reads_gpus_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partitioned GPU (MIG) shows no memory; it does not count as in use."""
    lines = "550.54, NVIDIA H100, 80000, 81559\\n550.54, NVIDIA A100, [N/A], [N/A]"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('{lines}')\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    metadata = probe(str(tmp_path), gpus=True)
    assert metadata["driver"] == "550.54"
    assert metadata["gpus"] == [("NVIDIA H100", 80000 << 20, 81559 << 20), ("NVIDIA A100", 0, 0)]


def test_probe_without_nvidia_smi_finds_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_join_cluster_with_wrong_address_raises(address: str, problem: str, remedy: str) -> None:
    with pytest.raises(UserError) as raised:
        join_cluster(address)
    assert raised.value.problem.startswith(f"RAY_ADDRESS = {address}: {problem}")
    assert remedy in raised.value.remedy


# --- a cluster on this machine ---


@pytest.fixture
def tmpdir_of_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Path], None]:
    """Sets the folder that TMPDIR names; RAY_TMPDIR is not set."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return lambda folder: monkeypatch.setenv("TMPDIR", str(folder))


@pytest.mark.parametrize("name", ["x" * 100, "ü" * 40, "missing/folder", "file"])
def test_create_ray_folder_with_unusable_tmpdir_takes_another(
    tmp_path: Path, tmpdir_of_scheduler: Callable[[str | Path], None], name: str
) -> None:
    if name == "file":
        (tmp_path / name).touch()
    elif name != "missing/folder":
        (tmp_path / name).mkdir()
    tmpdir_of_scheduler(tmp_path / name)
    folder = Path(create_ray_folder())
    try:
        assert tmp_path not in folder.parents
        assert folder.stat().st_mode & 0o777 == 0o700
        assert list(folder.iterdir()) == []
    finally:
        folder.rmdir()
    assert list(tmp_path.rglob("ray-*")) == []


def test_create_ray_folder_prefers_ray_tmpdir(
    monkeypatch: pytest.MonkeyPatch, tmpdir_of_scheduler: Callable[[str | Path], None]
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        tmpdir_of_scheduler("/var/tmp")
        monkeypatch.setenv("RAY_TMPDIR", short)
        assert Path(create_ray_folder()).parent == Path(short)


def test_create_ray_folder_on_full_disks_raises_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmpdir_of_scheduler: Callable[[str | Path], None]
) -> None:
    tmpdir_of_scheduler(tmp_path)
    monkeypatch.setattr("job.cluster.local_cluster.shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError) as raised:
        create_ray_folder()
    assert f"{tmp_path}: AF_UNIX path too long, /tmp: less than 64 MiB are free, /var/tmp" in raised.value.problem
    assert "set RAY_TMPDIR" in raised.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_doctor_with_too_few_open_files_fails(prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("job.cluster.local_cluster.resource.getrlimit", lambda _: (64, 64))
    ended = doctor(prose, tmp_path, "--scale.workers", 1, "--scale.accelerator", "cpu")
    assert ended.status == 1
    assert "a process may open only 64 files" in ended.out
    assert "→ raise the limit: ulimit -n 128" in ended.out
    assert doctor(prose, tmp_path, "--scale.workers", 0, "--scale.accelerator", "cpu").status == 0  # needs no Ray


def test_check_machine_without_loopback_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr("job.cluster.local_cluster.socket.create_connection", refuse)
    with pytest.raises(UserError) as raised:
        check_machine()
    assert str(raised.value) == (
        "127.0.0.1: Network is unreachable; Ray needs the loopback interface: ip link set lo up"
    )


class RayThatFails:
    """Replaces the start of Ray by one that starts a process and then raises these errors, one per attempt."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.folders: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, num_cpus: int, folder: str) -> None:
        self.folders.append(folder)
        self.processes.append(subprocess.Popen(["sleep", "60"]))
        os.write(2, b"page of advice\n")
        if self.errors:
            raise self.errors.pop(0)


OVERLOADED = (
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    Exception("The current node timed out during startup.\nThis could happen because\nof overload"),
    RuntimeError("Failed to get cluster ID from GCS server: TimedOut"),
)


@pytest.mark.parametrize("errors", [OVERLOADED[:1], OVERLOADED[1:2], OVERLOADED[1:]])
def test_start_local_cluster_after_temporary_failures_succeeds(
    errors: tuple[Exception, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start = RayThatFails(*errors)
    monkeypatch.setattr("job.cluster.local_cluster.start_private_cluster", start)
    monkeypatch.setattr("job.cluster.local_cluster.RETRY_DELAY_S", 0)
    with ExitStack() as stack:
        start_local_cluster(2, stack)
        *failed, started = start.processes
        assert [process.wait() for process in failed] == [-signal.SIGKILL] * len(errors)
        assert started.poll() is None
        started.kill()
        assert len(set(start.folders)) == len(errors) + 1
    assert not Path(start.folders[0]).parent.exists()
    assert capfd.readouterr().err == ""


def test_start_local_cluster_that_always_fails_raises_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    start = RayThatFails(*OVERLOADED)
    monkeypatch.setattr("job.cluster.local_cluster.start_private_cluster", start)
    monkeypatch.setattr("job.cluster.local_cluster.RETRY_DELAY_S", 0)
    with pytest.raises(UserError) as raised, ExitStack() as stack:
        start_local_cluster(2, stack)
    assert raised.value.problem == (
        "Ray cannot start on this machine: RuntimeError: Failed to get cluster ID from GCS server: TimedOut"
    )
    assert [process.wait() for process in start.processes] == [-signal.SIGKILL] * 3
    assert not Path(start.folders[0]).parent.exists()


def test_child_processes_of_a_thread_that_cannot_be_read_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that ended meanwhile raised an error."""
    for thread in ("1", "2"):
        (tmp_path / thread).mkdir()
    (tmp_path / "1" / "children").write_text("12 13 ")
    (tmp_path / "2" / "children").mkdir()
    monkeypatch.setattr("job.cluster.local_cluster.Path", lambda _: tmp_path)
    assert child_processes() == {12, 13}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RAY_health_check_period_ms", "RAY_worker_niceness"])
def test_train_with_invalid_setting_of_ray_is_refused(prose: Path, tmp_path: Path, name: str) -> None:
    """Ray's core crashes when it is imported."""
    flags = ["--corpus.source", prose, "--run.storage", tmp_path, "--scale.workers", 1]
    process = start_job("train", *flags, env={name: "many", "RAY_ADDRESS": ""})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert f"error: {name} = many: Ray cannot be imported" in err


# --- without this package ---


def run_without_package(function: Callable[..., object], *arguments: object) -> Any:
    """Runs a function as Ray would on a node that does not have this package."""
    code = "import sys, pickle; sys.modules['job'] = None; call, arguments = pickle.load(sys.stdin.buffer); "
    code += "sys.stdout.buffer.write(pickle.dumps(call(*arguments)))"
    payload = ray.cloudpickle.dumps((function, arguments))
    done = subprocess.run([sys.executable, "-c", code], input=payload, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


def test_probe_without_package_reports_that(local: dict[str, Any], tmp_path: Path) -> None:
    metadata = run_without_package(probe, str(tmp_path), "marker", ("gru",), True)
    assert metadata["package"] == ""
    assert not_none(version_problem(report(metadata), local)).remedy.startswith("install it there")


def test_read_cluster_config_runs_without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a head that is not part of a cluster it finds no autoscaler."""
    functions = []

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        functions.append(function)
        return function

    monkeypatch.setattr(ray, "remote", lambda **_: keep)
    with pytest.raises(AttributeError):  # a plain function has no .remote
        read_cluster_config(1.0)
    assert run_without_package(functions[0], "127.0.0.1:1") is None
