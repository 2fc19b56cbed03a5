"""The command line: what it prints, and how it says no."""

import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, job, result, rows, start_job
from safetensors.torch import save_file

from job.inference.load import load_model
from job.run.run_dir import open_checkpoint
from job.training.loop import evaluate_lanes

SMALL = ["--scale.workers", 0, "--model.hidden_size", 16, "--train.epochs", 2, "--generate.prefix", "the"]


def told(ended, *parts):
    """One plain line on standard error, and status 2."""
    assert ended.status == 2, (ended.out, ended.err)
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    for part in parts:
        assert part in ended.err


def refuse(tmp_path, *words):
    """Runs a training that must be refused with nothing left behind."""
    storage = tmp_path / "storage"
    ended = job("train", "--run.storage", storage, *SMALL, *words)
    assert not storage.exists()
    return ended


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model.hiden_size", 3], ["did you mean model.hidden_size?"]),
        (["--stream.batch_size", -3], ["stream.batch_size = -3: must be at least 1"]),
        (["--stream.num_steps", 0], ["stream.num_steps = 0: must be at least 1"]),
        (["--scale.workers", 33], ["scale.workers = 33", "stream.batch_size = 32"]),
        (["--stream.batch_size", 4000], ["stream.batch_size = 4000", "tokens"]),
        (["--stream.num_steps", 90000], ["stream.num_steps = 90000", "tokens"]),
        (["--generate.prefix", "012§"], ["generate.prefix", "knows nothing of it"]),
        (["--model.cell", "no_module:Cell"], ["model.cell = no_module:Cell: cannot be imported"]),
        (["--model.cell", ".cells:Mine"], ["model.cell = .cells:Mine: cannot be imported"]),
        (["--model.cell", "test_model:ScaledCell", "--model.num_layers", 2], ["Class(input_size, hidden_size"]),
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
        (["--train.epochs"], ["--train.epochs: a value is missing"]),
        (["other.toml"], ["other.toml: no such configuration file"]),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(prose, tmp_path, words, parts):
    if torch.cuda.is_available() and "GPU" in parts:
        pytest.skip("this machine has a GPU")
    told(refuse(tmp_path, "--corpus.source", prose, *words), *parts)


def test_an_error_in_a_users_cell_says_what_is_kept(prose, tmp_path):
    words = ["--corpus.source", prose, "--run.storage", tmp_path, "--model.cell", "test_cells:Breaks"]
    ended = job("train", *SMALL, *words, "--run.name", "run", "--train.checkpoint_every", 3)
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "ValueError: no more" in ended.err
    assert "step 6 is kept" in ended.err


def test_a_finished_model_may_say_nothing(prose, tmp_path):
    words = ["--corpus.source", prose, "--run.storage", tmp_path, "--run.name", "run", "--generate.length", 0]
    ended = job("train", *SMALL, *words, "--model.cell", "test_cells:Odd")
    assert ended.status == 0, ended.err
    assert result(tmp_path / "run")["generated"] == "the"


def test_no_run_is_put_into_a_search(prose, tmp_path):
    (tmp_path / "storage" / "it").mkdir(parents=True)
    (tmp_path / "storage" / "it" / "search.toml").write_text("")
    words = ["--corpus.source", prose, "--run.storage", tmp_path / "storage", "--run.name", "it"]
    told(job("train", *SMALL, *words), "is a search and not a run")


def test_a_missing_corpus_leaves_nothing(tmp_path):
    told(refuse(tmp_path, "--corpus.source", "no/such.txt"), "corpus.source = no/such.txt: no such file")


