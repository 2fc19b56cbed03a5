"""``run.resume_from``: a new run from a checkpoint of another one."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, job, result, rows
from object_store import bucket_address, s3_server

from job.config.config_file import load_config, load_search_config
from job.config.schema import Config
from job.console import Console
from job.errors import UserError
from job.run import resume_from
from job.run.resume_from import SourceCheckpoint, import_source_checkpoint, open_source_checkpoint
from job.run.run_dir import read_existing_run
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.checkpoint import list_checkpoints
from job.tuning.setup import check_search

pytestmark = pytest.mark.slow

SMALL = {
    "--scale.workers": 0, "--model.hidden_size": 8, "--model.dropout": 0.1, "--stream.batch_size": 4,
    "--stream.num_steps": 25, "--train.epochs": 3, "--train.checkpoint_every": 50, "--train.keep_checkpoints": 99,
    "--train.log_every": 10, "--optimizer.name": "adamw", "--generate.prefix": "the", "--generate.length": 5,
}  # fmt: skip


def train(storage: object, name: str, *words: object) -> Ended:
    return job("train", "--run.storage", storage, "--run.name", name, *words)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def text(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(prose.read_text()[:8000])
    return path


@pytest.fixture(scope="module")
def source(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three epochs of 79 or 80 steps."""
    storage = tmp_path_factory.mktemp("source")
    words = [word for flag in SMALL.items() for word in flag]
    ended = train(storage, "a", *words, "--corpus.source", text, "--train.reproducible", "true")
    assert ended.status == 0, ended.err
    return storage / "a"


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    """A checkpoint in the middle of the second epoch."""
    return next(source.glob("checkpoints/step-000100-*"))


def losses(run: Path, split: str = "train") -> list[tuple[int, float]]:
    return [(row["step"], row["nats"]) for row in rows(run, split)]


