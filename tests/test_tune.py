"""Searches on Ray: failures do not change the winner; trials stop, fail, resume and copy each other."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, is_picture, job, not_none, pictures, result, rows, start_job

from job.config.search_space import SearchSpace
from job.config.toml import config_from_toml
from job.config.training import OptimizerConfig
from job.run.lease import acquire_lease
from job.storage import Folder
from job.training.checkpoint import find_latest_valid
from job.tuning.exchange import EXCHANGE_FOLDER
from job.tuning.runs import list_runs

pytestmark = pytest.mark.cluster

TIMEOUT_S = 240.0  # on a busy machine
T = TypeVar("T")
Calm = tuple[Path, Callable[..., list[object]]]


def search_command(prose: Path, storage: Path, name: str, space: str, *flags: object) -> list[object]:
    """The command line of a search whose runs take a second or two."""
    config = storage / f"{name}.toml"
    storage.mkdir(exist_ok=True)
    config.write_text(f"[search.space]\n{space}\n")
    return [
        "tune", config, "--corpus.source", prose, "--run.storage", storage, "--run.name", name, "--scale.workers", 0,
        "--generate.prefix", "the", "--model.hidden_size", 16, "--corpus.validation_fraction", 0.1,
        "--train.precision", "fp32", "--train.epochs", 3, *flags,
    ]  # fmt: skip


RATES = '"optimizer.learning_rate" = { loguniform = [0.01, 2] }'


def outcome(folder: Path) -> tuple[dict[str, str], OptimizerConfig]:
    """The weights' hash of each finished trial, and the winner's optimizer."""
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("trials/*/result.json")}
    best = config_from_toml((folder / "best.toml").read_text(), "best")
    return {name: result["weights_sha256"] for name, result in results.items()}, best.optimizer


def records(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trials.json").read_text())


def wait_for(condition: Callable[[], T], process: subprocess.Popen[str]) -> T:
    """Polls until the condition is true, and returns its value. The process must stay alive."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return value


def trials_with_a_checkpoint(folder: Path) -> set[str]:
    return {path.parents[2].name for path in folder.glob("trials/*/checkpoints/*/manifest.json")}


