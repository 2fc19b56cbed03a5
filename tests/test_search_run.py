"""Searches in this process, whose trials run one after another: faults of storage, take-over, and resuming."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from conftest import not_none, search_config
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs, parquet

from job import storage
from job.cluster.tune import run_search
from job.config.config_file import load_config
from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.console import Console
from job.errors import RunFailed, UserError
from job.run.driver import run_training
from job.run.lease import Lease
from job.run.local_launcher import LocalLauncher
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.checkpoint import find_latest_valid
from job.tuning.exchange import export_checkpoint, import_checkpoint
from job.tuning.plots import plot_curves
from job.tuning.trials import (
    TRIALS_FILE,
    Trials,
    trial_config,
)


@pytest.fixture
def small_search(prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that runs a search of two short trials in ``tmp_path / "it"``, and the content of that folder."""

    def run_trials(trials: Trials, placement: None, lease: Lease, stop_request: StopRequest, console: Console) -> None:
        for trial in [trial for trial in trials if not trial.is_done]:
            trials.start(trial.number, trial.params)
            config = trial_config(trials.base, trials.folder, trial.number, trial.params)
            run_training(config, "", Console(io.StringIO()), LocalLauncher())
            trials.end(trial.number, "finished")
            trials.write_records()

    @contextlib.contextmanager
    def connected(
        base: Config, search: SearchConfig, console: Console
    ) -> Iterator[tuple[tuple[Config, SearchConfig], None]]:
        yield (base, search), None

    monkeypatch.setattr("job.cluster.tune._connected", connected)
    monkeypatch.setattr("job.cluster.tune._run_trials", run_trials)
    flags = {"corpus.source": str(prose), "corpus.validation_fraction": "0.1", "generate.prefix": "the"}
    flags |= {"run.storage": str(tmp_path), "run.name": "it", "model.hidden_size": "8", "scale.workers": "0"}
    config = load_config(None, {**flags, "train.epochs": "1", "train.max_steps": "5"})
    search = search_config(space={"optimizer.learning_rate": {"grid": [0.1, 1.0]}})
    output = io.StringIO()

    def run() -> tuple[int, str]:
        return run_search(config, search, "", Console(output)), output.getvalue()

    return run


def take_over(folder: Folder) -> None:
    """Overwrites the lease as the next driver does after it has expired."""
    owner = json.loads(folder.read("owner.json"))
    folder.write("owner.json", json.dumps({**owner, "token": "of the new owner"}).encode())


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        ("job.cluster.tune.config_to_toml", ["search.toml", "trials.json", "best.toml"]),
        ("job.cluster.tune._run_trials", ["trials.json", "sample.txt", "best.toml"]),
        ("job.cluster.tune.write_results", ["sample.txt", "best.toml"]),
        ("job.tuning.results.plot_curves", ["curves.png", "best.toml"]),
        ("job.tuning.results.hparams", ["tensorboard", "best.toml"]),
    ],
)
def test_search_after_takeover_writes_no_records(
    small_search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, missing: list[str]
) -> None:
    original = resolve_name(function)

    def call(*args: Any, **options: Any) -> str:
        take_over(Folder(str(tmp_path / "it")))
        return original(*args, **options)

    monkeypatch.setattr(function, call)
    with pytest.raises(RunFailed, match="another driver has taken this run over"):
        small_search()
    assert not set(missing) & {path.name for path in (tmp_path / "it").iterdir()}
    assert b"of the new owner" in (tmp_path / "it" / "owner.json").read_bytes()


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("search.toml", errno.EROFS),
        ("trials.json", errno.ENOSPC),
        pytest.param("trials.parquet", errno.ENOSPC, marks=pytest.mark.slow),
        pytest.param("best.toml", errno.EROFS, marks=pytest.mark.slow),
    ],
)
def test_search_on_full_or_read_only_storage_fails_with_one_line_and_resumes(
    small_search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, file: str, number: int
) -> None:
    write = storage._write_local

    def fail(folder: Path, name: str, data: tuple[Any, ...], check_change: Callable[..., Any]) -> None:
        if name == file:
            raise OSError(number, os.strerror(number))
        write(folder, name, data, check_change)

    with monkeypatch.context() as patch, pytest.raises(RunFailed) as error:
        patch.setattr(storage, "_write_local", fail)
        small_search()
    assert error.value.problem.endswith(f"it: cannot be read or written: {os.strerror(number)}")
    assert error.value.remedy == "the same command resumes the search"
    status, output = small_search()
    assert status == 0
    assert "best is trial" in output


