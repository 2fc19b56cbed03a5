"""Searches on Ray: failures do not change the winner; trials stop, fail, resume and copy each other."""

import contextlib
import io
import json
import math
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, is_picture, job, not_none, pictures, result, rows, search_config, start_job
from ray import tune
from ray.tune.trainable.trainable import _DICT_CHECKPOINT_FILE_NAME

from job.cluster.ray_extensions import TrainingResult
from job.cluster.schedulers import build_scheduler
from job.cluster.trainable import TrialRunner, TrialTrainable
from job.cluster.tune import _run_trials
from job.cluster.tune_callbacks import TrialCallback
from job.config.config_file import load_config
from job.config.schema import OptimizerConfig
from job.config.search_space import SearchSpace
from job.config.toml import config_from_toml, override_config
from job.console import Console
from job.errors import RunFailed
from job.run.lease import LeaseObserver, acquire_lease
from job.run.run_dir import read_existing_run
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.checkpoint import Checkpoint, copy_checkpoint, find_latest_valid
from job.training.events import CheckpointCommitted, MetricsRow
from job.training.progress import perplexity
from job.tuning.exchange import EXCHANGE_FOLDER, import_checkpoint
from job.tuning.runs import list_runs
from job.tuning.trials import load_trials, trial_name

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


class Member:
    """A fake of Ray Tune's trial with the attributes that a scheduler reads."""

    def __init__(self, number: int) -> None:
        self.number, self.status, self.checkpoint, self.experiment_tag = number, "PENDING", None, ""
        self.config: dict[str, Any] = {}
        self.last_result: dict[str, Any] = {}
        self.num_failures = self.max_failures = 0
        self.run_metadata = SimpleNamespace(
            checkpoint_manager=SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=5))
        )
        self.temporary_state = SimpleNamespace(saving_to=None)

    def __str__(self) -> str:
        return trial_name(self.number)

    def is_finished(self) -> bool:
        return self.status in ("TERMINATED", "ERROR")


@pytest.mark.parametrize("status", ["TERMINATED", "ERROR"])
def test_pbt_when_the_last_running_trial_ends_resumes_the_paused_ones(tmp_path: Path, status: str) -> None:
    """It ended without a report. While all are paused, a requested stop ends the search."""
    space = {"optimizer.learning_rate": {"grid": [1.0, 0.1, 0.01]}}
    search = search_config(scheduler="pbt", space=space)
    trials = load_trials(Folder(str(tmp_path)), load_config(None, {}), search)
    callback = TrialCallback(trials, max_failures=0)
    scheduler = build_scheduler(callback)
    members = [Member(number) for number in range(3)]
    live = set(members)
    controller = SimpleNamespace(search_alg=None, get_trials=lambda: members, get_live_trials=lambda: live)
    for member in members:
        scheduler.on_trial_add(controller, member)
        member.config = {"trial": {"number": member.number, "params": trials.by_number[member.number].params}}
        callback.on_trial_start(0, members, member)
        member.status = "RUNNING"
    for member in members[:2]:
        assert scheduler.on_trial_result(controller, member, {"epoch": 6, "score": 7.0 - member.number}) == "PAUSE"
        member.status = "PAUSED"
    assert scheduler.choose_trial_to_run(controller) is None
    callback.stop_requested = True
    assert not callback.stop_all()
    members[2].status = status
    if status == "TERMINATED":  # diverged
        live.discard(members[2])
    else:
        scheduler.on_trial_error(controller, members[2])
    assert scheduler.choose_trial_to_run(controller) is None
    assert callback.stop_all()
    callback.stop_requested = False
    assert scheduler.choose_trial_to_run(controller) in members[:2]