def last_saved_step(run: Path) -> int:
    """The step of a run's last checkpoint."""
    return max((int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/*/manifest.json")), default=0)


def driver_pid(run: Path) -> int | None:
    """The process that holds the lease of a run, or None."""
    with contextlib.suppress(OSError, ValueError):
        return int(json.loads((run / "owner.json").read_text())["pid"])
    return None


@pytest.fixture(scope="module")
def calm(stored_prose: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """The folder of an undisturbed search on a token store, and a function that makes the command of an equal one."""
    storage = tmp_path_factory.mktemp("calm")

    def command(storage: Path, name: str, *flags: Any) -> list[object]:
        return search_command(stored_prose, storage, name, RATES, "--search.trials", 3, "--train.epochs", 20, *flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", cluster)
        ended = job(*command(storage, "calm"))
    assert ended.status == 0, ended.err
    assert "best is trial" in ended.out
    return storage / "calm", command


def test_tune_writes_results_that_train_accepts(calm: Calm, on_cluster: None) -> None:
    folder, command = calm
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["trial"] for row in table] == [0, 1, 2]
    best = min(table, key=lambda row: row["validation_perplexity"])
    assert best["best"]
    number = f"{best['trial']:05d}"
    (listed,) = list_runs(Folder(str(folder.parent)))
    assert (listed.state, listed.trials_done, listed.trials, listed.best_trial) == ("finished", 3, 3, number)
    assert listed.validation_perplexity == best["validation_perplexity"]
    assert all(" finished: " in (folder / f"trials/0000{index}/driver.log").read_text() for index in range(3))
    assert outcome(folder)[1].learning_rate == best["optimizer.learning_rate"]
    assert best["validation_perplexity"] == result(folder / "trials" / number)["best_validation_perplexity"]
    assert (folder / "sample.txt").read_text().startswith("the")
    assert (folder / "report.html").read_text().count('"trial_state": "finished"') == 3
    assert not list(folder.glob("trials/*/report.html"))
    board = (folder / "tensorboard" / number / "events.out.tfevents.search").read_bytes()
    assert b"_hparams_/session_start_info" in board
    assert b"optimizer.learning_rate" in board
    assert not {"ray", EXCHANGE_FOLDER} & set(os.listdir(folder))
    again = job(*command(folder.parent, "calm"))
    assert "is finished" in again.out
    (folder / "best.toml").unlink()  # as when the driver is killed before all is written
    with pictures():
        again = job(*command(folder.parent, "calm"))
    assert (again.status, again.err) == (0, "")
    assert "is finished" not in again.out
    for picture in ("curves.png", "space.png"):
        assert is_picture((folder / picture).read_bytes())
    # The winner's file is a configuration that train takes, and the run is the trial's.
    ended = job("train", folder / "best.toml", "--run.name", "again")
    assert ended.status == 0, ended.err
    assert result(folder.parent / "again")["weights_sha256"] == outcome(folder)[0][number]


def test_tune_with_more_trials_keeps_the_finished_ones(calm: Calm, tmp_path: Path, on_cluster: None) -> None:
    folder, command = calm
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")}
    ended = job(*command(folder.parent, "calm", "--search.trials", 4))
    assert ended.status == 0, ended.err
    assert "1 of 4 trials" in ended.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(outcome(folder)[0]) == 4


def test_tune_after_a_trial_was_killed_has_the_same_result(calm: Calm, tmp_path: Path, cluster: str) -> None:
    folder, command = calm
    disturbed = tmp_path / "disturbed"
    process = start_job(*command(tmp_path, "disturbed"), env={"RAY_ADDRESS": cluster})
    trial = disturbed / "trials" / "00001"
    wait_for(lambda: "00001" in trials_with_a_checkpoint(disturbed) and driver_pid(trial), process)
    os.kill(not_none(driver_pid(trial)), signal.SIGKILL)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (0, ""), out
    weights, _ = outcome(folder)
    disturbed_weights, winner = outcome(disturbed)
    assert disturbed_weights == {name: weights[name] for name in disturbed_weights}
    assert len(disturbed_weights) == 3
    rates = [record["point"]["optimizer.learning_rate"] for record in records(disturbed).values()]
    assert winner.learning_rate in rates
    assert sum(result(disturbed / "trials" / name)["restarts"] for name in disturbed_weights) > 0


def test_tune_after_sigint_resumes_from_saved_trials(
    calm: Calm, tmp_path: Path, cluster: str, on_cluster: None
) -> None:
    command = calm[1](tmp_path, "stopped", "--train.epochs", 3000, "--search.trials", 2)
    folder = tmp_path / "stopped"
    process = start_job(*command, env={"RAY_ADDRESS": cluster})
    wait_for(lambda: len(trials_with_a_checkpoint(folder)) == 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, "")
    assert "the same command resumes" in out
    assert not list(folder.glob("trials/*/owner.json"))
    step = last_saved_step(folder / "trials" / "00001")
    again = start_job(*command, env={"RAY_ADDRESS": cluster})
    wait_for(lambda: last_saved_step(folder / "trials" / "00001") > step, again)
    again.send_signal(signal.SIGTERM)  # as ray job stop sends it
    out, err = again.communicate(timeout=TIMEOUT_S)
    assert (again.returncode, err) == (143, ""), out
    timed = job(*command, "--search.minutes", 0.001)
    assert timed.status == 0, timed.err
    assert "time is up with 2 trials left" in timed.out
    assert (folder / "best.toml").exists()


def test_asha_stops_poor_trials_and_keeps_their_checkpoints(prose: Path, tmp_path: Path, on_cluster: None) -> None:
    space = '"optimizer.learning_rate" = { grid = [1.0, 0.5, 0.001, 0.002, 0.003, 0.004] }'
    flags = ["--search.scheduler", "asha", "--search.concurrent", 2, "--train.epochs", 9]
    command = search_command(prose, tmp_path, "asha", space, *flags)
    ended = job(*command)
    assert ended.status == 0, ended.err
    states = {name: record["state"] for name, record in records(tmp_path / "asha").items()}
    assert list(states.values()).count("stopped") >= 3
    assert set(states.values()) == {"stopped", "finished"}, records(tmp_path / "asha")
    assert len(states) == 6
    assert outcome(tmp_path / "asha")[1].learning_rate == 1.0
    for name, state in states.items():
        checkpoint, problems = find_latest_valid(Folder(str(tmp_path / "asha" / "trials" / name / "checkpoints")))
        assert checkpoint
        assert problems == ()
        assert (state == "finished") == (tmp_path / "asha" / "trials" / name / "result.json").exists()
    again = job(*command)
    assert "is finished" in again.out


def test_tune_records_diverged_and_failed_trials_and_finishes_the_others(
    prose: Path, tmp_path: Path, on_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.cluster.tune.MAX_TRIAL_FAILURES", 1)
    space = '"model.cell" = { grid = ["cells:DivergingCell", "rnn", "cells:ExitingCell"] }'
    ended = job(*search_command(prose, tmp_path, "failing", space, "--search.concurrent", 2))
    assert ended.status == 0, ended.err
    ended_trials = records(tmp_path / "failing")
    assert [record["state"] for record in ended_trials.values()] == ["diverged", "finished", "failed"]
    assert "the loss is nan at step 8" in ended_trials["00000"]["why"]
    assert "trial 0 diverged" in ended.out
    assert "time is up" not in ended.out
    table = pq.read_table(tmp_path / "failing" / "trials.parquet").to_pylist()
    assert [row["state"] for row in table] == ["diverged", "finished", "failed"]
    assert "best is trial 1" in ended.out


@pytest.mark.long
def test_pbt_exploit_without_perturbation_continues_bitwise_like_the_winner(
    prose: Path, tmp_path: Path, on_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If perturbing changes nothing, the copy has the losses and weights of the original from there on."""
    monkeypatch.setattr(SearchSpace, "perturb", lambda self, params, rng: params)
    space = '"optimizer.learning_rate" = { grid = [1.0, 0.001] }'
    flags = ["--search.scheduler", "pbt", "--train.epochs", 5]
    flags += ["--model.cell", "lstm", "--optimizer.name", "adamw", "--model.dropout", 0.2, "--train.log_every", 1]
    ended = job(*search_command(prose, tmp_path, "pbt", space, *flags))
    assert ended.status == 0, ended.err
    winner, loser = (tmp_path / "pbt" / "trials" / name for name in ("00000", "00001"))
    assert records(tmp_path / "pbt")["00001"]["point"] == {"optimizer.learning_rate": 1.0}
    losses, winner_losses = ({row["step"]: row["nats"] for row in rows(run, "train")} for run in (loser, winner))
    differing = [step for step in losses if losses[step] != winner_losses[step]]  # before the exploit
    assert differing
    assert min(differing) == 2  # both have the same initial weights
    after = [step for step in losses if step > max(differing)]
    assert len(after) > 25
    assert max(after) == max(winner_losses)
    assert result(loser)["weights_sha256"] == result(winner)["weights_sha256"]


def test_tune_with_more_workers_than_the_cluster_raises_user_error(
    prose: Path, tmp_path: Path, on_cluster: None
) -> None:
    ended = job(*search_command(prose, tmp_path, "big", RATES, "--scale.workers", 20))
    assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert "can never place more than 8 workers of 1 CPU each" in ended.err
    assert not (tmp_path / "big").exists()


def test_tune_while_another_driver_holds_the_lease_raises_user_error(
    prose: Path, tmp_path: Path, on_cluster: None
) -> None:
    lease = acquire_lease(Folder(str(tmp_path / "kept")))
    ended = job(*search_command(prose, tmp_path, "kept", RATES))
    lease.release()
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "this run is in use" in ended.err


@pytest.fixture
def three_nodes() -> Iterator[tuple[Any, list[Any]]]:
    """A cluster with a head without CPUs and three nodes with one CPU each, and the list of these nodes."""
    from ray.cluster_utils import Cluster

    health_checks = {f"health_check_{name}_ms": 1000 for name in ("initial_delay", "period", "timeout")}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health_checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    yield cluster, nodes
    cluster.shutdown()


def worker_pids(nodes: list[Any]) -> list[int]:
    """The training processes on these nodes, which are children of the nodes' raylets."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in raylets and (path / "cmdline").read_text().startswith("ray::RayTrainWorker"):
                pids.append(int(path.name))
    return pids


@pytest.mark.long
def test_tune_with_two_workers_after_worker_node_and_driver_deaths_has_the_same_result(
    prose: Path, tmp_path: Path, three_nodes: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials equal those of an undisturbed search without workers."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster, nodes = three_nodes
    space = '"optimizer.learning_rate" = { grid = [0.1, 1.0] }'
    flags = ["--train.reproducible", "true", "--train.epochs", 40, "--train.checkpoint_every", 10]
    calm = job(*search_command(prose, tmp_path, "calm", space, *flags, "--train.log_every", 0))
    assert calm.status == 0, calm.err
    command = search_command(prose, tmp_path, "disturbed", space, *flags, "--scale.workers", 2)
    folder = tmp_path / "disturbed"
    process = start_job(*command, env={"RAY_ADDRESS": cluster.address})
    wait_for(lambda: "00000" in trials_with_a_checkpoint(folder), process)
    os.kill(wait_for(lambda: worker_pids(nodes), process)[0], signal.SIGKILL)
    wait_for(lambda: "00001" in trials_with_a_checkpoint(folder), process)
    busy = wait_for(lambda: [node for node in nodes if worker_pids([node])], process)
    cluster.remove_node(busy[0], allow_graceful=False)
    nodes.remove(busy[0])
    step = last_saved_step(folder / "trials" / "00001")
    wait_for(lambda: last_saved_step(folder / "trials" / "00001") > step, process)
    process.kill()
    process.wait()
    again = start_job(*command, env={"RAY_ADDRESS": cluster.address})
    out, err = again.communicate(timeout=TIMEOUT_S)
    assert (again.returncode, err) == (0, ""), out
    assert outcome(folder) == outcome(tmp_path / "calm")
    assert len(outcome(folder)[0]) == 2