def test_storage_that_cannot_be_written_is_told(prose, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["--corpus.source", prose, "--run.storage", tmp_path / "file" / "runs"]
    told(job("train", *SMALL, *words), "run.storage", "cannot be written to")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_weights_of_another_model_are_told(prose, tmp_path):
    save_file({"linear.weight": torch.zeros(3, 3)}, str(tmp_path / "w.safetensors"))
    words = ["--corpus.source", prose, "--model.init", tmp_path / "w.safetensors"]
    told(refuse(tmp_path, *words), "weights do not match the model: missing linear.bias")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "unknown verb; did you mean train?"),
        (["generate"], "is missing"),
        (["generate", "no/run"], "neither a run with a checkpoint nor a checkpoint"),
        (["evaluate", "no/run", "--model.cell", "gru"], "is of the checkpoint"),
        (["train", "a.toml", "b.toml"], "one configuration or folder is enough"),
    ],
)
def test_wrong_verbs_are_told(words, part):
    told(job(*words), part)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "-h"], ["evaluate", "--help"]])
def test_help_is_everywhere(words):
    ended = job(*words)
    assert ended.status == 0
    assert "python -m job" in ended.out


@pytest.fixture(scope="module")
def storage(prose, tmp_path_factory):
    """A storage with one finished run, ``run``."""
    path = tmp_path_factory.mktemp("storage")
    ended = job("train", "--corpus.source", prose, *SMALL, "--run.storage", path, "--run.name", "run")
    assert ended.status == 0, ended.err
    return path


def test_a_finished_run_says_so(storage, prose):
    words = ["train", "--corpus.source", prose, *SMALL, "--run.storage", storage, "--run.name", "run"]
    before = (storage / "run" / "metrics.jsonl").read_bytes()
    ended = job(*words)
    assert ended.status == 0
    assert "is finished" in ended.out
    assert result(storage / "run")["generated"] in ended.out
    assert (storage / "run" / "metrics.jsonl").read_bytes() == before
    told(job(*words, "--run.resume", "never"), "exists")
    told(job(*words, "--model.hidden_size", 17), "model.hidden_size (16 → 17)")
    assert (storage / "run" / "metrics.jsonl").read_bytes() == before


def test_a_closed_standard_output_does_no_harm(prose, tmp_path):
    words = ["train", "--corpus.source", prose, *SMALL, "--run.storage", tmp_path, "--run.name", "run"]
    command = [sys.executable, "-m", "job", *map(str, words)]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert result(tmp_path / "run")["steps"]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 0.5])
def test_no_temperature_is_too_low(storage, temperature):
    words = ["generate", storage / "run", "--generate.prefix", "the", "--generate.length", 20]
    ended = job(*words, "--generate.temperature", temperature)
    assert ended.status == 0, ended.err
    assert (ended.out == job(*words).out) == (temperature < 0.1)


def test_names_count_up(storage, prose, tmp_path):
    config = tmp_path / "my run.toml"
    config.write_text("")
    words = ["train", config, "--corpus.source", prose, *SMALL, "--run.storage", tmp_path / "runs"]
    assert "run my-run-1:" in job(*words, "--train.max_steps", 5).out
    assert "run my-run-1:" in job(*words).out  # it had not finished the epochs that are now asked for
    assert "run my-run-2:" in job(*words).out
    assert "run my-run-3:" in job(*words, "--run.seed", 1).out
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"my-run-1", "my-run-2", "my-run-3"}


def test_generate_continues_any_prefix(storage):
    run = storage / "run"
    longer = job("generate", run, "--generate.prefix", "a man", "--generate.length", 80).out
    assert longer.startswith("a man")
    assert len(longer) == len("a man") + 80 + 1
    assert job("generate", run / result(run)["checkpoint"], "--generate.prefix", "a man").out[:40] == longer[:40]
    drawn = ["generate", run, "--generate.temperature", 1.0]
    assert job(*drawn).out == job(*drawn).out != job(*drawn, "--run.seed", 5).out
    told(job("generate", run, "--generate.prefix", "12"), "knows nothing of it")


