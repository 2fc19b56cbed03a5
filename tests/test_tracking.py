"""Trackers of experiments: what they get of a run that fails, is killed, and resumes."""

import contextlib
import importlib.metadata
import io
import json
import os
import pty
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, job, start_job, wait_until
from test_samples import sample_rows

from job.config.config_file import load_config
from job.console import Console
from job.run import tracker_delivery
from job.run.driver import run_training
from job.run.local_launcher import LocalLauncher
from job.run.metrics import MetricsLog, read_rows
from job.run.samples import read_samples
from job.run.signals import StopRequest
from job.run.tracker import StepRecord, TrackedRun
from job.run.tracker_delivery import Delivery, Trackers, _Paused
from job.run.wandb_tracker import read_records
from job.storage import Folder
from job.training.checkpoint import Checkpoint, list_checkpoints
from job.training.events import CheckpointCommitted, Event, MetricsRow, Sampled, Started


class Server:
    """A tracker whose runs outlive its clients. It can fail, hang, and forget what it has."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.steps: dict[str, list[int]] = {}
        self.metrics: list[tuple[int, str]] = []
        self.closed: list[bool] = []
        self.uploads: list[list[str]] = []
        self.refusals = 0  # of descriptions
        self.knows_last_step, self.fails, self.logs = True, False, threading.Event()
        self.logs.set()
        self.called, self.failed = threading.Event(), threading.Event()

    def create_tracker(self, run: TrackedRun) -> "Server":
        self.run, self.thread = run, threading.current_thread()
        return self

    def check(self) -> None:
        self.called.set()
        self.logs.wait()
        if self.fails:
            self.failed.set()
            raise ConnectionError("https://user:hunter2@host/?api_key=s3cret\nno route, key abcdef")

    def open(self, run_id: str, key: str) -> tuple[str, int | None]:
        self.check()
        run_id = run_id or self.keys.setdefault(key, f"run-{len(self.steps)}")
        steps = self.steps.setdefault(run_id, [])
        self.current = steps
        return run_id, max(steps, default=-1) if self.knows_last_step else None

    def describe(self) -> None:
        self.refusals -= 1
        if self.refusals >= 0:
            raise ConnectionError("no route")

    def log(self, records: list[StepRecord]) -> None:
        self.check()
        for record in records:
            self.metrics += [(record.step, name) for name in record.metrics if name.endswith("/nats")]
            if "train/nats" not in record.metrics:  # more of the step before
                assert record.step == self.current[-1]
                continue
            assert record.metrics["train/nats"] == record.step
            assert set(record.texts) == ({"greedy", "sampled"} if record.step % 2 else set())
            self.current.append(record.step)

    def upload(self, checkpoint: Path) -> None:
        self.uploads.append(sorted(path.name for path in checkpoint.iterdir()))

    def close(self, *, finished: bool) -> None:
        self.closed.append(finished)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr(tracker_delivery, "import_module", lambda _: server)
    monkeypatch.setattr(tracker_delivery, "RETRY_S", 0.01)
    monkeypatch.setattr(tracker_delivery, "STOP_TIMEOUT_S", 60.0)
    yield server
    server.logs.set()


class Driver:
    """An attempt to train a run, whose rows are stored as those of a run."""

    def __init__(self, folder: Folder, start: int, **fields: str) -> None:
        config = load_config(None, {"run.name": "run", "tracking.wandb": "project", **fields})
        self.output, self.log, self.stop_request = io.StringIO(), MetricsLog(folder), StopRequest()
        self.trackers = Trackers(config, folder, Console(self.output), self.stop_request)
        self.log.truncate(start)
        self.handle(Started("a", start, 0, 1, "cpu", "fp32", 1, 100, ()))

    def handle(self, event: Event) -> None:
        self.trackers.handle(event)

    def report(self, *steps: int, split: str = "train") -> None:
        for step in steps:
            row = {"split": split, "epoch": 1, "step": step, "tokens": step, "nats": float(step), "perplexity": 1.0}
            row |= {"learning_rate": 0.1, "tokens_per_second": 1.0, "workers": 1, "time": 1.0}
            self.log.append(row)
            self.handle(MetricsRow("a", row))
            if step % 2 and split == "train":
                self.log.append_samples(sample_rows(step))
                self.handle(Sampled("a", tuple(sample_rows(step))))

    def commit(self, step: int) -> None:
        self.log.sync()
        checkpoint = Checkpoint(Folder("unused"), "name", step, {}, None)
        self.handle(CheckpointCommitted("a", checkpoint))


def test_trackers_get_each_step_once_after_restarts_of_workers_and_the_driver(server: Server, tmp_path: Path) -> None:
    folder, start = Folder(str(tmp_path)), 0
    for _ in range(3):
        driver = Driver(folder, start)
        driver.report(*range(start + 1, start + 5))
        driver.commit(start + 3)
        driver.handle(Started("b", start + 3, 0, 1, "cpu", "fp32", 1, 100, ()))
        driver.log.truncate(start + 3)
        driver.report(start + 4, start + 5)
        driver.commit(start + 4)
        driver.trackers.close()
        driver.log.close()
        start += 4
    assert server.steps == {"run-0": list(range(1, 13))}
    assert server.closed == [False] * 3
    stored = json.loads((tmp_path / "tracking" / "wandb.json").read_text())
    assert (stored["run"], stored["step"]) == ("run-0", 12)


@pytest.mark.parametrize("is_delivered", [True, False])
def test_trackers_get_what_is_reported_of_the_step_at_which_a_run_resumes(
    server: Server, tmp_path: Path, *, is_delivered: bool
) -> None:
    """As with ``max_steps`` of the last checkpoint. It may be reported twice, if no checkpoint has it."""
    folder = Folder(str(tmp_path))
    driver = Driver(folder, 0)
    driver.report(1, 2)
    driver.commit(2)
    driver.trackers.close()
    driver.log.close()
    if not is_delivered:
        server.steps["run-0"].pop(), server.metrics.pop()
    for commits in (False, True):
        driver = Driver(folder, 2)
        driver.report(2, split="epoch")
        if commits:
            driver.handle(Started("b", 2, 0, 1, "cpu", "fp32", 1, 100, ()))
            driver.report(2, split="epoch")
            driver.commit(2)
        driver.trackers.close()
        driver.log.close()
    assert server.metrics == [(1, "train/nats"), (2, "train/nats"), (2, "epoch/nats")]


def test_trackers_of_a_driver_that_was_killed_at_once_continue_its_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_and_fail(run_id: str, key: str) -> tuple[str, int | None]:
        opened(run_id, key)
        raise ConnectionError("killed")

    opened = server.open
    monkeypatch.setattr(server, "open", open_and_fail)
    driver = Driver(Folder(str(tmp_path)), 0)
    driver.trackers.close()
    monkeypatch.setattr(server, "open", opened)
    driver = Driver(Folder(str(tmp_path)), 0)
    driver.report(1)
    driver.commit(1)
    driver.trackers.close()
    assert server.steps == {"run-0": [1]}


@pytest.mark.parametrize("knows_last_step", [True, False])
def test_trackers_deliver_what_a_killed_driver_did_not(
    server: Server, tmp_path: Path, *, knows_last_step: bool
) -> None:
    folder = Folder(str(tmp_path))
    driver = Driver(folder, 0)
    driver.report(1, 2, 3, 4)
    driver.commit(4)
    driver.trackers.close()
    if knows_last_step:  # its client had passed on less than it had confirmed
        del server.steps["run-0"][2:]
    driver.report(5, 6)
    driver.log.sync()  # and it is killed after the commit of step 6
    driver.log.close()
    server.knows_last_step = knows_last_step
    driver = Driver(folder, 6)
    driver.report(7)
    driver.commit(7)
    driver.trackers.close()
    driver.log.close()
    assert server.steps == {"run-0": [1, 2, 3, 4, 5, 6, 7]}


def test_trackers_that_fail_warn_once_without_credentials_and_get_all_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abcdef")
    server.fails = True
    driver = Driver(Folder(str(tmp_path)), 0)
    driver.report(1, 2)
    driver.commit(2)
    for _ in range(3):
        server.failed.clear()
        assert server.failed.wait(10)
    driver.report(3)
    shown = driver.output.getvalue()
    assert shown.count("\n") == 1 and shown.startswith("warning: tracking.wandb: ConnectionError: ")
    assert not {"hunter2", "s3cret", "abcdef"} & set(
        shown.replace("=", " ").replace("@", " ").replace(":", " ").split()
    )
    assert "abcdef" not in shown and "hunter2" not in shown and "s3cret" not in shown
    server.fails = False
    driver.commit(3)
    driver.trackers.close()
    driver.log.close()
    assert server.steps == {"run-0": [1, 2, 3]}


def test_trackers_that_do_not_get_the_configuration_create_no_further_run(server: Server, tmp_path: Path) -> None:
    server.refusals = 3
    for start in (0, 4):
        driver = Driver(Folder(str(tmp_path)), start)
        driver.report(*range(start + 1, start + 5))
        driver.commit(start + 4)
        wait_until(lambda: server.refusals < 0, 60, "the tracker was not asked again", 0.01)
        driver.trackers.close()
        driver.log.close()
    assert server.steps == {"run-0": [*range(1, 9)]}
    assert server.refusals == -2  # each driver passes it on


def test_trackers_that_hang_do_not_delay_the_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_delivery, "CLOSE_TIMEOUT_S", 0.05)
    server.logs.clear()
    driver = Driver(Folder(str(tmp_path)), 0)
    driver.report(*range(1, 50))
    driver.commit(49)
    driver.trackers.finish("checkpoint")
    driver.trackers.close()
    driver.log.close()
    assert "has not got all until the end of the run" in driver.output.getvalue()


def test_trackers_do_not_delay_the_end_of_a_run_after_a_signal(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    server.logs.clear()
    driver = Driver(Folder(str(tmp_path)), 0)
    driver.trackers.finish("checkpoint")
    assert server.called.wait(60)
    monkeypatch.setattr(Delivery, "join", interrupt)
    driver.trackers.close()
    driver.log.close()
    assert "has not got all until the end of the run" in driver.output.getvalue()


def test_trackers_wait_while_a_run_saves_its_last_checkpoint(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, check_time = threading.Event(), Delivery._check_time

    def record_pause(delivery: Delivery) -> None:
        try:
            check_time(delivery)
        except _Paused:
            paused.set()
            raise

    monkeypatch.setattr(Delivery, "_check_time", record_pause)
    monkeypatch.setattr(tracker_delivery, "BATCH_STEPS", 1)
    driver = Driver(Folder(str(tmp_path)), 0)
    driver.report(1, 2, 3)
    wait_until(lambda: server.steps, 60, "no run was created", 0.01)
    server.called.clear()
    server.logs.clear()
    driver.commit(3)
    assert server.called.wait(60)
    driver.stop_request.exit_code = 143
    server.logs.set()
    assert paused.wait(60)
    driver.report(4, 5)
    driver.commit(5)
    assert server.steps == {"run-0": [1]}
    driver.trackers.close()
    driver.log.close()
    assert server.steps == {"run-0": [1, 2, 3, 4, 5]} and driver.output.getvalue() == ""


@pytest.mark.parametrize("arrives", [True, False])
def test_run_that_is_stopped_while_a_tracker_does_not_answer_is_saved_and_delivers_the_rest_when_resumed(
    server: Server, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, arrives: bool
) -> None:
    """What it was sending may have arrived."""
    fields = {"corpus.source": prose, "corpus.max_tokens": 4000, "run.storage": tmp_path, "run.name": "run"}
    fields |= {"model.hidden_size": 8, "generate.prefix": "the", "train.log_every": 1, "train.checkpoint_every": 2}
    fields |= {"train.epochs": 10**6, "tracking.wandb": "project", "tracking.checkpoint": "false"}
    stop_request, output, folder = StopRequest(), io.StringIO(), Folder(str(tmp_path / "run"))

    def stop_while_it_hangs(event: Event) -> None:
        if isinstance(event, MetricsRow) and event.row["step"] == 5:
            wait_until(lambda: server.steps.get("run-0"), 60, "nothing was delivered", 0.01)
            server.called.clear()
            server.logs.clear()
        if isinstance(event, CheckpointCommitted) and not server.logs.is_set():
            assert server.called.wait(60)
            stop_request.exit_code = 143

    def train(**more: object) -> int:
        flags = {name: str(value) for name, value in {**fields, **more}.items()}
        config = load_config(None, {**flags, "scale.workers": "0"})
        outcome = run_training(config, "run", Console(output), LocalLauncher(), stop_request, stop_while_it_hangs)
        return outcome.exit_code

    def log_steps(server: Server, records: list[StepRecord]) -> None:
        server.check()
        server.current += [record.step for record in records if "train/nats" in record.metrics]

    monkeypatch.setattr(Server, "log", log_steps)
    monkeypatch.setattr(tracker_delivery, "STOP_TIMEOUT_S", 0.05)
    assert train() == 143
    last = [row["step"] for row in read_rows(folder)][-1]
    assert list_checkpoints(folder / "checkpoints")[0][-1].step == last
    assert "tracking.wandb: has not got all yet, but when the run is resumed" in output.getvalue()
    server.fails = not arrives
    server.logs.set()
    server.thread.join(60)
    assert len(server.steps["run-0"]) < last
    server.fails, stop_request.exit_code = False, 0
    assert train(**{"train.max_steps": last + 1}) == 0
    assert server.steps == {"run-0": list(range(1, last + 2))}
    assert server.closed == [True]


def test_trackers_with_many_rows_read_them_from_the_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_delivery, "MAX_ROWS", 10)
    monkeypatch.setattr(tracker_delivery, "BATCH_STEPS", 7)
    driver = Driver(Folder(str(tmp_path)), 0)
    for start in range(0, 200, 40):
        driver.report(*range(start + 1, start + 41))
        driver.commit(start + 40)
    assert max(len(delivery.rows) for delivery in driver.trackers.deliveries) <= 10
    driver.trackers.close()
    driver.log.close()
    assert server.steps == {"run-0": list(range(1, 201))}


@pytest.mark.parametrize("uploads", [True, False])
def test_trackers_of_a_finished_run_upload_the_checkpoint(
    server: Server, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, uploads: bool
) -> None:
    monkeypatch.setattr(Server, "log", lambda *_: None)
    arguments = [
        "--corpus.source", prose, "--corpus.max_tokens", 4000, "--run.storage", tmp_path, "--run.name", "run",
        "--scale.workers", 0, "--model.hidden_size", 8, "--generate.prefix", "the", "--train.max_steps", 2,
        "--tracking.wandb", "project", "--tracking.checkpoint", str(uploads).lower(),
    ]  # fmt: skip
    assert job("train", *arguments).status == 0
    assert server.closed == [True]
    assert [name in upload for upload in server.uploads for name in ("manifest.json", "model.safetensors")] == (
        [True, True] if uploads else []
    )
    assert server.run.config["model.hidden_size"] == 8


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_train_without_the_package_of_a_tracker_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tracker_delivery, "find_spec", lambda _: None)
    ended = job("train", "--run.storage", tmp_path, f"--tracking.{name}", "x")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f"pip install 'lanes[{name}]'" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_train_without_the_variable_of_a_tracker_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow would create a database in the working directory."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ended = job("train", "--run.storage", tmp_path, "--tracking.mlflow", "env")
    assert ended.status == 2
    assert ended.err == "error: tracking.mlflow = env: MLFLOW_TRACKING_URI is not set; set it, or give the URI\n"
    assert list(tmp_path.iterdir()) == []


def test_train_with_credentials_in_the_uri_of_a_tracker_is_refused(tmp_path: Path) -> None:
    ended = job("train", "--run.storage", tmp_path, "--tracking.mlflow", "https://user:hunter2@host")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "tracking.mlflow" in ended.err and "hunter2" not in ended.err


# --- the clients themselves ---


@pytest.mark.slow
def test_mlflow_run_that_was_created_before_a_crash_is_continued(tmp_path: Path) -> None:
    from job.run.mlflow_tracker import MlflowTracker

    database = tmp_path / "mlflow.db"
    run = TrackedRun("run", Folder(str(tmp_path)), {}, f"sqlite:///{database}")
    opened = [MlflowTracker(run).open("", "key") for _ in range(2)]
    assert opened[0] == opened[1] and opened[0][1] == -1
    tracker = MlflowTracker(run)
    tracker.open("", "key")
    tracker.log([StepRecord(2, 1.0, {"train/nats": 2.0})])
    tracker.log([StepRecord(2, 1.5, {"epoch/nats": 3.0})])
    assert MlflowTracker(run).open(opened[0][0], "key") == (opened[0][0], 2)
    assert MlflowTracker(run).open("", "another")[0] != opened[0][0]
    assert mlflow_rows(database, "train/nats") == [(2, 2.0)] and mlflow_rows(database, "epoch/nats") == [(2, 3.0)]


LATE_ROW = """
import sys
from job.run.tracker import StepRecord, TrackedRun
from job.run.wandb_tracker import WandbTracker
from job.storage import Folder

