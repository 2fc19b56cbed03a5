"""Checkpoints are complete or absent, whatever happens to their bytes; and the driver's handling of events."""

import json
import math
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import is_picture, job, not_none, pictures, result, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data.lanes import split_evenly
from job.errors import UserError
from job.inference.generate import load_model
from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.training.checkpoint import (
    Checkpoint,
    CorruptCheckpoint,
    _digest,
    commit_checkpoint,
    find_latest_valid,
    list_checkpoints,
    load_lane_state,
    serialize_lane_state,
    weights_sha256,
    write_part,
)
from job.training.progress import LossSum, Progress

REGULARIZATION: list[int | str] = [
    "--model.embedding_size", 16, "--model.hidden_size", "[9, 16]", "--model.tied", "true",
    "--model.dropout_locked", "true",
    "--model.input_dropout", "0.1", "--model.output_dropout", "0.2", "--model.embedding_dropout", "0.1",
    "--model.weight_drop", "0.3", "--model.activation_regularization", 2, "--model.temporal_regularization", 1,
]  # fmt: skip


def flags(prose: Path, storage: Path, *more: object) -> list[object]:
    return [
        "--corpus.source", prose, "--run.storage", storage, "--run.name", "run", "--scale.workers", 0,
        "--model.hidden_size", 16, "--stream.num_steps", 20, "--generate.prefix", "the", "--train.epochs", 3, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an LSTM, with momentum-like optimizer state."""
    storage = tmp_path_factory.mktemp("runs")
    with pictures():
        ended = job("train", *flags(prose, storage, "--model.cell", "lstm", "--optimizer.name", "adamw"))
    assert ended.status == 0, ended.err
    return storage / "run"


def test_finished_run_contains_the_documented_files(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.toml", "metrics.jsonl", "perplexity.png", "tensorboard", "checkpoints", "sample.txt", "result.json",
        ".lock", "driver.log", "samples.jsonl", "report.html",
    }  # fmt: skip
    found = result(run)
    last = run / found["checkpoint"]
    assert {"model.safetensors", "optimizer.safetensors", "progress.json", "vocabulary.json", "config.toml"} < {
        path.name for path in last.iterdir()
    }
    loaded = open_checkpoint(Folder(str(run)))
    assert found["weights_sha256"] == weights_sha256(loaded.weights)
    assert found["perplexity"] == rows(run, "epoch")[-1]["perplexity"]
    assert (run / "sample.txt").read_text() == found["generated"] + "\n"
    assert is_picture((run / "perplexity.png").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "stop"), [("rnn", 7), ("lstm", 61), ("rnn", 100)])
def test_resumed_run_equals_uninterrupted_run(prose: Path, tmp_path: Path, cell: str, stop: int) -> None:
    """Weights, generated text and metrics, at whatever step the run stopped."""
    more = ["--model.cell", cell, "--model.num_layers", 2, "--model.dropout", 0.3, "--optimizer.name", "adamw"]
    more += ["--optimizer.learning_rate", 0.003, "--train.log_every", 9, "--corpus.validation_fraction", 0.1]
    more += REGULARIZATION if cell == "lstm" else []
    assert job("train", *flags(prose, tmp_path / "whole", *more)).status == 0
    first = job("train", *flags(prose, tmp_path / "parts", *more, "--train.max_steps", stop))
    assert first.status == 0, first.err
    second = job("train", *flags(prose, tmp_path / "parts", *more))
    assert f"resuming from step {stop} of" in second.out
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert result(whole)["weights_sha256"] == result(parts)["weights_sha256"]
    assert result(whole)["generated"] == result(parts)["generated"]
    for split_name in ("train", "epoch", "validation"):
        expected, found = rows(whole, split_name), rows(parts, split_name)
        found = [row for row in found if row["step"] != stop or row["split"] == "train"]
        expected = [row for row in expected if row["step"] != stop or row["split"] == "train"]
        assert [(row["step"], row["nats"]) for row in found] == [(row["step"], row["nats"]) for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "first", "rest"),
    [
        (["--optimizer.schedule", "cosine"], ["--train.max_steps", 30], []),
        (["--optimizer.schedule", "cosine", "--optimizer.warmup_steps", 9], ["--train.max_steps", 7], []),
        (["--optimizer.schedule", "cosine", "--optimizer.schedule_steps", 20], ["--train.max_steps", 12], []),
        (["--optimizer.schedule", "cosine", "--optimizer.schedule_steps", 36], ["--train.epochs", 2], []),
        (["--optimizer.warmup_steps", 16], ["--train.epochs", 1], ["--train.epochs", 3, "--train.max_steps", 9999]),
    ],
)
def test_train_stopped_within_a_schedule_and_resumed_gives_uninterrupted_weights(
    prose: Path, tmp_path: Path, schedule: list[int | str], first: list[int | str], rest: list[int | str]
) -> None:
    schedule = [*schedule, "--corpus.max_tokens", 8000]  # 12 steps per epoch
    for storage, stages in (("whole", [rest]), ("parts", [first, rest])):
        for stage in stages:
            ended = job("train", *flags(prose, tmp_path / storage, *schedule, *stage))
            assert ended.status == 0, ended.err
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert result(whole)["weights_sha256"] == result(parts)["weights_sha256"]
    rates = [row["learning_rate"] for row in rows(whole, "epoch")]
    assert len(set(rates)) > 1
    assert rows(whole, "epoch")[-1]["learning_rate"] == rows(parts, "epoch")[-1]["learning_rate"]


def test_train_more_epochs_than_the_schedule_spans_is_refused(prose: Path, tmp_path: Path) -> None:
    cosine = flags(prose, tmp_path, "--optimizer.schedule", "cosine", "--corpus.max_tokens", 8000)
    assert job("train", *cosine, "--train.max_steps", 9).status == 0
    ended = job("train", *cosine, "--train.epochs", 4)
    assert ended.status == 2
    assert "train.epochs (3 → 4), the schedule's length unless optimizer.schedule_steps is set" in ended.err
    assert ended.err.count("\n") == 1


@pytest.fixture(scope="module")
def stopped_run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose last checkpoint is within an epoch."""
    storage = tmp_path_factory.mktemp("stopped")
    job(
        "train", *flags(prose, storage, "--model.cell", "lstm", "--train.max_steps", 30, "--train.checkpoint_every", 10)
    )
    return storage / "run"


def copy_of(stopped_run: Path, storage: Path) -> Checkpoint:
    """Copies the run into a storage, and returns its last checkpoint there."""
    shutil.copytree(stopped_run, storage / "run")
    return last_checkpoint(storage / "run")


def last_checkpoint(run: Path) -> Checkpoint:
    return not_none(find_latest_valid(Folder(str(run / "checkpoints")))[0])


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_load_lane_state_for_any_number_of_workers_returns_same_lanes(
    stopped_run: Path, tmp_path: Path, workers: int
) -> None:
    found = last_checkpoint(stopped_run)
    whole = load_lane_state(found, range(32))
    assert isinstance(whole, tuple)
    assert whole[0].shape == (1, 32, 16)
    # Written by one number of workers, read by another.
    folder = Folder(str(tmp_path / "again"))
    receipts = []
    for rank, lanes in enumerate(split_evenly(32, workers)):
        state = tuple(part[:, lanes.start : lanes.stop] for part in whole)
        files = serialize_lane_state(lanes, state)
        progress = None if rank else open_checkpoint(Folder(str(stopped_run))).progress
        receipts.append(write_part(folder, "step-000030-abcdef", files, workers, progress))
    again = commit_checkpoint(folder, "step-000030-abcdef", receipts)
    for other in (1, 2, 5):
        parts: list[Any] = [load_lane_state(again, lanes) for lanes in split_evenly(32, other)]
        for index in (0, 1):
            assert torch.equal(torch.cat([part[index] for part in parts], 1), whole[index])


def test_find_latest_valid_skips_and_reports_corrupt_checkpoints(
    prose: Path, stopped_run: Path, tmp_path: Path
) -> None:
    found = copy_of(stopped_run, tmp_path)
    place = tmp_path / "run" / "checkpoints"
    names = sorted(path.name for path in place.iterdir())
    assert [name[:11] for name in names] == ["step-000010", "step-000020", "step-000030"]
    weights = place / names[2] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    (place / names[1] / "manifest.json").write_bytes(b"{}")
    (place / "step-000040-abcdef").mkdir()  # never committed
    valid, skipped = find_latest_valid(Folder(str(place)))
    assert not_none(valid).step == 10
    assert [(corrupt.name, corrupt.reason) for corrupt in pickle.loads(pickle.dumps(skipped))] == [
        (names[2], "model.safetensors is damaged: its checksum differs from the manifest's"),
        (names[1], "the manifest is damaged"),
    ]
    assert found.step == 30
    ended = job("train", *flags(prose, tmp_path, "--model.cell", "lstm", "--train.max_steps", 40))
    assert "warning: " in ended.out
    assert "damaged: its checksum differs from the manifest's; the one before it is used" in ended.out
    assert "resuming from step 10" in ended.out
    assert ended.status == 0


def read_strict(data: bytes) -> dict[str, Any]:
    """Parses JSON as other programs do, which refuse NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(data, parse_constant=refuse)


@pytest.mark.slow
@pytest.mark.parametrize("nats", [[math.nan, 2.0, 3.0], [2.0, math.nan, math.inf], [math.nan, -math.inf, math.nan]])
def test_train_with_validation_loss_that_is_not_finite_never_has_it_as_best(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nats: list[float]
) -> None:
    """A NaN in the first epoch remained the best validation loss to the end."""
    losses = iter(nats)
    monkeypatch.setattr("job.training.trainer.validate", lambda *_: (LossSum(10 * next(losses), 10), None))
    arguments = ["--train.keep_checkpoints", 9, "--corpus.validation_fraction", 0.05, "--corpus.max_tokens", 8000]
    ended = job("train", *flags(prose, tmp_path, *arguments))
    assert ended.status == 0, ended.err
    run = tmp_path / "run"
    summary = read_strict((run / "result.json").read_bytes())
    found = [read_strict(line)["nats"] for line in (run / "metrics.jsonl").read_bytes().splitlines() if b'"val' in line]
    assert found == [value if math.isfinite(value) else None for value in nats]
    last, *_ = [read_strict(path.read_bytes()) for path in sorted(run.glob("checkpoints/*/progress.json"))[-1:]]
    for path in run.glob("checkpoints/*/manifest.json"):
        read_strict(path.read_bytes())
    if 2.0 in nats:
        assert summary["best_validation_perplexity"] == pytest.approx(math.exp(2))
        best = json.loads((run / summary["best_checkpoint"] / "manifest.json").read_text())["content"]
        assert best["validation_nats"] == last["best_validation_nats"] == 2.0
    else:
        assert "best_checkpoint" not in summary
        assert last["best_validation_nats"] is None


def test_checkpoint_of_early_version_with_nan_is_read_without(tmp_path: Path) -> None:
    content: dict[str, Any] = {"format": 1, "step": 1, "validation_nats": math.nan, "files": {}}
    path = Folder(str(tmp_path)) / "step-000001-abcdef"
    path.write("manifest.json", json.dumps({"content": content, "sha256": _digest(content)}).encode())
    [checkpoint], _ = list_checkpoints(Folder(str(tmp_path)))
    assert checkpoint.validation_nats is None


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json", "vocabulary.json", "progress.json"])
def test_generate_from_truncated_checkpoint_is_an_error(stopped_run: Path, tmp_path: Path, file: str) -> None:
    place = tmp_path / last_checkpoint(stopped_run).name
    shutil.copytree(stopped_run / "checkpoints" / place.name, place)
    (place / file).write_bytes((place / file).read_bytes()[:-7])
    ended = job("generate", place, "--generate.prefix", "the")
    assert ended.status == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert file in ended.err or "manifest" in ended.err


def test_generate_from_folder_that_is_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    for name in ("manifest.json", "config.toml"):
        (tmp_path / name).write_text('{"content": {"format": 99, "files": {}}, "sha256": "x"}')
    ended = job("generate", tmp_path)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "manifest is damaged" in ended.err
    ended = job("generate", tmp_path / "none")
    assert "neither a run with a checkpoint nor a checkpoint" in ended.err


def test_generate_from_later_format_version_is_an_error(run: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = {"format": 99, "step": 1, "validation_nats": None, "files": {}}
    manifest = {"content": content, "sha256": _digest(content)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert "has format 99, but this version reads 1" in job("generate", tmp_path).err


def test_storage_timeout_fails_the_run_and_removes_no_checkpoint(
    prose: Path, stopped_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that cannot be read now may be valid, so it is neither skipped nor removed."""
    copy_of(stopped_run, tmp_path)
    place = tmp_path / "run" / "checkpoints"
    before = sorted(path for path in place.rglob("*") if path.is_file())
    words = flags(prose, tmp_path, "--model.cell", "lstm", "--train.max_steps", 40)

    def fails(self: Folder, name: str, *more: Any) -> Any:
        if name == "model.safetensors":
            raise TimeoutError("no answer in time")
        return read(self, name, *more)

    read = Folder.read_with
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read_with", fails)
        ended = job("train", *words)
    assert ended.status == 1
    assert "no answer in time" in ended.err
    assert sorted(path for path in place.rglob("*") if path.is_file()) == before
    assert "resuming from step 30" in job("train", *words).out


def test_run_with_only_corrupt_checkpoints_fails_and_changes_nothing(
    prose: Path, stopped_run: Path, tmp_path: Path
) -> None:
    copy_of(stopped_run, tmp_path)
    place = tmp_path / "run" / "checkpoints"
    before = result(tmp_path / "run")
    for weights in place.glob("*/model.safetensors"):
        weights.write_bytes(b"")
    ended = job("train", *flags(prose, tmp_path, "--model.cell", "lstm", "--train.max_steps", 40))
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "no valid checkpoint" in ended.err
    assert "Resume:" not in ended.err
    assert result(tmp_path / "run") == before
    assert len(list(place.glob("*/manifest.json"))) == 3


def test_run_resumed_with_fewer_max_steps_finishes_at_its_step(prose: Path, stopped_run: Path, tmp_path: Path) -> None:
    copy_of(stopped_run, tmp_path)
    words = flags(prose, tmp_path, "--model.cell", "lstm", "--train.max_steps", 20)
    ended = job("train", *words)
    assert ended.status == 0, ended.err
    assert result(tmp_path / "run")["steps"] == 30
    assert [row["step"] for row in rows(tmp_path / "run", "epoch")] == [30]


def test_weights_sha256_accepts_scalars_and_integers() -> None:
    digest = weights_sha256({"scale": torch.tensor(1.0), "table": torch.arange(3)})
    assert len(digest) == 64


@pytest.fixture(scope="module")
def files(run: Path) -> dict[str, bytes]:
    """The files of a valid checkpoint, by name."""
    place = run / result(run)["checkpoint"]
    return {path.name: path.read_bytes() for path in place.iterdir()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_open_checkpoint_with_corrupt_bytes_raises_or_loads(
    files: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    """Any change of the files raises UserError or is harmless; readers trust no size that a file states."""
    place = tmp_path / "step-000001-abcdef"
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    victim = data.draw(st.sampled_from(sorted(files)))
    changed = bytearray(files[victim])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    for name, content in files.items():
        (place / name).write_bytes(bytes(changed) if name == victim else content)
    if victim != "manifest.json":  # as one who can also write the manifest would do it
        receipt = write_part(
            Folder(str(tmp_path)),
            place.name,
            {name: [(place / name).read_bytes()] for name in files if name != "manifest.json"},
            1,
            Progress(step=1),
        )
        commit_checkpoint(Folder(str(tmp_path)), place.name, [receipt])
    try:
        loaded = open_checkpoint(Folder(str(place)))
        load_lane_state(loaded.checkpoint, range(4))
        load_model(loaded)
    except (UserError, CorruptCheckpoint):
        pass


def rewrite(place: Path, file: str, change: Callable[[str], str]) -> None:
    """Changes a file of a checkpoint as one who can also write the manifest would do it."""
    contents = {path.name: path.read_bytes() for path in place.iterdir() if path.name != "manifest.json"}
    contents[file] = change(contents[file].decode()).encode()
    parts: dict[str, list[bytes | memoryview]] = {name: [data] for name, data in contents.items()}
    folder = Folder(str(place.parent))
    commit_checkpoint(folder, place.name, [write_part(folder, place.name, parts, 1, Progress(step=1))])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 20_000, "linear.weight is ("),
        ("embedding_size", 500_000, "embedding.weight is missing, expected ("),
        ("num_layers", 200, "rnn.bias_hh_l1 is missing"),
        ("hidden_size", 10**12, "model: "),
    ],
)
@pytest.mark.parametrize("cell", ["lstm", "cells:DecayCell"])
def test_generate_with_sizes_that_weights_do_not_have_is_refused_without_memory(
    run: Path, tmp_path: Path, cell: str, field: str, value: int, message: str
) -> None:
    """A small checkpoint whose configuration states large sizes, which would take gigabytes."""
    place = tmp_path / "step-000001-abcdef"
    shutil.copytree(run / result(run)["checkpoint"], place)

    def enlarge(text: str) -> str:
        old = {
            "hidden_size": "hidden_size = 16",
            "embedding_size": "embedding_size = 0",
            "num_layers": "num_layers = 1",
        }
        assert old[field] in text
        return text.replace(old[field], f"{field} = {value}").replace('cell = "lstm"', f'cell = "{cell}"')

    rewrite(place, "config.toml", enlarge)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = job("generate", place, "--generate.prefix", "the", "--model.cell", cell)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    if cell == "lstm" or field != "num_layers":  # of a custom cell only what surrounds it is compared
        assert message in ended.err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