def test_evaluate_counts_each_target_once(storage, prose, tmp_path):
    """As a plain loop over the text, one token at a time, finds it."""
    text = prose.read_text()[:500]
    (tmp_path / "part.txt").write_text(text)
    said = job("evaluate", storage / "run", "--corpus.source", tmp_path / "part.txt").out

    loaded = open_checkpoint(str(storage / "run"))
    net = load_model(loaded)
    ids = torch.tensor(loaded.vocabulary.encode([text])).long()
    state, nats = None, 0.0
    with torch.no_grad():
        for token, target in itertools.pairwise(ids):
            logits, state = net(token.view(1, 1), state)
            nats -= float(torch.log_softmax(logits.double(), -1)[0, 0, target])
    found = re.search(r"([0-9.]+) bits per character, ([0-9.]+) nats per token over 499 targets", said)
    assert float(found[2]) == pytest.approx(nats / 499, abs=2e-6)
    assert float(found[1]) == pytest.approx(nats / 499 / math.log(2), abs=1e-4)


def test_validation_counts_each_target_once(prose, tmp_path):
    """Perplexity on the kept text is that of its lanes, each read by itself."""
    words = ["--corpus.source", prose, *SMALL, "--run.storage", tmp_path, "--run.name", "run"]
    words += ["--corpus.validation_fraction", 0.05, "--train.precision", "fp64"]
    assert job("train", *words).status == 0

    loaded = open_checkpoint(str(tmp_path / "run"))
    net = load_model(loaded)
    tokens = loaded.vocabulary.encode([prose.read_text()])
    kept = tokens[len(tokens) - round(len(tokens) * 0.05) :]
    sums = evaluate_lanes(net, kept, [range(lane, lane + 1) for lane in range(32)], 32, 7)
    row = rows(tmp_path / "run", "validation")[-1]
    assert row["nats"] == pytest.approx(sum(sums) / (len(kept) - 1), rel=1e-12)
    found = result(tmp_path / "run")
    assert found["validation_perplexity"] == row["perplexity"]
    assert (tmp_path / "run" / found["best_checkpoint"] / "manifest.json").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(prose, tmp_path):
    words = ["--corpus.source", prose, *SMALL, "--run.storage", tmp_path, "--run.name", "run"]
    ended = job("train", *words, "--model.cell", "test_cells:Bomb", "--train.checkpoint_every", 3)
    assert ended.status == 1
    assert ended.err.startswith("error: the loss is nan at step 8 (epoch 1): lower optimizer.learning_rate")
    assert "step 6 is kept" in ended.err
    assert ended.err.count("\n") == 1
    assert job("generate", tmp_path / "run", "--generate.prefix", "the").status == 0


def test_ctrl_c_saves_and_the_same_command_goes_on(prose, tmp_path):
    words = ["train", "--corpus.source", prose, *SMALL, "--run.storage", tmp_path, "--run.name", "run"]
    process = start_job(*words, "--train.epochs", 2000, "--train.log_every", 1, "--stream.num_steps", 400)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)  # a terminal that goes away does not matter
    process.send_signal(signal.SIGUSR1)
    while not list(tmp_path.glob("run/checkpoints/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")
    assert "stopped at step" in out
    assert "goes on" in out
    steps = [row["step"] for row in rows(tmp_path / "run", "train")]
    assert steps == list(range(1, len(steps) + 1))
    more = ["--train.epochs", 2000, "--train.max_steps", len(steps) + 3, "--stream.num_steps", 400]
    again = job(*words, *more, "--train.log_every", 1)
    assert f"goes on from step {len(steps)}" in again.out
    assert result(tmp_path / "run")["steps"] == len(steps) + 3


def test_metrics_have_the_rows_of_the_contract(storage):
    row = rows(storage / "run", "epoch")[0]
    assert set(row) == {
        "split", "epoch", "step", "tokens", "nats", "perplexity", "learning_rate", "tokens_per_second", "workers"
    }  # fmt: skip
    assert json.loads((storage / "run" / "result.json").read_text())["epochs"] == 2