def test_run_from_checkpoint_without_changes_equals_the_uninterrupted_run(
    source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    before = digests(source)
    ended = train(tmp_path, "b", "--run.resume_from", checkpoint)
    assert ended.status == 0, ended.err
    assert f"from {checkpoint}, nothing changed\n" in ended.out
    assert "resuming from step 100 of " in ended.out
    assert digests(source) == before
    found, expected = result(tmp_path / "b"), result(source)
    for name in ("weights_sha256", "perplexity", "epochs", "steps", "tokens", "generated", "corpus"):
        assert found[name] == expected[name]
    assert found["resumed_from"] == {"checkpoint": str(checkpoint), "step": 100, "changed": {}}
    for split in ("train", "epoch"):
        assert losses(tmp_path / "b", split) == [entry for entry in losses(source, split) if entry[0] > 100]


def test_run_from_checkpoint_between_epochs_equals_the_uninterrupted_run(text: Path, tmp_path: Path) -> None:
    """Without ``train.reproducible``; the checkpoint is the first of the second epoch."""
    words = [word for flag in SMALL.items() for word in flag]
    assert train(tmp_path, "a", *words, "--corpus.source", text, "--model.cell", "lstm").status == 0
    (checkpoint,) = [path for path in tmp_path.glob("a/checkpoints/*") if path.name[5:11] in ("000079", "000080")]
    ended = train(tmp_path, "b", "--run.resume_from", checkpoint)
    assert ended.status == 0, ended.err
    assert result(tmp_path / "b")["weights_sha256"] == result(tmp_path / "a")["weights_sha256"]
    assert losses(tmp_path / "b", "epoch") == losses(tmp_path / "a", "epoch")[1:]


@pytest.mark.cluster
def test_run_from_checkpoint_on_two_workers_equals_the_uninterrupted_run(
    source: Path, checkpoint: Path, tmp_path: Path, on_cluster: None
) -> None:
    ended = train(tmp_path, "b", "--run.resume_from", checkpoint, "--scale.workers", 2)
    assert ended.status == 0, ended.err
    assert {row["workers"] for row in rows(tmp_path / "b", "epoch")} == {2}
    assert result(tmp_path / "b")["weights_sha256"] == result(source)["weights_sha256"]
    assert losses(tmp_path / "b") == [entry for entry in losses(source) if entry[0] > 100]


def test_run_from_run_with_changes_records_them_and_needs_the_other_run_no_more(
    source: Path, text: Path, tmp_path: Path
) -> None:
    """The values that are not given are those of the checkpoint, on the first and on any later call."""
    other = shutil.copytree(source, tmp_path / "a")
    last = result(source)["steps"]
    changes = ["--optimizer.learning_rate", 0.01, "--train.epochs", 4, "--optimizer.schedule", "cosine"]
    words = ["--run.resume_from", other, *changes]
    stopped = train(tmp_path, "b", *words, "--train.max_steps", last + 20)
    assert stopped.status == 0, stopped.err
    described = 'optimizer.learning_rate (0.1 → 0.01), optimizer.schedule ("constant" → "cosine"), train.epochs (3 → 4)'
    assert described in stopped.out
    header, *_ = (tmp_path / "b" / "config.toml").read_text().splitlines()
    assert header.startswith(f'# From "{other}/checkpoints/step-000{last}-')
    assert header.endswith(f"changed: {described}.")
    shutil.rmtree(other)
    ended = train(tmp_path, "b", *words, "--train.max_steps", 0)
    assert ended.status == 0, ended.err
    found = result(tmp_path / "b")
    assert found["epochs"] == 4
    assert found["resumed_from"]["changed"]["optimizer.learning_rate"] == [0.1, 0.01]
    assert [row["step"] for row in rows(tmp_path / "b", "train")] == list(
        range(last // 10 * 10 + 10, found["steps"], 10)
    )
    existing = read_existing_run(Folder(str(tmp_path / "b")))
    assert existing
    assert existing.config.run.resume_from == str(other)
    assert existing.config.model.hidden_size == 8


def test_run_from_checkpoint_is_given_by_its_configuration_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text(f'[run]\nresume_from = "{checkpoint}"\n[optimizer]\nlearning_rate = 0.5\n[train]\nepochs = 9\n')
    config = load_config(str(path), {"train.epochs": "7"})
    assert (config.optimizer.learning_rate, config.train.epochs, config.model.hidden_size) == (0.5, 7, 8)
    assert (config.run.name, config.run.storage) == ("", "runs")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"stream.batch_size": 8, "model.hidden_size": 9}, "stream.batch_size (4 → 8), model.hidden_size (8 → 9)"),
        ({"stream.num_steps": 26}, "stream.num_steps (25 → 26)"),
        ({"vocabulary.min_frequency": 2}, "vocabulary.min_frequency (0 → 2)"),
        ({"corpus.validation_fraction": 0.2}, "corpus.validation_fraction (0.0 → 0.2)"),
        ({"run.seed": 1}, "run.seed (0 → 1)"),
        ({"train.precision": "fp64"}, 'train.precision ("auto" → "fp64")'),
        ({"optimizer.name": "sgd"}, 'optimizer.name ("adamw" → "sgd")'),
        ({"train.epochs": 1}, "nothing is left to train after epoch 1, step 100; raise train.epochs"),
        ({"train.max_steps": 100}, "nothing is left to train after epoch 1, step 100; raise train.epochs"),
        ({"corpus.source": __file__}, "is not the text that this run was started with"),
    ],
)
def test_run_from_checkpoint_that_does_not_fit_is_an_error(
    checkpoint: Path, tmp_path: Path, flags: dict[str, Any], problem: str
) -> None:
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    ended = train(tmp_path / "runs", "b", "--run.resume_from", checkpoint, *words)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert f"run.resume_from = {checkpoint}: " in ended.err
    assert problem in ended.err
    assert not (tmp_path / "runs").exists()


