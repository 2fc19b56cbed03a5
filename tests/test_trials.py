"""Trials of a search within Ray Tune, without a cluster: schedulers, reports, and the exchange of checkpoints."""

import io
import json
import math
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import job, not_none, rows, search_config
from ray import tune
from ray.tune.trainable.trainable import _DICT_CHECKPOINT_FILE_NAME

from job.cluster.ray_extensions import TrainingResult
from job.cluster.schedulers import build_scheduler
from job.cluster.trainable import TrialRunner, TrialTrainable
from job.cluster.tune import _run_trials
from job.cluster.tune_callbacks import TrialCallback
from job.config.config_file import load_config
from job.config.toml import override_config
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
from job.tuning.trials import load_trials, trial_name

pytestmark = pytest.mark.slow


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
    assert list(json.loads((tmp_path / "trials.json").read_text())) == ["00000", "00001"]


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
