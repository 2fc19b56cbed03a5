"""The list of runs and searches of a storage."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, job

from job.run.lease import LEASE_TIMEOUT_S, Owner, acquire_lease
from job.run.metrics import METRICS_FILE
from job.storage import Folder
from job.training.checkpoint import Checkpoint, checkpoint_name, commit_checkpoint, write_part
from job.training.progress import Progress
from job.tuning.runs import ListedRun, list_runs
from job.tuning.trials import TRIALS_FILE

pytestmark = pytest.mark.slow

GOLDEN = ROOT / "tests" / "golden" / "63eb800"


def listed(storage: Path) -> dict[str, ListedRun]:
    return {run.name: run for run in list_runs(Folder(str(storage)))}


def make_run(folder: Path, *steps: int, num_checkpoints: int = 0) -> Path:
    """An unfinished run that has reported these steps, and has checkpoints of the steps 1, 2, …"""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    rows = [{"split": "epoch", "epoch": step, "step": step, "perplexity": step + 0.5, "nats": 1.0} for step in steps]
    (folder / METRICS_FILE).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for step in range(1, num_checkpoints + 1):
        make_checkpoint(Folder(str(folder / "checkpoints")), step)
    return folder


def make_checkpoint(folder: Folder, step: int) -> Checkpoint:
    name = checkpoint_name(step, "abcdef")
    return commit_checkpoint(folder, name, [write_part(folder, name, {"a.json": [b"{}"]}, 1, Progress(step=step))])


def write_owner(run: Path, heartbeat_age_s: float = 0.0, **changes: Any) -> None:
    (run / "owner.json").write_text(json.dumps(asdict(replace(Owner.this_process(), **changes))))
    age = (run / "owner.json").stat().st_mtime - heartbeat_age_s
    os.utime(run / "owner.json", (age, age))


def test_list_runs_of_finished_run_and_stopped_search(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "runs")
    runs = listed(tmp_path / "runs")
    result = json.loads((GOLDEN / "run" / "result.json").read_text())
    assert (runs["run"].kind, runs["run"].state, runs["run"].step) == ("run", "finished", result["steps"])
    assert runs["run"].perplexity == result["perplexity"]
    assert runs["run"].validation_perplexity == result["validation_perplexity"]
    search = runs["search"]
    assert (search.kind, search.state, search.trials_done, search.trials) == ("search", "stopped", 1, 3)


def test_list_runs_of_unfinished_run_has_the_last_step(tmp_path: Path) -> None:
    """Of the last row, or of the last checkpoint with a manifest if that is later."""
    make_run(tmp_path / "rows", 3, 7, num_checkpoints=2)
    last = make_run(tmp_path / "checkpoint", 1, num_checkpoints=3)
    (last / "checkpoints" / "step-000003-abcdef" / "manifest.json").unlink()
    make_run(tmp_path / "new")
    runs = listed(tmp_path)
    assert {name: (run.state, run.step, run.perplexity) for name, run in runs.items()} == {
        "rows": ("stopped", 7, 7.5), "checkpoint": ("stopped", 2, 1.5), "new": ("stopped", None, None),
    }  # fmt: skip


def test_list_runs_state_is_that_of_the_lease(tmp_path: Path) -> None:
    lease = acquire_lease(Folder(str(make_run(tmp_path / "alive", 1))))
    write_owner(make_run(tmp_path / "dead", 1), pid=2**22 + 1)
    write_owner(make_run(tmp_path / "elsewhere", 1), machine="another")
    write_owner(make_run(tmp_path / "silent", 1), LEASE_TIMEOUT_S + 1, machine="another")
    (make_run(tmp_path / "damaged", 1) / "owner.json").write_text("{")
    states = {name: run.state for name, run in listed(tmp_path).items()}
    lease.release()
    assert states == {
        "alive": "running", "dead": "interrupted", "elsewhere": "running", "silent": "interrupted",
        "damaged": "running",
    }  # fmt: skip
    assert listed(tmp_path)["alive"].state == "stopped"


def test_list_runs_of_search_has_the_best_of_the_trials_that_ended(tmp_path: Path) -> None:
    search = tmp_path / "it"
    search.mkdir()
    text = '[search]\nmetric = "validation_perplexity"\ntrials = 5\n'
    (search / "search.toml").write_text(f'{text}[search.space]\n"optimizer.learning_rate" = {{ uniform = [1, 2] }}\n')
    ends = [("finished", 4.0), ("stopped", 3.0), ("diverged", 1.0), ("failed", 2.0), ("finished", None)]
    records = {f"{number:05d}": {"state": s, "why": "", "score": score} for number, (s, score) in enumerate(ends)}
    (search / TRIALS_FILE).write_text(json.dumps(records))
    run = listed(tmp_path)["it"]
    assert (run.trials_done, run.trials, run.best_trial) == (4, 5, "00001")
    assert (run.perplexity, run.validation_perplexity) == (None, 3.0)
    (search / "best.toml").write_text("")
    assert listed(tmp_path)["it"].state == "finished"


MALFORMED = [b"", b"\xff\xfe\x00", b"[" * 100_000, b"{}", b'{"00000": 1}', b"[run]\nname = 3"]


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_list_runs_of_malformed_files_does_not_crash(tmp_path: Path, content: bytes) -> None:
    run = make_run(tmp_path / "run", 1, num_checkpoints=1)
    for name in (
        "result.json",
        METRICS_FILE,
        "config.toml",
        "owner.json",
        "checkpoints/step-000001-abcdef/manifest.json",
    ):
        (run / name).write_bytes(content)
    (tmp_path / "search").mkdir()
    for name in ("search.toml", TRIALS_FILE):
        (tmp_path / "search" / name).write_bytes(content)
    ended = job("runs", tmp_path)
    assert (ended.status, ended.err, ended.out.count("\n")) == (0, "", 3)
    state = "unreadable" if len(content) > 4096 else "running"  # by an unknown driver, or owner.json is too large
    assert listed(tmp_path)["run"].state == state
    assert listed(tmp_path)["search"].state in ("stopped", "unreadable")


def test_runs_leaves_out_other_folders_and_escapes_names(tmp_path: Path) -> None:
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    assert job("runs", tmp_path).out == f"no runs in {tmp_path}\n"
    make_run(tmp_path / "a\x1b[2J\nb")
    lines = job("runs", tmp_path).out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("'a\\x1b[2J\\nb'")


def test_runs_of_folder_that_cannot_be_read_is_shown_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", 1)
    infos = Folder.infos

    def refuse(folder: Folder) -> Any:
        if folder.name == "run":
            raise PermissionError("denied")
        return infos(folder)

    monkeypatch.setattr(Folder, "infos", refuse)
    assert listed(tmp_path)["run"] == ListedRun("run", "unknown", "unreadable")
    assert "unreadable" in job("runs", tmp_path).out


@pytest.mark.parametrize("name", ["driver.log", METRICS_FILE, "config.toml", "owner.json"])
def test_runs_of_folder_with_a_fifo_does_not_wait_for_its_writer(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", 1)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    words = [sys.executable, "-m", "job", "runs", str(tmp_path)]
    ended = subprocess.run(words, cwd=ROOT, timeout=60, check=True, capture_output=True, text=True)
    assert (ended.stderr, ended.stdout.count("\n")) == ("", 2)


def test_runs_without_storage_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in ([], ["no/such"], ["file:///no/such"], ["--json"]):
        ended = job("runs", *words)
        assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
        assert "no such folder" in ended.err


def test_runs_json_has_the_rows_of_the_table_in_their_order(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "runs")
    make_run(tmp_path / "runs" / "new", 5)
    for age, path in enumerate(("new", "search", "run")):
        for file in (tmp_path / "runs" / path, *(tmp_path / "runs" / path).iterdir()):
            os.utime(file, (10**9 - age, 10**9 - age))
    found = json.loads(job("runs", tmp_path / "runs", "--json").out)
    assert found["storage"] == str(tmp_path / "runs")
    assert [run["name"] for run in found["runs"]] == ["new", "search", "run"]
    assert found["runs"][0]["changed_at"] == "2001-09-09T01:46:40+00:00"
    lines = job("runs", tmp_path / "runs").out.splitlines()[1:]
    assert [line.split()[:3] for line in lines] == [[run["name"], run["kind"], run["state"]] for run in found["runs"]]


def test_list_runs_requests_do_not_depend_on_the_length_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "short" / "run", 1, num_checkpoints=1)
    make_run(tmp_path / "long" / "run", *range(1, 5000), num_checkpoints=12)
    requests = Counter[str]()
    for name in ("infos", "has", "read_with", "read_block"):
        method = getattr(Folder, name)

        def counted(folder: Folder, *args: Any, method: Any = method) -> Any:
            requests[folder.address.split("/")[len(tmp_path.parts)]] += 1
            return method(folder, *args)

        monkeypatch.setattr(Folder, name, counted)
    for storage in ("short", "long"):
        listed(tmp_path / storage)
    assert requests["long"] == requests["short"] < 12
