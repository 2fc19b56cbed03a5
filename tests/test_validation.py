"""Validation during a run: it does not disturb the training, and each step is validated once, whatever happens."""

import json
import math
import multiprocessing
import shutil
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import job, not_none, result, rows
from test_shared_memory import free_port
from torch.multiprocessing.spawn import spawn

from job.config.config_file import load_config
from job.console import Console
from job.distributed.context import World
from job.distributed.gradient_sync import ControlFlags
from job.errors import UserError
from job.run.driver import run_training
from job.run.local_launcher import LocalLauncher
from job.run.setup import build_run_spec
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.events import Event, MetricsRow, PartWritten
from job.training.run_spec import RunSpec
from job.training.trainer import train

EVERY = 5
FLAGS = {
    "corpus.max_tokens": 9000, "corpus.validation_fraction": 0.1, "stream.batch_size": 8, "stream.num_steps": 50,
    "stream.offset": 0, "model.hidden_size": 16, "optimizer.name": "adamw", "optimizer.learning_rate": 0.01,
    "train.epochs": 2, "train.log_every": 1, "train.keep_checkpoints": 1, "train.checkpoint_every": 4,
    "train.validate_every": EVERY, "train.precision": "fp32", "scale.workers": 0, "generate.prefix": "the",
}  # fmt: skip  # 20 steps in each epoch


def config_flags(prose: Path, **more: Any) -> dict[str, Any]:
    return {**FLAGS, "corpus.source": str(prose), **{name.replace("__", "."): value for name, value in more.items()}}


def words(flags: dict[str, Any]) -> list[object]:
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


def run(prose: Path, storage: Path, name: str, **more: Any) -> Path:
    """The folder of a run that this command finishes."""
    ended = job("train", *words(config_flags(prose, run__storage=storage, run__name=name, **more)))
    assert ended.status == 0, ended.err
    return storage / name


def validations(folder: Path) -> list[tuple[int, int, float]]:
    return [(row["epoch"], row["step"], row["nats"]) for row in rows(folder, "validation")]