run_id, metric = sys.argv[1:]
tracker = WandbTracker(TrackedRun("run", Folder("."), {}, "project"))
tracker.open(run_id, "key")
tracker.log([StepRecord(2, 1.0, {metric: 2.0})])
tracker.close(finished=True)
"""


@pytest.mark.slow
def test_wandb_shows_what_is_reported_later_of_its_last_step_in_the_summary(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    env = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    for arguments in (["", "train/nats"], ["key", "epoch/nats"]):
        subprocess.run([sys.executable, "-c", LATE_ROW, *arguments], cwd=tmp_path, env=env, check=True)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    records = [Record.FromString(data) for file in files for data in read_records(file.read_bytes())]
    updates = {"/".join(item.nested_key) or item.key for record in records for item in record.summary.update}
    assert list(wandb_steps(tmp_path)) == [2] and {"train/nats", "epoch/nats"} <= updates


WITHOUT_KEY = """
from job.run.tracker import TrackedRun
from job.run.wandb_tracker import WandbTracker
from job.storage import Folder

try:
    WandbTracker(TrackedRun("run", Folder("."), {}, "project")).open("", "key")
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.slow
def test_wandb_without_a_key_fails_instead_of_asking_on_the_terminal_of_the_run(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    terminal, end = pty.openpty()
    with open(terminal, "rb", buffering=0) as output:
        command = [sys.executable, "-c", WITHOUT_KEY]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdin=end, stdout=end, stderr=end)
        os.close(end)
        try:
            assert output.readline() == b"UsageError\r\n"
        finally:
            process.kill()
            process.wait()