def test_run_from_a_moved_text_starts(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    moved = shutil.copy(text, tmp_path / "moved.txt")
    ended = train(tmp_path, "b", "--run.resume_from", checkpoint, "--corpus.source", moved, "--train.max_steps", 101)
    assert ended.status == 0, ended.err


def test_run_from_what_is_no_checkpoint_is_an_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    shutil.copy(source / "config.toml", tmp_path / "search")
    (tmp_path / "search" / "search.toml").write_text("")
    for path, problem in {
        tmp_path / "none": "neither a run nor a checkpoint",
        tmp_path: "neither a run nor a checkpoint",
        source / "config.toml": "neither a run nor a checkpoint",
        tmp_path / "search": "is a search and not a run; give one of the runs",
        "gopher://x/y": "not a URI that pyarrow supports",
    }.items():
        ended = train(tmp_path / "runs", "b", "--run.resume_from", path)
        assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
        assert f"run.resume_from = {path}: " in ended.err
        assert problem in ended.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", ["optimizer.safetensors", "lanes-00000-00003.safetensors", "model.safetensors"])
def test_run_from_damaged_checkpoint_is_an_error_and_from_its_run_uses_the_one_before(
    source: Path, tmp_path: Path, file: str
) -> None:
    other = shutil.copytree(source, tmp_path / "a")
    damaged = next(other.glob("checkpoints/step-000150-*"))
    for later in other.glob("checkpoints/step-*"):
        if later.name > damaged.name:
            shutil.rmtree(later)
    path = damaged / file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    ended = train(tmp_path / "runs", "b", "--run.resume_from", damaged)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert f"{file} is damaged" in ended.err
    assert not (tmp_path / "runs").exists()
    ended = train(tmp_path / "runs", "b", "--run.resume_from", other, "--train.max_steps", 101)
    assert "resuming from step 100 of" in ended.out


def test_run_from_its_own_checkpoint_is_an_error(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    before = digests(source)
    for path in (checkpoint, source, tmp_path / "link", f"file://{source}"):
        ended = train(source.parent, "a", "--run.resume_from", path)
        assert (ended.status, ended.err.count("\n")) == (2, 1)
        assert "is this run itself; choose another run.name" in ended.err
    assert digests(source) == before


def test_existing_run_with_another_source_is_an_error(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = ["--train.max_steps", 101]
    assert train(tmp_path, "b", "--run.resume_from", checkpoint, *words).status == 0
    ended = train(tmp_path, "b", "--run.resume_from", source, *words)
    assert f'exists with another configuration: run.resume_from ("{checkpoint}" → "{source}")' in ended.err
    again = job("train", tmp_path / "b" / "config.toml", "--train.max_steps", 102)
    assert "resuming from step 101 of" in again.out
    stored = read_existing_run(Folder(str(tmp_path / "b")))
    assert stored
    assert stored.config.run.resume_from == str(checkpoint)


def test_unnamed_run_from_checkpoint_does_not_resume_one_from_the_start(checkpoint: Path, tmp_path: Path) -> None:
    storage = ["--run.storage", tmp_path]
    first = job("train", *storage, "--run.resume_from", checkpoint, "--train.max_steps", 101)
    assert "run run-1: " in first.out
    assert "run run-1: " in job("train", *storage, "--run.resume_from", checkpoint, "--train.max_steps", 102).out
    flags = [word for flag in SMALL.items() for word in flag]
    config = load_config(None, {"run.resume_from": str(checkpoint)})
    words = [*flags, "--corpus.source", config.corpus.source, "--train.reproducible", "true", "--train.max_steps", 1]
    assert "run run-2: " in job("train", *storage, *words).out


def test_run_from_checkpoint_with_custom_cell_does_not_import_it(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace('cell = "rnn"', 'cell = "evil:Cell"'))
    ended = train(tmp_path / "runs", "b", "--run.resume_from", other)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert "code named by a file is not imported; if you trust it, add --model.cell evil:Cell" in ended.err


class Killed(BaseException):
    """The death of a driver."""


def test_import_killed_at_any_write_is_completed_by_the_same_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, {"run.resume_from": str(checkpoint)})
    write, writes_left = Folder.write, [0]

    def write_or_die(folder: Folder, name: str, *parts: bytes) -> None:
        if writes_left[0] == 0:
            raise Killed
        writes_left[0] -= 1
        write(folder, name, *parts)

    monkeypatch.setattr(Folder, "write", write_or_die)
    num_writes = len(list(checkpoint.iterdir())) + 1
    for count in range(num_writes):
        folder = Folder(str(tmp_path / str(count)))
        dataset = build_run_spec(config, folder).dataset
        source = open_source_checkpoint(config, dataset, folder)
        assert source
        writes_left[0] = count
        with pytest.raises(Killed):
            import_source_checkpoint(source, config, folder)
        assert list_checkpoints(folder / "checkpoints") == ([], [])
        assert open_source_checkpoint(config, dataset, folder) == source
        writes_left[0] = num_writes
        import_source_checkpoint(source, config, folder)
        assert writes_left[0] == 0
        assert digests(tmp_path / str(count) / "checkpoints" / checkpoint.name) == digests(checkpoint)
        assert open_source_checkpoint(config, dataset, folder) is None


def test_train_killed_after_its_configuration_was_written_starts_from_the_checkpoint(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    words = ["--run.resume_from", checkpoint, "--optimizer.learning_rate", 0.02]
    with monkeypatch.context() as patch:
        patch.setattr(resume_from, "copy_checkpoint", die)
        train(tmp_path, "b", *words)
    assert (tmp_path / "b" / "config.toml").exists()
    ended = train(tmp_path, "b", *words)
    assert ended.status == 0, ended.err
    assert "resuming from step 100 of" in ended.out
    assert result(tmp_path / "b")["resumed_from"]["changed"] == {"optimizer.learning_rate": [0.1, 0.02]}


@pytest.mark.slow
def test_run_from_checkpoint_in_object_store_equals_the_uninterrupted_run(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("moto")
    with s3_server() as port:
        run = Folder.resolve(bucket_address(port, "runs")) / "a"
        run.upload(source)
        last = max(name for name in (run / "checkpoints").names() if name < "step-000200")
        address = (run / "checkpoints" / last).address
        ended = train(bucket_address(port, "runs"), "b", "--run.resume_from", address)
        assert ended.status == 0, ended.err
        assert "report.html was not written" not in ended.out and "/report.html" in ended.out
        assert run.contains(Folder.resolve(address))
        assert not run.contains(Folder.resolve(bucket_address(port, "runs/ab")))
        found = json.loads((run.parent / "b").read("result.json"))
        ended = job("report", (run.parent / "b").address)
        assert (ended.status, ended.out) == (0, f"{run.parent / 'b'}/report.html\n"), ended.err
        assert (run.parent / "b").read("report.html").startswith(b"<!doctype html>")
    assert found["weights_sha256"] == result(source)["weights_sha256"]
    assert found["resumed_from"]["checkpoint"] == address


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        ('"optimizer.learning_rate" = { grid = [0.1, 0.2] }', ""),
        ('"model.dropout" = { grid = [0.1, 0.2] }', ""),
        ('"model.hidden_size" = { grid = [8, 9] }', "a run from it cannot have another model.hidden_size (8 → 9)"),
        ('"run.resume_from" = { choice = ["a", "b"] }', "all trials have the same run.resume_from; set it in [run]"),
    ],
)
def test_search_from_checkpoint_checks_its_trials(checkpoint: Path, tmp_path: Path, space: str, problem: str) -> None:
    path = tmp_path / "it.toml"
    path.write_text(f'[run]\nresume_from = "{checkpoint}"\n[search.space]\n{space}\n')

    def check() -> Config:
        config, search = load_search_config(str(path), {"search.metric": "perplexity"})
        return check_search(config, search, Folder(str(tmp_path / "it")), Console())

    if problem:
        with pytest.raises(UserError, match=r"run\.resume_from") as raised:
            check()
        assert problem in str(raised.value)
    else:
        assert check().model.hidden_size == 8


def test_source_check_allows_a_longer_list_of_offsets(checkpoint: Path) -> None:
    folder = Folder(str(checkpoint))
    config = load_config(None, {"run.resume_from": str(checkpoint), "stream.offset": "[1, 2, 3]"})
    source = SourceCheckpoint(list_checkpoints(folder.parent)[0][0], config)
    longer = {"run.resume_from": str(checkpoint), "stream.offset": "[1, 2, 3, 4]", "train.epochs": "4"}
    source.check(load_config(None, longer))
    with pytest.raises(UserError, match=r"stream\.offset"):
        source.check(load_config(None, {**longer, "stream.offset": "[1, 2, 4, 4]"}))