@pytest.fixture(scope="module")
def uninterrupted(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not stopped."""
    return run(prose, tmp_path_factory.mktemp("runs"), "uninterrupted")


def stop_at(prose: Path, storage: Path, name: str, step: int, **more: Any) -> None:
    """Starts a run and stops it as Ctrl-C does, so that this step is its last."""
    stop_request = StopRequest()

    def on_event(event: Event) -> None:
        if isinstance(event, MetricsRow) and event.row["split"] == "train" and event.row["step"] == step - 1:
            stop_request.exit_code = 130

    flags = config_flags(prose, run__storage=storage, run__name=name, **more)
    config = load_config(None, {flag: str(value) for flag, value in flags.items()})
    outcome = run_training(config, name, Console(), LocalLauncher(), stop_request, on_event)
    assert outcome.exit_code == 130
    assert rows(storage / name, "train")[-1]["step"] == step


def test_validation_during_a_run_leaves_training_as_it_is_and_its_best_checkpoint_is_kept(
    prose: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    seldom = run(prose, tmp_path, "seldom", train__validate_every=0)
    assert result(uninterrupted)["weights_sha256"] == result(seldom)["weights_sha256"]
    found = validations(uninterrupted)
    assert [step for _, step, _ in found] == list(range(EVERY, 41, EVERY))
    assert [validation for validation in found if validation[1] % 20 == 0] == validations(seldom)
    best = min(row["perplexity"] for row in rows(uninterrupted, "validation"))
    assert result(uninterrupted)["best_validation_perplexity"] == best


def test_best_checkpoint_within_an_epoch_is_that_of_the_validated_step(prose: Path, tmp_path: Path) -> None:
    """The learning rate is too high after the warm-up, so that the best step is early."""
    more = {"optimizer__learning_rate": 3.0, "optimizer__warmup_steps": 300, "train__checkpoint_every": 1000}
    folder = run(prose, tmp_path, "run", **more)
    _, step, nats = min(validations(folder), key=lambda validation: validation[2])
    assert step % 20, "the best step is not the end of an epoch"
    best = folder / result(folder)["best_checkpoint"]
    content = json.loads((best / "manifest.json").read_text())["content"]
    assert (content["step"], content["validation_nats"]) == (step, nats)
    progress = json.loads((best / "progress.json").read_text())
    assert (progress["validated_step"], progress["best_validation_nats"]) == (step, nats)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 6, 20])
def test_run_stopped_at_a_step_has_the_validations_of_an_uninterrupted_one(
    prose: Path, tmp_path: Path, uninterrupted: Path, step: int
) -> None:
    """5 and 20 are validated; the stop saves after that, and the resumed run starts with the next step."""
    stop_at(prose, tmp_path, "stopped", step)
    stopped = run(prose, tmp_path, "stopped")
    assert validations(stopped) == validations(uninterrupted)
    for name in ("weights_sha256", "validation_perplexity", "best_validation_perplexity"):
        assert result(stopped)[name] == result(uninterrupted)[name]


@pytest.mark.slow
def test_run_that_loses_its_last_checkpoint_repeats_the_validations_after_the_one_before(
    prose: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    stop_at(prose, tmp_path, "crashed", 15)
    last = max((tmp_path / "crashed" / "checkpoints").iterdir())
    assert last.name.startswith("step-000015")
    stop_at(prose, tmp_path, "copy", 14)
    shutil.rmtree(tmp_path / "crashed" / "checkpoints")
    shutil.copytree(tmp_path / "copy" / "checkpoints", tmp_path / "crashed" / "checkpoints")
    assert validations(run(prose, tmp_path, "crashed")) == validations(uninterrupted)


@pytest.mark.parametrize("kind", ["char", "byte", "word"])
def test_validation_reports_bits_of_the_original_text(prose: Path, tmp_path: Path, kind: str) -> None:
    """All units are counted in the text itself: prose has one byte per character, and no word in two lines."""
    text = prose.read_text()[:3000].rpartition(" ")[0]
    (tmp_path / "text").write_text(text)
    fields = {"corpus__max_tokens": 0, "stream__num_steps": 5, "train__epochs": 1, "train__validate_every": 0}
    folder = run(tmp_path / "text", tmp_path, "run", vocabulary__kind=kind, **fields)
    num_tokens = len(text.split() if kind == "word" else text)
    num_targets = round(num_tokens / 10) - 1
    targets = " " + " ".join(text.split()[-num_targets:]) if kind == "word" else text[-num_targets:]
    row = rows(folder, "validation")[-1]
    bits = row["nats"] * num_targets / math.log(2)
    is_cut = not targets[0].isspace() and not text[-num_targets - 1].isspace()  # the first word begins before
    num_words = len(targets.split()) - (is_cut and kind != "word")
    for unit, count in (("character", len(targets)), ("byte", len(targets)), ("word", num_words)):
        assert row[f"bits_per_{unit}"] == pytest.approx(bits / count, rel=1e-12)
        assert result(folder)[f"validation_bits_per_{unit}"] == pytest.approx(bits / count, rel=1e-12)


class RecordingLink:
    """A driver that only records the rows of metrics, and the last part that was written of a checkpoint."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def post(self, event: Event) -> None:
        if isinstance(event, MetricsRow):
            self.rows.append(event.row)
        if isinstance(event, PartWritten):
            self.last_part = event.receipt

    def control_flags(self) -> ControlFlags:
        return ControlFlags()

    def preemption_pending(self) -> bool:
        return False


def train_worker(rank: int, workers: int, port: int, spec: RunSpec, results: SimpleQueue[Any]) -> None:
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    link = RecordingLink()
    train(spec, World(rank, workers, torch.device("cpu"), 1, "a"), link)
    if rank == 0:
        names = "split", "step", "nats", "nats_raw", "learning_rate"
        digests = [link.last_part.files[f"{name}.safetensors"] for name in ("model", "average", "optimizer")]
        decisions = not_none(link.last_part.progress).decisions
        results.put(([tuple(row.get(name) for name in names) for row in link.rows], digests, decisions))
    if workers > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_reproducible_validations_and_what_they_decide_have_the_same_bits_on_any_number_of_workers(
    prose: Path, tmp_path: Path
) -> None:
    optimizer = {"optimizer__name": "sgd", "optimizer__learning_rate": 20, "optimizer__schedule": "plateau"}
    average = {"optimizer__averaging": "nt-asgd", "optimizer__nonmono": 1}
    more = {**optimizer, **average, "train__reproducible": "true", "train__checkpoint_every": 1000}
    flags = config_flags(prose, train__epochs=1, train__validate_every=2, **more)
    found = []
    for workers in (1, 2, 3):
        config = load_config(
            None, {**{flag: str(value) for flag, value in flags.items()}, "scale.workers": str(workers)}
        )
        spec = build_run_spec(config, Folder(str(tmp_path / str(workers))))
        results = multiprocessing.get_context("spawn").SimpleQueue()
        spawn(train_worker, (workers, free_port(), spec, results), nprocs=workers)
        found.append(results.get())
    metrics, _, decisions = found[0]
    assert [row[1] for row in metrics if row[0] == "validation"] == list(range(2, 21, 2))
    assert found[0] == found[1] == found[2]
    assert decisions.reductions > 0
    assert decisions.average_start in range(2, 17)


def test_validate_every_without_a_validation_text_is_refused(prose: Path, tmp_path: Path) -> None:
    ended = job("train", "--corpus.source", prose, "--train.validate_every", 5, "--run.storage", tmp_path)
    assert ended.status == 2
    expected = "error: train.validate_every = 5: there is no validation text; set corpus.validation_fraction"
    assert ended.err.startswith(expected)
    assert not list(tmp_path.iterdir())


# --- a validation text of its own ---


def split_text(prose: Path, tmp_path: Path) -> dict[str, Any]:
    """Writes the two parts of which the flags of other tests make one text."""
    text = prose.read_text()
    (tmp_path / "train.txt").write_text(text[:8100])
    (tmp_path / "validation.txt").write_text(text[8100:9000])
    return {
        "corpus__source": tmp_path / "train.txt", "corpus__validation_source": tmp_path / "validation.txt",
        "corpus__validation_fraction": 0, "corpus__max_tokens": 0,
    }  # fmt: skip


def prepare(source: Path, store: Path, *more: object) -> Path:
    ended = job("prepare", "--corpus.source", source, "--corpus.store", store, *more)
    assert ended.status == 0, ended.err
    return store


@pytest.mark.slow
def test_validation_source_gives_the_run_of_a_fraction_with_the_same_tokens(prose: Path, tmp_path: Path) -> None:
    """A text, a token store of a text with a validation text, and two stores."""
    expected = run(prose, tmp_path, "fraction", vocabulary__scope="training", train__epochs=1)
    texts = split_text(prose, tmp_path) | {"train__epochs": 1}
    sources = run(prose, tmp_path, "sources", **texts)
    store = prepare(tmp_path / "train.txt", tmp_path / "store")
    vocabulary = ["--vocabulary.file", store / "vocabulary.json"]
    validation_store = prepare(tmp_path / "validation.txt", tmp_path / "validation", *vocabulary)
    stored = run(prose, tmp_path, "stored", **texts | {"corpus__source": store})
    stores = {"corpus__source": store, "corpus__validation_source": validation_store}
    both_stored = run(prose, tmp_path, "both", **texts | stores)
    for folder in (sources, stored, both_stored):
        assert validations(folder) == validations(expected)
        assert result(folder)["weights_sha256"] == result(expected)["weights_sha256"]
        assert result(folder)["corpus"]["validation"]["tokens"] == 900
    digests = {result(folder)["corpus"]["validation"]["sha256"] for folder in (sources, stored, both_stored)}
    assert len(digests) == 1


def test_validation_source_with_other_characters_has_unknown_tokens(prose: Path, tmp_path: Path) -> None:
    texts = split_text(prose, tmp_path)
    (tmp_path / "validation.txt").write_text("the Time " * 100)
    ended = job("train", *words(config_flags(prose, run__storage=tmp_path, run__name="run", **texts)))
    assert f"validation: {tmp_path / 'validation.txt'}, 900 tokens, 11.1% <unk>" in ended.out
    assert rows(tmp_path / "run", "validation")[0]["unknown_share"] == pytest.approx(1 / 9)


@pytest.mark.parametrize(
    ("content", "more", "problem"),
    [
        ("the", {}, "has 3 tokens, too few for stream.batch_size = 8 lanes; give more text"),
        ("", {}, ": contains no text"),
        (None, {}, ": no such file"),
        ("the", {"corpus__validation_fraction": 0.1}, ": corpus.validation_fraction is set, too; set it to 0"),
    ],
)
def test_validation_source_that_cannot_be_used_is_one_line(
    prose: Path, tmp_path: Path, content: str | None, more: dict[str, Any], problem: str
) -> None:
    texts = split_text(prose, tmp_path)
    file = tmp_path / "validation.txt"
    file.unlink() if content is None else file.write_text(content)
    ended = job("train", *words(config_flags(prose, run__storage=tmp_path / "runs", **texts | more)))
    assert ended.status == 2
    assert f"corpus.validation_source = {file}" in ended.err
    assert problem in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["absent.txt", "absent/*.txt", "file:absent.txt"])
def test_validation_source_that_is_missing_is_reported_before_the_vocabulary_is_built(
    prose: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.run.setup.build_dataset", lambda *_: pytest.fail("too late"))
    source = f"file://{tmp_path}/{name[5:]}" if name.startswith("file:") else str(tmp_path / name)
    flags = split_text(prose, tmp_path) | {"corpus__validation_source": source}
    config = load_config(None, {flag: str(value) for flag, value in config_flags(prose, **flags).items()})
    with pytest.raises(UserError, match=r"corpus\.validation_source = .*: no (such )?file"):
        build_run_spec(config, Folder(str(tmp_path / "run")))


@pytest.mark.slow
def test_run_whose_validation_text_was_changed_is_not_resumed(prose: Path, tmp_path: Path) -> None:
    texts = split_text(prose, tmp_path)
    run(prose, tmp_path, "run", train__epochs=1, **texts)
    file = tmp_path / "validation.txt"
    file.write_text(file.read_text()[::-1])
    ended = job("train", *words(config_flags(prose, run__storage=tmp_path, run__name="run", **texts)))
    assert ended.status == 2
    assert f"corpus.validation_source = {file}: is not the text that this run was started with (900 tokens" in ended.err
