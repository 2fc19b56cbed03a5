"""The contract of the command line, for every verb from one table."""

import json
import math
import re
from pathlib import Path

import pytest
from conftest import job

from job.console import format_json
from job.inference.evaluate import Evaluation
from job.training.progress import LossSum

SMALL = ["--scale.workers", 0, "--model.hidden_size", 16, "--train.epochs", 1, "--generate.prefix", "the"]


@pytest.fixture(scope="module")
def run(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    storage = tmp_path_factory.mktemp("storage")
    ended = job("train", *SMALL, "--corpus.source", prose, "--run.storage", storage, "--run.name", "run")
    assert ended.status == 0, ended.err
    return storage / "run"


# --- JSON output ---


def test_evaluate_json_has_the_numbers_of_the_text_output_without_rounding(run: Path) -> None:
    text, ended = job("evaluate", run), job("evaluate", run, "--json")
    assert (ended.status, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert list(found) == [
        "perplexity", "bits_per_character", "nats_per_token", "targets", "unknown_share", "source", "checkpoint",
        "step",
    ]  # fmt: skip
    assert f"perplexity {found['perplexity']:.6g}, {found['bits_per_character']:.4f} bits per character, " in text.out
    assert f"{found['nats_per_token']:.6f} nats per token over {found['targets']:,} targets" in text.out
    assert found["perplexity"] == math.exp(found["nats_per_token"])
    assert found["checkpoint"] == str(max((run / "checkpoints").iterdir()))


def test_evaluate_json_of_a_loss_that_is_not_finite_is_null(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(LossSum(math.nan, 9), 9, 0.5)
    monkeypatch.setattr("job.inference.evaluate.evaluate_text", lambda *_: evaluation)
    ended = job("evaluate", run, "--json")
    assert json.loads(ended.out)["nats_per_token"] is None
    assert not re.search("nan|inf", ended.out, re.IGNORECASE)
    assert ended.err.startswith("warning: ")  # of the share of <unk>


def test_generate_json_is_the_text_and_escapes_control_characters(run: Path) -> None:
    prefix = "the\x1b\x7f\u009f\n"
    found = job("generate", run, "--generate.prefix", prefix, "--json")
    assert found.status == 0
    assert found.out.isascii()
    assert found.out.replace("\n", "").isprintable()
    assert found.err.startswith("warning: ")
    fields = json.loads(found.out)
    assert list(fields) == ["prefix", "continuation", "checkpoint", "step"]
    assert fields["prefix"] == prefix
    assert job("generate", run, "--generate.prefix", prefix).out == f"{prefix}{fields['continuation']}\n"


@pytest.mark.parametrize("workers", [0, 10**6])
def test_doctor_json_has_the_rows_of_the_text_output(prose: Path, tmp_path: Path, workers: int) -> None:
    words = ["doctor", *SMALL, "--corpus.source", prose, "--run.storage", tmp_path, "--scale.workers", workers]
    words += ["--stream.batch_size", max(1, workers), "--stream.num_steps", 1, "--scale.cpus_per_worker", 1]
    text, ended = job(*words), job(*words, "--json")
    found = json.loads(ended.out)
    assert (ended.status, text.status) == (int(workers > 0),) * 2
    rows = re.findall(r"(?m)^(ok|FAIL)  +(\S+) ", text.out)
    assert [("ok" if row["is_ok"] else "FAIL", row["subject"]) for row in found["checks"]] == rows
    assert found["problems"] == text.out.count("FAIL")


def test_format_json_of_numbers_that_are_not_finite_is_null() -> None:
    value = {"a": [math.nan, (math.inf, 1)], "b": -math.inf, "c": 0.1 + 0.2}
    assert json.loads(format_json(value)) == {"a": [None, [None, 1]], "b": None, "c": 0.1 + 0.2}