def wandb_steps(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """All history of a run's offline files, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in read_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("history"):
                items = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                found.setdefault(record.history.step.num, []).append(items)
    return found


def mlflow_rows(database: Path, name: str) -> list[tuple[int, float]]:
    """The steps and values of a metric in an MLflow store."""
    with sqlite3.connect(database) as connection:
        return connection.execute("SELECT step, value FROM metrics WHERE key = ? ORDER BY step", (name,)).fetchall()


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """The address of MLflow's server, which an environment of its own runs with the store ``mlflow.db``."""
    environment = Path(os.environ.get("LANES_MLFLOW_ENV", tmp_path / "env"))
    if not environment.exists():
        version = importlib.metadata.version("mlflow-skinny")
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([environment / "bin" / "pip", "install", "--quiet", f"mlflow=={version}"], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [f"{environment}/bin/mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        f"{tmp_path}/artifacts",
    ]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen([*command, *store], stdout=log, stderr=log, start_new_session=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError):
            if requests.get(f"{address}/health", timeout=5).ok:
                break
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
        time.sleep(0.2)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


@pytest.mark.long
def test_mlflow_server_shows_each_step_of_a_killed_and_resumed_run_once(
    prose: Path, tmp_path: Path, mlflow_server: str
) -> None:
    check_killed_and_resumed(prose, tmp_path, mlflow_server)
    assert {path.name for path in (tmp_path / "artifacts").rglob("*")} >= {"model.safetensors", "000000500-greedy.txt"}


@pytest.mark.slow
def test_mlflow_and_wandb_show_each_step_of_a_killed_and_resumed_run_once(prose: Path, tmp_path: Path) -> None:
    check_killed_and_resumed(prose, tmp_path, f"sqlite:///{tmp_path}/mlflow.db")


def check_killed_and_resumed(prose: Path, tmp_path: Path, address: str) -> None:
    folder, database = tmp_path / "run", tmp_path / "mlflow.db"
    arguments = [
        "--corpus.source", prose, "--run.storage", tmp_path, "--run.name", "run", "--scale.workers", 0,
        "--model.hidden_size", 64, "--stream.batch_size", 16, "--generate.prefix", "the", "--train.epochs", 10**6,
        "--train.log_every", 50, "--train.sample_every", 500, "--train.checkpoint_every", 200,
        "--tracking.wandb", "project", "--tracking.mlflow", address,
    ]  # fmt: skip
    env = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = start_job("train", *arguments, env=env, cwd=tmp_path)
    files, deadline = [folder / "tracking" / f"{name}.json" for name in ("mlflow", "wandb")], time.monotonic() + 120
    while not all(file.exists() and json.loads(file.read_text())["step"] >= 1000 for file in files):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    first.kill()
    first.wait()
    last = max(row["step"] for row in read_rows(Folder(str(folder))))
    second = start_job("train", *arguments, "--train.max_steps", last + 500, env=env, cwd=tmp_path)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, (out, err)
    rows = [row for row in read_rows(Folder(str(folder))) if row["split"] == "train"]
    assert rows[-1]["step"] // 50 == (last + 500) // 50
    expected = [(row["step"], row["nats"]) for row in rows]
    assert mlflow_rows(database, "train/nats") == expected
    history = wandb_steps(folder)
    assert {step: len(records) for step, records in history.items() if len(records) > 1} == {}
    assert [
        (step, items["train/nats"]) for step, (items,) in sorted(history.items()) if "train/nats" in items
    ] == expected
    samples = {row["step"]: row for row in read_samples(Folder(str(folder))) if row["kind"] == "sampled"}
    shown = {step: items["samples/sampled"] for step, (items,) in history.items() if "samples/sampled" in items}
    assert shown == {step: row["prefix"] + row["continuation"] for step, row in samples.items()}
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT COUNT(*), MIN(status) FROM runs").fetchall() == [(1, "FINISHED")]
        params = dict(connection.execute("SELECT key, value FROM params").fetchall())
    assert params["model.hidden_size"] == "64"