def test_search_on_object_store_with_temporary_errors_finishes(
    small_search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One 503 ended it."""
    failed = set()

    class Store(fs.FSSpecHandler):
        """A disk that is used like an object store and fails each first write of a file."""

        def open_output_stream(self, path: str, metadata: object) -> Any:
            if path not in failed:
                failed.add(path)
                raise OSError("AWS Error SLOW_DOWN")
            return super().open_output_stream(path, metadata)

    store = fs.PyFileSystem(Store(LocalFileSystem(auto_mkdir=True)))
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(Folder, "resolve", lambda address: Folder(address, location=(store, address)))
    assert small_search()[0] == 0
    assert {path.rpartition("/it/")[2] for path in failed} >= {"search.toml", "trials.json", "best.toml"}


@pytest.mark.slow
def test_search_with_files_that_the_user_removed_restores_them(
    small_search: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "it"
    assert small_search()[0] == 0
    finished = [path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")]
    for name in ("sample.txt", "best.toml"):
        (folder / name).unlink()
        assert small_search()[0] == 0
        assert (folder / name).exists()
    assert [path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")] == finished
    shutil.rmtree(folder / "trials" / "00001")
    assert small_search()[0] == 0
    assert (folder / "trials" / "00001" / "result.json").exists()
    for run in (folder / "trials").iterdir():
        shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunFailed, match=r"trials/0000\d: has no checkpoint; remove it to run it again"):
        small_search()


@pytest.mark.slow
def test_search_runs_a_stopped_trial_again_if_its_folder_was_removed(
    small_search: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "it"
    assert small_search()[0] == 0
    shutil.rmtree(folder / "trials")
    stopped = {f"0000{number}": {"state": "stopped", "why": "", "point": {}} for number in range(2)}
    (folder / "trials.json").write_text(json.dumps(stopped))
    assert small_search()[0] == 0
    assert len(list(folder.glob("trials/*/result.json"))) == 2


@pytest.mark.slow
def test_search_whose_trial_is_a_link_to_another_disk_writes_there(
    small_search: Callable[..., Any], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "it" / "trials").mkdir(parents=True)
    (tmp_path / "it" / "trials" / "00001").symlink_to(elsewhere)
    assert small_search()[0] == 0
    assert (elsewhere / "result.json").exists()
    checkpoint = not_none(find_latest_valid(Folder(str(elsewhere / "checkpoints")))[0])
    (elsewhere / "checkpoints" / "of the user").mkdir()
    exchange = Folder(str(tmp_path / "exchange"))
    export_checkpoint(checkpoint, Folder(str(elsewhere)), exchange)
    (elsewhere / "exchanged").unlink()
    import_checkpoint(exchange, Folder(str(tmp_path / "it" / "trials" / "00001")), load_config(None, {}))
    assert {path.name for path in (elsewhere / "checkpoints").iterdir()} == {checkpoint.name, "of the user"}


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"00000": ' + "[" * 100_000, '{"00000": "stopped"}', '{"00000": {"state": []}}', "\udcff"],
)
def test_search_with_damaged_records_is_refused(small_search: Callable[..., Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / TRIALS_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"it/trials\.json: invalid content; remove it to retry failed trials"):
        small_search()


def test_search_interrupted_while_it_writes_results_completes_them(
    small_search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to stop, and a search without its results would have to write all again."""

    def plot(trials: Trials) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return plot_curves(trials)

    monkeypatch.setattr("job.tuning.results.plot_curves", plot)
    assert small_search()[0] == 0
    assert (tmp_path / "it" / "best.toml").exists()
    (tmp_path / "it" / "sample.txt").write_bytes(b"\xff")
    assert "is finished" in small_search()[1]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["search.toml", "trials.json", "sample.txt", "trials.parquet", "best.toml"])
def test_search_killed_while_it_writes_a_record_resumes_with_the_same_result(
    small_search: Callable[..., Any], tmp_path: Path, file: str
) -> None:
    assert small_search()[0] == 0
    folder = tmp_path / "it"
    best = (folder / "best.toml").read_bytes()
    shutil.rmtree(folder)
    write = storage._write_local

    class Killed(BaseException):
        pass

    def kill(folder: Path, name: str, data: tuple[Any, ...], check_change: Callable[..., Any]) -> None:
        if name == file:
            (folder / f".{name}.1-1").write_bytes(b"".join(data)[:100])
            raise Killed
        write(folder, name, data, check_change)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "_write_local", kill)
        small_search()
    assert not (folder / "best.toml").exists()
    assert small_search()[0] == 0
    assert (folder / "best.toml").read_bytes() == best
    assert parquet.read_table(folder / "trials.parquet").column("state").to_pylist() == ["finished"] * 2
