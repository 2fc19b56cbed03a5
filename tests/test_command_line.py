"""The command line: its output, its files, and one line per error."""

import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Ended, job, not_none, result, rows, start_job
from safetensors.torch import save_file

from job.inference.generate import load_model
from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.training.loop import evaluate_lanes

pytestmark = pytest.mark.slow

SMALL = ["--scale.workers", 0, "--model.hidden_size", 16, "--train.epochs", 2, "--generate.prefix", "the"]


def assert_user_error(ended: Ended, *parts: str) -> None:
    """Checks for exit status 2 and one line on standard error that contains all parts."""
    assert ended.status == 2, (ended.out, ended.err)
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    for part in parts:
        assert part in ended.err


def train_without_trace(tmp_path: Path, *arguments: object) -> Ended:
    """Runs a training that must fail before it creates its storage."""
    storage = tmp_path / "storage"
    ended = job("train", "--run.storage", storage, *SMALL, *arguments)
    assert not storage.exists()
    return ended


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stream.batch_size", -3], ["stream.batch_size = -3: must be at least 1"]),
        (["--stream.num_steps", 0], ["stream.num_steps = 0: must be at least 1"]),
        (["--scale.workers", 33], ["scale.workers = 33", "stream.batch_size = 32"]),
        (["--stream.batch_size", 4000], ["stream.batch_size = 4000", "tokens"]),
        (["--stream.num_steps", 90000], ["stream.num_steps = 90000", "tokens"]),
        (["--generate.prefix", "012§"], ["generate.prefix", "none of its tokens is in the vocabulary"]),
        (["--model.cell", "no_module:Cell"], ["model.cell = no_module:Cell: cannot be imported"]),
        (["--model.cell", ".cells:Mine"], ["model.cell = .cells:Mine: cannot be imported"]),
        (["--model.cell", "cells:DecayCell", "--model.num_layers", 2], ["DecayCell(input_size, hidden_size"]),
        (["--model.hidden_size", 10**7], ["does not fit into memory"]),
        (["--optimizer.learning_rate", 10**400], ["must be a finite number"]),
        (["--run.storage", "s3://no-such-bucket-of-lanes/x?endpoint_override=127.0.0.1%3A1"], ["cannot be"]),
        (["--model.init", "no.safetensors"], ["model.init = no.safetensors: cannot be read"]),
        (["--run.resume", "must"], ["there is no run"]),
        (["--run.storage", "gopher://x/y"], ["not a URI that pyarrow supports"]),
        (["--scale.accelerator", "gpu"], ["GPU"]),
        (["--scale.accelerator", "gpu", "--scale.workers", 2], ["GPU"]),
        (["--model.hidden_size", "1" + "0" * 30], ["model: does not fit"]),
        (["--model.hidden_size", "1" * 5000], ["model.hidden_size", "must be an integer"]),
        (["--scale.accelerator_type", "A100"], ["accelerator_type = A100", "no GPU"]),
        (["--scale.accelerator_type", "A100", "--scale.workers", 2], ["accelerator_type = A100", "0 GPUs"]),
        (["--corpus.validation_fraction", 0.0004], ["validation_fraction", "too few"]),
    ],
)
def test_train_invalid_input_is_one_line_and_leaves_no_file(
    prose: Path, tmp_path: Path, arguments: list[float | int | str], parts: list[str]
) -> None:
    if torch.cuda.is_available() and "GPU" in parts:
        pytest.skip("this machine has a GPU")
    assert_user_error(train_without_trace(tmp_path, "--corpus.source", prose, *arguments), *parts)


def test_train_error_in_custom_cell_names_last_checkpoint(prose: Path, tmp_path: Path) -> None:
    arguments = ["--corpus.source", prose, "--run.storage", tmp_path, "--model.cell", "cells:RaisingCell"]
    ended = job("train", *SMALL, *arguments, "--run.name", "run", "--train.checkpoint_every", 3)
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "ValueError: no more" in ended.err
    assert "saved at step 6" in ended.err


def test_train_generate_length_0_writes_the_prefix(prose: Path, tmp_path: Path) -> None:
    arguments = ["--corpus.source", prose, "--run.storage", tmp_path, "--run.name", "run", "--generate.length", 0]
    ended = job("train", *SMALL, *arguments, "--model.cell", "cells:ScalarParameterCell")
    assert ended.status == 0, ended.err
    assert result(tmp_path / "run")["generated"] == "the"


def test_train_into_folder_of_a_search_is_an_error(prose: Path, tmp_path: Path) -> None:
    (tmp_path / "storage" / "it").mkdir(parents=True)
    (tmp_path / "storage" / "it" / "search.toml").write_text("")
    arguments = ["--corpus.source", prose, "--run.storage", tmp_path / "storage", "--run.name", "it"]
    assert_user_error(job("train", *SMALL, *arguments), "is a search and not a run")