def test_pbt_after_trials_missed_a_report_resumes_the_earliest(tmp_path: Path) -> None:
    search = search_config(scheduler="pbt", space={"optimizer.learning_rate": {"grid": [1.0, 0.1]}})
    trials = load_trials(Folder(str(tmp_path)), load_config(None, {"train.epochs": "9"}), search)
    scheduler = build_scheduler(TrialCallback(trials, max_failures=0))
    members = [Member(number) for number in range(2)]
    controller = SimpleNamespace(search_alg=None, get_trials=lambda: members, get_live_trials=lambda: set(members))
    for member in members:
        scheduler.on_trial_add(controller, member)
    for epoch in (1, 3):
        for member in members:
            scheduler.last_results[member] = {"epoch": epoch, "score": 7.0}
            scheduler._trial_state[member].last_train_time = epoch
            member.status = "PAUSED"
    scheduler._next_perturbation_sync = 3
    for member in members:
        scheduler._trial_state[member].last_perturbation_time = 3
    assert scheduler.choose_trial_to_run(controller) in members


def test_trial_runner_reports_every_epoch_although_training_is_ahead_of_the_checkpoints(tmp_path: Path) -> None:
    runner = TrialRunner(load_config(None, {}), Folder(str(tmp_path)), search_config(metric="perplexity"))
    for step in (24, 48):
        row = {"split": "epoch", "step": step, "epoch": step // 24, "perplexity": 5.0}
        runner._on_event(MetricsRow("attempt", row))
    for step in (24, 48):
        runner.resume.release()
        runner._on_event(CheckpointCommitted("attempt", cast(Checkpoint, SimpleNamespace(step=step))))
    reports: Any = [runner.reports.get_nowait() for _ in range(2)]
    assert [report["step"] for report in reports] == [24, 48]


def test_trial_runner_reports_no_validation_within_an_epoch(tmp_path: Path) -> None:
    runner = TrialRunner(load_config(None, {}), Folder(str(tmp_path)), search_config())
    reported = []
    for split, step in (("validation", 10), ("validation", 20), ("epoch", 24), ("validation", 24), ("validation", 30)):
        runner._on_event(MetricsRow("attempt", {"split": split, "step": step, "epoch": 1, "perplexity": 5.0}))
        runner.resume.release()
        runner._on_event(CheckpointCommitted("attempt", cast(Checkpoint, SimpleNamespace(step=step))))
    while not runner.reports.empty():
        report: Any = runner.reports.get_nowait()
        reported.append(report["step"])
    assert reported == [24]


def test_trial_runner_reports_the_validation_that_ends_a_run_within_an_epoch(tmp_path: Path) -> None:
    """Patience ends a run after a validation, whose row precedes that of the epoch; ``read_score_rows`` has it, too."""
    runner = TrialRunner(load_config(None, {}), Folder(str(tmp_path)), search_config())
    for split, step in (("validation", 10), ("validation", 20), ("epoch", 20)):
        runner._on_event(MetricsRow("attempt", {"split": split, "step": step, "epoch": 1, "perplexity": 5.0}))
    runner.resume.release()
    runner._on_event(CheckpointCommitted("attempt", cast(Checkpoint, SimpleNamespace(step=20))))
    report: Any = runner.reports.get_nowait()
    assert report["step"] == 20
    assert runner.reports.empty()


def test_asha_stops_a_trial_whose_metric_is_not_a_number(tmp_path: Path) -> None:
    """A comparison with NaN is false, so it was never stopped."""
    space = {"optimizer.learning_rate": {"grid": [1.0, 0.1]}}
    search = search_config(scheduler="asha", space=space, metric="perplexity")
    trials = load_trials(Folder(str(tmp_path)), load_config(None, {"train.epochs": "8"}), search)
    scheduler, decisions = build_scheduler(TrialCallback(trials, max_failures=0)), []
    for number, score in enumerate((5.0, perplexity(math.nan))):
        runner, member = TrialRunner(trials.base, Folder(str(tmp_path)), search), SimpleNamespace(trial_id=number)
        runner.resume.release()
        runner._report({"split": "epoch", "epoch": 2, "step": 2, "perplexity": score})
        scheduler.on_trial_add(None, member)
        decisions.append(scheduler.on_trial_result(None, member, runner.reports.get_nowait()))
    assert decisions == ["CONTINUE", "STOP"]


def test_trial_callback_with_a_new_epoch_renews_the_failures_allowed(tmp_path: Path) -> None:
    search = search_config(space={"optimizer.learning_rate": {"grid": [1.0, 0.1]}})
    callback = TrialCallback(load_trials(Folder(str(tmp_path)), load_config(None, {}), search), max_failures=5)
    trial = Member(0)
    trial.config, trial.max_failures = {"trial": {"number": 0, "params": {"optimizer.learning_rate": 1.0}}}, 5
    callback.on_trial_start(0, [trial], trial)
    for num_failures, epoch, allowed in [(0, 1, 5), (3, 1, 5), (4, 2, 9), (6, 2, 9)]:
        trial.num_failures = num_failures
        callback.on_trial_result(0, [trial], trial, {"epoch": epoch, "score": 3.0})
        assert trial.max_failures == allowed


def test_trial_that_ends_while_records_are_written_is_recorded_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that was printed but not recorded ran again when the search was resumed, even if it had been stopped."""
    search = search_config(space={"optimizer.learning_rate": {"grid": [1.0, 0.1]}})
    trials = load_trials(Folder(str(tmp_path)), load_config(None, {}), search)
    callback, members, write = TrialCallback(trials, max_failures=5), [Member(0), Member(1)], trials.write_records
    for number, member in enumerate(members):
        member.config = {"trial": {"number": number, "params": {"optimizer.learning_rate": 1.0}}}
        callback.on_trial_start(0, [], member)

    def write_while_another_ends() -> None:
        write()
        monkeypatch.setattr(trials, "write_records", write)
        callback.on_trial_complete(0, [], members[1])

    monkeypatch.setattr(trials, "write_records", write_while_another_ends)
    callback.on_trial_complete(0, [], members[0])
    for _ in range(2):
        callback.record_ended(Console(io.StringIO()))
    assert list(records(tmp_path)) == ["00000", "00001"]


def test_restore_waits_for_the_lease_of_the_previous_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a checkpoint that the previous actor commits later would count as the newer one."""
    actor = TrialTrainable.__new__(TrialTrainable)
    actor.stop_request = StopRequest()
    folder, order = Folder(str(tmp_path)), []
    monkeypatch.setattr(TrialTrainable, "run_folder", folder)
    monkeypatch.setattr(TrialTrainable, "run_config", None)
    monkeypatch.setattr("job.cluster.trainable.import_checkpoint", lambda *_: order.append("imported"))
    lease = acquire_lease(folder)

    def write() -> None:
        order.append("written")
        lease.release()

    timer = threading.Timer(1.0, write)
    timer.start()
    actor.restore(TrainingResult(tune.Checkpoint(str(tmp_path)), {}))
    timer.join()
    assert order == ["written", "imported"]
    assert LeaseObserver(folder).is_held() is False


def test_trial_whose_lease_cannot_be_written_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may be full for a moment. Ray Tune restarts a trial that raises; it never restarts one that reports."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("job.storage._write_local", fail)
    config = load_config(None, {"scale.workers": "0"})
    with pytest.raises(RunFailed, match=r"owner.json: cannot be written: No space left on device; .*free space there"):
        TrialRunner(config, Folder(str(tmp_path)), search_config()).next_report()


class Malicious:
    """Pickled bytes of it run a command when they are unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_restore_of_a_folder_with_a_pickled_file_reads_the_checkpoint_alone(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune unpickles a file of this name if a checkpoint has one, and others may write to a search's storage."""
    flags = ["--corpus.source", prose, "--run.storage", tmp_path, "--scale.workers", 0, "--generate.prefix", "the"]
    assert job("train", *flags, "--model.hidden_size", 8, "--train.max_steps", 5, "--run.name", "run").status == 0
    run = Folder.resolve(str(tmp_path / "run"))
    actor: Any = TrialTrainable.__new__(TrialTrainable)
    actor.stop_request, actor.context = StopRequest(), SimpleNamespace(folder=Folder.resolve(str(tmp_path / "search")))
    actor.runner = SimpleNamespace(checkpoint=find_latest_valid(run / "checkpoints")[0])
    monkeypatch.setattr(TrialTrainable, "run_folder", run)
    monkeypatch.setattr(TrialTrainable, "run_config", not_none(read_existing_run(run)).config)
    saved = actor.save()
    (exported,) = (tmp_path / "search" / EXCHANGE_FOLDER).iterdir()
    for name in (_DICT_CHECKPOINT_FILE_NAME, ".tune_metadata", ".is_checkpoint"):
        (exported / name).write_bytes(pickle.dumps(Malicious(f"touch {tmp_path}/executed")))
    other = Folder.resolve(str(tmp_path / "other"))
    monkeypatch.setattr(TrialTrainable, "run_folder", other)
    actor.restore(saved)
    assert not_none(find_latest_valid(other / "checkpoints")[0]).step == 5
    assert not (tmp_path / "executed").exists()


def test_ray_tune_reads_and_writes_its_pickled_records_in_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It unpickles the error of a failed trial and the state of the search, also if somebody else wrote them."""
    search = search_config(space={"optimizer.learning_rate": {"grid": [1.0, 0.1]}}, concurrent=1, minutes=1e308)
    trials = load_trials(Folder(str(tmp_path)), load_config(None, {}), search)
    folders, order = [], []

    def create_tuner(trainable: object, *, run_config: Any, **options: Any) -> SimpleNamespace:
        folders.append((run_config.storage_path, os.stat(run_config.storage_path).st_mode & 0o777))
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr("job.cluster.tune.tune.Tuner", create_tuner)
    monkeypatch.setattr("job.cluster.tune.create_event_channel", lambda: None)
    monkeypatch.setattr("job.cluster.tune.check_processes", lambda remedy: None)  # would start Ray
    lease: Any = SimpleNamespace(check_if_stale=lambda: order.append("checked"))
    placement: Any = SimpleNamespace(resources={"CPU": 1})
    _run_trials(trials, placement, lease, StopRequest(), Console(io.StringIO()))
    ((path, mode),) = folders
    assert mode == 0o700
    assert tmp_path not in Path(path).parents
    assert not Path(path).exists()


def test_import_checkpoint_copies_all_files_and_keeps_the_new_learning_rate(prose: Path, tmp_path: Path) -> None:
    """Weights, optimizer, the state of every lane and the position in the text; only the learning rate is its own."""
    flags = ["--corpus.source", prose, "--run.storage", tmp_path, "--scale.workers", 0, "--generate.prefix", "the"]
    flags += ["--model.hidden_size", 16, "--optimizer.name", "adamw", "--train.log_every", 1, "--train.epochs", 3]
    for name, rate in (("winner", 0.01), ("loser", 0.02)):
        run_flags = ["--run.name", name, "--optimizer.learning_rate", rate, "--train.max_steps", 30]
        assert job("train", *flags, *run_flags).status == 0
    winner, loser = (Folder(str(tmp_path / name)) for name in ("winner", "loser"))
    exported = not_none(find_latest_valid(winner / "checkpoints")[0])
    copy_checkpoint(exported, Folder(str(tmp_path / "exchange")))
    (tmp_path / "loser" / "result.json").unlink()
    perturbed = override_config(not_none(read_existing_run(loser)).config, {"optimizer.learning_rate": 0.005})
    import_checkpoint(Folder(str(tmp_path / "exchange")), loser, perturbed)
    imported = not_none(find_latest_valid(loser / "checkpoints")[0])
    assert imported.name == exported.name
    assert imported.files == exported.files  # with their checksums
    ended = job("train", *flags, "--run.name", "loser", "--optimizer.learning_rate", 0.005)
    assert f"resuming from step {exported.step}" in ended.out
    assert job("train", *flags, "--run.name", "winner", "--optimizer.learning_rate", 0.01).status == 0
    metrics, winner_metrics = (
        {row["step"]: row for row in rows(tmp_path / name, "train")} for name in ("loser", "winner")
    )
    assert metrics[31]["nats"] == winner_metrics[31]["nats"]  # the loss before the first update with its own rate
    assert metrics[31]["learning_rate"] == 0.005
    assert metrics[32]["nats"] != winner_metrics[32]["nats"]


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
