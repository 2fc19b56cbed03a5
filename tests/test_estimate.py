"""What a run needs, and the refusal of what this machine cannot have."""

import os
import re
import signal
from pathlib import Path
from signal import Signals
from typing import Any

import pytest
from conftest import job
from test_command_line import SMALL, assert_user_error, train_without_trace

from job.config.config_file import load_config
from job.config.model import BUILTIN_CELLS, ModelConfig
from job.distributed.context import available_cpus, machine_memory
from job.nn.language_model import build_model
from job.run.estimate import count_weights, worker_bytes
from job.run.signals import StopRequest
from job.storage import Folder


@pytest.mark.parametrize("cell", BUILTIN_CELLS)
@pytest.mark.parametrize(
    ("layers", "embedding", "tied"), [(1, 0, False), (3, 5, False), (2, 7, True), ((9, 4), 4, True)]
)
def test_count_weights_equals_the_built_model(
    cell: str, layers: int | tuple[int, ...], embedding: int, tied: bool
) -> None:
    sizes = layers if isinstance(layers, tuple) else (7,) * layers
    config = ModelConfig(cell=cell, hidden_size=sizes, num_layers=len(sizes), embedding_size=embedding, tied=tied)
    assert count_weights(config, 11) == sum(weight.numel() for weight in build_model(config, 11, 0).parameters())


def test_worker_bytes_grows_with_each_size_and_shrinks_with_workers() -> None:
    def needed(**flags: Any) -> int:
        return worker_bytes(load_config(None, {"stream.batch_size": "64", **flags}), 10**8)

    for name, value in {
        "stream.num_steps": "99999", "model.hidden_size": "99999", "train.precision": "fp64", "optimizer.name": "adamw",
    }.items():  # fmt: skip
        assert needed(**{name: value}) > needed()
    assert needed(**{"scale.workers": "64"}) < needed()
    assert needed() > 8 * 10**8


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.num_layers", 10**6], ["model.num_layers = 1000000: must be at least 1 and at most 1,000"]),
        (["--model.hidden_size", 10**9], ["does not fit into memory", "weights need at least"]),
        (["--model.hidden_size", 10**200], ["does not fit into memory"]),
        (["--model.embedding_size", 10**12], ["does not fit into memory"]),
        (["--generate.length", 10**12], ["generate.length = 1000000000000: must be at least 0 and at most 1,000,000"]),
        (["--scale.cpus_per_worker", 100_000], ["scale.cpus_per_worker = 100000: this machine has", "lower it"]),
        (["--scale.hang_timeout", 1e300], ["scale.hang_timeout", "at most 1,000,000,000"]),
        (["--stream.num_steps", 10**15], ["stream.num_steps", "tokens"]),
        (
            ["--scale.workers", 5000, "--stream.batch_size", 5000, "--stream.num_steps", 2],
            ["does not fit into memory", "scale.workers = 5000"],
        ),
        (["--scale.workers", 2, "--scale.cpus_per_worker", 10**6], ["scale.cpus_per_worker = 1000000"]),
    ],
)
def test_train_beyond_this_machine_is_refused_before_the_run(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[float | int | str], parts: list[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("job.cluster.connection.ray.init", pytest.fail)
    assert_user_error(train_without_trace(tmp_path, "--corpus.source", prose, *arguments), *parts)


def test_train_in_a_container_with_little_memory_is_refused(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.run.estimate.machine_memory", lambda: 100 << 20)
    ended = train_without_trace(tmp_path, "--corpus.source", prose)
    assert_user_error(ended, "on scale.workers = 0 need at least", "this machine has 100 MiB")


def test_machine_memory_is_that_of_this_machine() -> None:
    assert 0 < machine_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_doctor_estimates_memory_checkpoint_and_time(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", tmp_path]
    ended = job("doctor", *arguments)
    (line,) = [line for line in ended.out.splitlines() if line.startswith("ok    estimate")]
    assert "915 weights; each worker needs at least 200 MiB of memory, a checkpoint 4 KiB" in line, line
    assert "an epoch about" in line
    assert "FAIL  workers" in job("doctor", *arguments, "--scale.cpus_per_worker", 10**6).out
    monkeypatch.setattr("job.run.estimate.train_steps", lambda *_: (1 / 0 for _ in "a"))
    assert re.search("FAIL +estimate +a training step fails: ZeroDivisionError", job("doctor", *arguments).out)


def test_doctor_for_nodes_with_more_cores_measures_on_the_cores_of_this_machine(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It crashed with as many threads as the nodes' workers have."""
    threads = []
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("job.run.estimate.configure_process", lambda _, world: threads.append(world.threads))
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", tmp_path, "--address", "127.0.0.1:1"]
    assert "ok    estimate" in job("doctor", *arguments, "--scale.cpus_per_worker", 10**6).out
    assert threads == [available_cpus()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_with_nothing_to_save_interrupts(number: Signals) -> None:
    stop_request = StopRequest()
    stop_request.can_save = False
    with pytest.raises(KeyboardInterrupt), stop_request.installed():
        os.kill(os.getpid(), number)
    assert stop_request.exit_code == 128 + number


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_first_interrupt_while_the_storage_is_checked_ends_the_command(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Requests to a storage that does not answer are retried for minutes."""
    passed = []

    def check_writable(_: Folder) -> None:
        passed.append("start")
        signal.raise_signal(signal.SIGINT)
        passed.append("end")

    monkeypatch.setattr("job.storage.Folder.check_writable", check_writable)
    config = tmp_path / "config.toml"
    space = '[search]\nmetric = "perplexity"\n[search.space]\n"model.dropout" = { uniform = [0, 0.5] }'
    config.write_text(space if verb == "tune" else "")
    ended = job(verb, config, *SMALL, "--corpus.source", prose, "--run.storage", tmp_path / "runs")
    assert (ended.status, ended.err, passed) == (130, "", ["start"])
    assert not (tmp_path / "runs").exists()