def test_train_missing_corpus_leaves_no_file(tmp_path: Path) -> None:
    assert_user_error(
        train_without_trace(tmp_path, "--corpus.source", "no/such.txt"), "corpus.source = no/such.txt: no such file"
    )


def test_train_unwritable_storage_is_an_error(prose: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--corpus.source", prose, "--run.storage", tmp_path / "file" / "runs"]
    assert_user_error(job("train", *SMALL, *arguments), "run.storage", "cannot be written to")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_train_init_from_other_model_is_an_error(prose: Path, tmp_path: Path) -> None:
    save_file({"linear.weight": torch.zeros(3, 16)}, str(tmp_path / "w.safetensors"))
    (tmp_path / "vocabulary.json").write_text('{"kind": "char", "tokens": ["<unk>", "a", "b"]}')
    arguments = ["--corpus.source", prose, "--model.init", tmp_path / "w.safetensors"]
    assert_user_error(
        train_without_trace(tmp_path, *arguments), "weights do not match the model: linear.bias is missing"
    )


@pytest.fixture(scope="module")
def storage(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder with one finished run named ``run``."""
    path = tmp_path_factory.mktemp("storage")
    ended = job("train", "--corpus.source", prose, *SMALL, "--run.storage", path, "--run.name", "run")
    assert ended.status == 0, ended.err
    return path


def test_train_finished_run_prints_result_and_changes_no_file(storage: Path, prose: Path) -> None:
    arguments = ["train", "--corpus.source", prose, *SMALL, "--run.storage", storage, "--run.name", "run"]
    metrics_before = (storage / "run" / "metrics.jsonl").read_bytes()
    ended = job(*arguments)
    assert ended.status == 0
    assert "is finished" in ended.out
    assert result(storage / "run")["generated"] in ended.out
    assert (storage / "run" / "metrics.jsonl").read_bytes() == metrics_before
    assert_user_error(job(*arguments, "--run.resume", "never"), "exists")
    assert_user_error(job(*arguments, "--model.hidden_size", 17), "model.hidden_size (16 → 17)")
    assert (storage / "run" / "metrics.jsonl").read_bytes() == metrics_before


def test_train_closed_stdout_still_finishes(prose: Path, tmp_path: Path) -> None:
    arguments = ["train", "--corpus.source", prose, *SMALL, "--run.storage", tmp_path, "--run.name", "run"]
    command = [sys.executable, "-m", "job", *map(str, arguments)]
    process = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert result(tmp_path / "run")["steps"]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 0.5])
def test_generate_tiny_temperature_equals_greedy(storage: Path, temperature: float) -> None:
    arguments = ["generate", storage / "run", "--generate.prefix", "the", "--generate.length", 20]
    ended = job(*arguments, "--generate.temperature", temperature)
    assert ended.status == 0, ended.err
    assert (ended.out == job(*arguments).out) == (temperature < 0.1)


def test_train_default_name_counts_up(storage: Path, prose: Path, tmp_path: Path) -> None:
    config = tmp_path / "my run.toml"
    config.write_text("")
    arguments = ["train", config, "--corpus.source", prose, *SMALL, "--run.storage", tmp_path / "runs"]
    assert "run my-run-1:" in job(*arguments, "--train.max_steps", 5).out
    assert "run my-run-1:" in job(*arguments).out  # resumed: it had not finished all epochs
    assert "run my-run-2:" in job(*arguments).out
    assert "run my-run-3:" in job(*arguments, "--run.seed", 1).out
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"my-run-1", "my-run-2", "my-run-3"}


def test_generate_continues_a_prefix(storage: Path) -> None:
    run = storage / "run"
    longer = job("generate", run, "--generate.prefix", "a man", "--generate.length", 80).out
    assert longer.startswith("a man")
    assert len(longer) == len("a man") + 80 + 1
    assert job("generate", run / result(run)["checkpoint"], "--generate.prefix", "a man").out[:40] == longer[:40]
    sampled = ["generate", run, "--generate.temperature", 1.0]
    assert job(*sampled).out == job(*sampled).out != job(*sampled, "--run.seed", 5).out
    assert_user_error(job("generate", run, "--generate.prefix", "12"), "none of its tokens is in the vocabulary")


def test_evaluate_equals_loop_over_single_tokens(storage: Path, prose: Path, tmp_path: Path) -> None:
    """The expected loss is that of a loop that feeds one token at a time."""
    text = prose.read_text()[:500]
    (tmp_path / "part.txt").write_text(text)
    output = job("evaluate", storage / "run", "--corpus.source", tmp_path / "part.txt").out

    loaded = open_checkpoint(Folder(str(storage / "run")))
    model = load_model(loaded)
    ids = torch.tensor(loaded.vocabulary.encode([text])).long()
    state, nats = None, 0.0
    with torch.no_grad():
        for token, target in itertools.pairwise(ids):
            logits, state = model(token.view(1, 1), state)
            nats -= float(torch.log_softmax(logits.double(), -1)[0, 0, target])
    match = not_none(re.search(r"([0-9.]+) bits per character, ([0-9.]+) nats per token over 499 targets", output))
    assert float(match[2]) == pytest.approx(nats / 499, abs=2e-6)
    assert float(match[1]) == pytest.approx(nats / 499 / math.log(2), abs=1e-4)


def test_train_validation_equals_evaluation_of_its_lanes(prose: Path, tmp_path: Path) -> None:
    """The expected loss is that of each lane evaluated by itself."""
    arguments = ["--corpus.source", prose, *SMALL, "--run.storage", tmp_path, "--run.name", "run"]
    arguments += ["--corpus.validation_fraction", 0.05, "--train.precision", "fp64"]
    assert job("train", *arguments).status == 0

    loaded = open_checkpoint(Folder(str(tmp_path / "run")))
    model = load_model(loaded)
    tokens = loaded.vocabulary.encode([prose.read_text()])
    validation_tokens = tokens[len(tokens) - round(len(tokens) * 0.05) :]
    nats = evaluate_lanes(model, validation_tokens, [range(lane, lane + 1) for lane in range(32)], 32, 7)
    row = rows(tmp_path / "run", "validation")[-1]
    assert row["nats"] == pytest.approx(sum(nats) / (len(validation_tokens) - 1), rel=1e-12)
    summary = result(tmp_path / "run")
    assert summary["validation_perplexity"] == row["perplexity"]
    assert (tmp_path / "run" / summary["best_checkpoint"] / "manifest.json").exists()


def test_train_nan_loss_fails_and_keeps_finite_checkpoint(prose: Path, tmp_path: Path) -> None:
    arguments = ["--corpus.source", prose, *SMALL, "--run.storage", tmp_path, "--run.name", "run"]
    ended = job("train", *arguments, "--model.cell", "cells:DivergingCell", "--train.checkpoint_every", 3)
    assert ended.status == 1
    assert ended.err.startswith("error: the loss is nan at step 8 (epoch 1); lower optimizer.learning_rate")
    assert "saved at step 6" in ended.err
    assert ended.err.count("\n") == 1
    generate = job("generate", tmp_path / "run", "--generate.prefix", "the", "--model.cell", "cells:DivergingCell")
    assert generate.status == 0


def test_train_interrupted_saves_and_same_command_resumes(prose: Path, tmp_path: Path) -> None:
    arguments = ["train", "--corpus.source", prose, *SMALL, "--run.storage", tmp_path, "--run.name", "run"]
    process = start_job(*arguments, "--train.epochs", 10**8, "--train.log_every", 1, "--stream.num_steps", 400)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)  # a closed terminal does not end a run
    process.send_signal(signal.SIGUSR1)
    while not list(tmp_path.glob("run/checkpoints/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert "stopped at step" in out
    assert "Resume:" in out
    steps = [row["step"] for row in rows(tmp_path / "run", "train")]
    assert steps == list(range(1, len(steps) + 1))
    longer_arguments = ["--train.epochs", 10**8, "--train.max_steps", len(steps) + 3, "--stream.num_steps", 400]
    resumed = job(*arguments, *longer_arguments, "--train.log_every", 1)
    assert f"resuming from step {len(steps)}" in resumed.out
    assert result(tmp_path / "run")["steps"] == len(steps) + 3


def test_metrics_rows_have_documented_fields(storage: Path) -> None:
    row = rows(storage / "run", "epoch")[0]
    assert set(row) == {
        "split", "epoch", "step", "tokens", "nats", "perplexity", "unknown_share", "learning_rate",
        "tokens_per_second", "workers", "time",
    }  # fmt: skip
    assert json.loads((storage / "run" / "result.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda text: text + " the end", "8,000 tokens then, 8,008 now"),
        (lambda text: text[::-1], "8,000 tokens then, as many, but others, now"),
        (lambda text: text.replace("e", "ë"), "8,000 tokens then, as many, but others, now"),  # the token ids are equal
    ],
)
def test_train_resume_with_changed_text_is_an_error(
    prose: Path, tmp_path: Path, change: Callable[..., Any], difference: str
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(prose.read_text()[:8000])
    arguments = ["train", *SMALL, "--corpus.source", corpus, "--run.storage", tmp_path / "runs", "--run.name", "run"]
    assert job(*arguments, "--train.max_steps", 2).status == 0
    corpus.write_text(change(corpus.read_text()))
    assert_user_error(job(*arguments, "--generate.prefix", "a"), f"corpus.source = {corpus}: is not", difference)


@pytest.mark.parametrize(("old", "new"), [("a.txt", "b.txt"), ("embedded", "a.txt"), ("a.txt", "embedded")])
def test_train_resume_with_another_source_names_only_the_source(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose.read_text()[:8000])
    arguments = ["train", *SMALL, "--run.name", "run", "--train.max_steps"]
    assert job(*arguments, 2, "--corpus.source", old).status == 0
    differences = f'exists with another configuration: corpus.source ("{old}" → "{new}"); choose'
    assert_user_error(job(*arguments, 3, "--corpus.source", new), differences)
