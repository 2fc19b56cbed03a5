"""The texts that a run samples while it trains: when, what, and that each is stored once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job, rows
from test_metrics import ObjectStore, read_events, row, store  # noqa: F401  a fixture

from job.config.config_file import load_config
from job.config.training import TrainConfig
from job.distributed.context import World
from job.inference import training_samples
from job.inference.training_samples import generate_samples
from job.run.metrics import MetricsLog
from job.run.samples import SAMPLES_FILE, read_samples
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.run_spec import RunSpec
from job.training.sample_schedule import INTERVAL, is_sample_due
from job.training.train_state import TrainState, build_train_state


def arguments(prose: Path, tmp_path: Path, **fields: Any) -> list[Any]:
    """Of a small run; an epoch has 12 steps."""
    values = {
        "corpus.source": prose, "corpus.max_tokens": 4000, "stream.batch_size": 8, "stream.num_steps": 40,
        "stream.offset": 0, "run.storage": tmp_path, "run.name": "run", "scale.workers": 0, "model.hidden_size": 16,
        "generate.prefix": "the", "generate.length": 8, "train.epochs": 3, "train.checkpoint_every": 5,
        **fields,
    }  # fmt: skip
    return [text for name, value in values.items() for text in (f"--{name}", value)]


def samples(folder: Path) -> list[dict[str, Any]]:
    """All of a sample but its time."""
    return [{key: value for key, value in row.items() if key != "time"} for row in read_samples(Folder(str(folder)))]


def built(prose: Path, **fields: str) -> tuple[RunSpec, TrainState]:
    config = load_config(None, {"corpus.source": str(prose), "model.hidden_size": "16", **fields})
    spec = build_run_spec(config, Folder("unused"))
    return spec, build_train_state(spec, World(0, 1, torch.device("cpu"), 1, "a"), "fp32")


# --- when ---


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5, 12])
def test_train_with_sample_every_samples_at_its_multiples_and_resumed_as_uninterrupted(
    prose: Path, tmp_path: Path, every: int
) -> None:
    fields = {"train.sample_every": every}
    assert job("train", *arguments(prose, tmp_path / "whole", **fields)).status == 0
    for max_steps in (7, 12, 20, 0):
        assert job("train", *arguments(prose, tmp_path, **fields, **{"train.max_steps": max_steps})).status == 0
    found = samples(tmp_path / "run")
    assert found == samples(tmp_path / "whole" / "run")
    expected = [(step, kind) for step in range(every, 37, every) for kind in ("greedy", "sampled")]
    assert [(row["step"], row["kind"]) for row in found] == expected
    assert [row["epoch"] for row in found] == [(row["step"] + 11) // 12 for row in found]
    assert len({row["continuation"] for row in found if row["kind"] == "sampled"}) == len(found) / 2


@pytest.mark.parametrize("epoch_steps", [1, 10, 600, 2000])
def test_is_sample_due_by_default_at_powers_of_two_and_once_per_interval(prose: Path, epoch_steps: int) -> None:
    _, state = built(prose)
    progress, tokens, due = state.progress, state.stream.tokens_per_step, []
    progress.window = epoch_steps
    for epoch in range(200):
        progress.epoch, progress.step = epoch, (epoch + 1) * epoch_steps
        progress.tokens = progress.step * tokens
        assert not is_sample_due(state, TrainConfig(), ends_epoch=False)
        if is_sample_due(state, TrainConfig(), ends_epoch=True):
            due.append(epoch + 1)
    assert {1, 2, 4, 8, 16, 32, 64, 128} <= set(due)
    assert len(due) <= 8 + 200 * epoch_steps * tokens / INTERVAL["cpu"]
    assert len(due) == 200 or epoch_steps * tokens < INTERVAL["cpu"]


# --- what ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimizer.averaging": "ema"},
        {"vocabulary.kind": "word", "vocabulary.min_frequency": "2"},
        {"model.cell": "lstm", "generate.temperature": "0.7"},
        {"train.reproducible": "true", "model.dropout": "0.3"},
    ],
)
def test_train_with_samples_has_the_weights_and_metrics_of_a_run_without(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str]
) -> None:
    fields |= {"train.sample_every": "1", "train.epochs": "1"}
    assert job("train", *arguments(prose, tmp_path / "a", **fields)).status == 0
    assert len(samples(tmp_path / "a" / "run")) == 24
    monkeypatch.setattr("job.run.local_launcher.generate_samples", lambda *_: [])
    assert job("train", *arguments(prose, tmp_path / "b", **fields)).status == 0
    assert samples(tmp_path / "b" / "run") == []
    results = [json.loads((tmp_path / name / "run" / "result.json").read_text()) for name in "ab"]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    nats = [[row["nats"] for row in rows(tmp_path / name / "run", "train")] for name in "ab"]
    assert nats[0] == nats[1]


@pytest.mark.parametrize("averaging", ["none", "ema"])
def test_last_greedy_sample_is_the_text_that_the_run_generates(prose: Path, tmp_path: Path, averaging: str) -> None:
    fields = {"train.sample_every": 12, "optimizer.averaging": averaging, "optimizer.learning_rate": 2}
    assert job("train", *arguments(prose, tmp_path, **fields)).status == 0
    *_, greedy, sampled = samples(tmp_path / "run")
    assert f"{greedy['prefix']}{greedy['continuation']}\n" == (tmp_path / "run" / "sample.txt").read_text()
    assert (greedy["kind"], sampled["kind"]) == ("greedy", "sampled")


def test_generate_samples_depends_on_seed_and_step_and_leaves_the_model_as_it_is(prose: Path) -> None:
    spec, state = built(prose, **{"vocabulary.kind": "word", "vocabulary.min_frequency": "3"})
    before = {name: (tensor, tensor.clone()) for name, tensor in state.model.state_dict(keep_vars=True).items()}
    pointers = [parameter.data_ptr() for parameter in state.model.parameters()]
    state.model.train()

    def sample(step: int) -> list[str]:
        state.progress.step = step
        return [row["continuation"] for row in generate_samples(spec, state)]

    first, second = sample(1), sample(2)
    assert sample(1) == first
    assert (first[0] == second[0], first[1] == second[1]) == (True, False)
    assert "<unk>" not in "".join(first + second)
    assert state.model.training
    assert all(torch.equal(tensor.detach(), copy) for tensor, copy in before.values())
    assert [parameter.data_ptr() for parameter in state.model.parameters()] == pointers


def test_generate_samples_is_bounded_in_length_and_prefix(prose: Path) -> None:
    spec, state = built(prose, **{"generate.prefix": "the " * 5000, "generate.length": "100000"})
    for sample in generate_samples(spec, state):
        assert len(sample["continuation"]) == training_samples.MAX_TOKENS
        assert len(sample["prefix"]) == training_samples.MAX_PREFIX


def test_generate_samples_of_a_diverged_model_is_empty(prose: Path) -> None:
    spec, state = built(prose)
    with torch.no_grad():
        state.model.linear.weight.fill_(float("nan"))
    assert generate_samples(spec, state) == []


# --- stored once ---


def sample_rows(step: int, text: str = "b") -> list[dict[str, Any]]:
    row = {"step": step, "epoch": 1, "prefix": "a", "continuation": text, "time": 1.0}
    return [{**row, "kind": kind} for kind in ("greedy", "sampled")]


@pytest.mark.parametrize("segment_bytes", [1, 10**6])
@pytest.mark.parametrize("where", ["disk", "object store"])
def test_metrics_log_has_each_sample_once_after_restarts(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, segment_bytes: int
) -> None:
    monkeypatch.setattr("job.run.metrics.SEGMENT_BYTES", segment_bytes)
    objects: ObjectStore = request.getfixturevalue("store")
    folder = Folder(str(tmp_path)) if where == "disk" else objects.folder()
    for start in (0, 2, 4, 6):  # an attempt ends two steps after its last checkpoint
        log = MetricsLog(folder)
        log.truncate(start)
        for step in (start + 1, start + 2, start + 3, start + 4):
            log.append(row("train", 1, step))
            log.append_samples(sample_rows(step, f"{start}") if step % 2 else [])
            if step == start + 2:
                log.sync()
        log.close()
    log = MetricsLog(folder)
    log.truncate(8)
    log.append_samples(sample_rows(9)[:1])
    log.merge()
    log.close()
    found = [(sample["step"], sample["kind"], sample["continuation"]) for sample in read_samples(folder)]
    expected = [(step, kind, f"{step - 1}") for step in (1, 3, 5, 7) for kind in ("greedy", "sampled")]
    assert found == [*expected, (9, "greedy", "b")]
    assert folder.names() == ["metrics.jsonl", "samples.jsonl", "tensorboard"]


def test_tensorboard_of_a_run_shows_samples_as_plain_text_and_hyperparameters(prose: Path, tmp_path: Path) -> None:
    assert job("train", *arguments(prose, tmp_path, **{"generate.prefix": "the *very* [x](y)"})).status == 0
    texts = [
        event for event in read_events(tmp_path / "run" / "tensorboard") if "samples" in event.summary.value[0].tag
    ]
    shown = [(event.step, event.summary.value[0].tensor.string_val[0].decode()) for event in texts]
    stored = samples(tmp_path / "run")
    assert [(step, text.replace("    ", "", 1)) for step, text in shown] == [
        (row["step"], (row["prefix"] + row["continuation"]).replace("\n", "\n    ")) for row in stored
    ]
    data = b"".join(file.read_bytes() for file in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"_hparams_/session_start_info" in data
    assert b"optimizer.learning_rate" in data
    assert b"corpus.source" not in data


def test_read_samples_ignores_lines_that_are_no_samples(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in sample_rows(1)]
    (tmp_path / SAMPLES_FILE).write_text("\n".join(["[]", lines[0], '{"step": 1}', lines[1], lines[0], '{"step"']))
    assert [row["kind"] for row in read_samples(Folder(str(tmp_path)))] == ["greedy", "sampled"]
