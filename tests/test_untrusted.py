"""Files that others may have written: a run, a checkpoint, a search's trial.

None of them may execute code, and a malformed one is an error of one line.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, job
from test_command_line import SMALL, assert_user_error
from test_console import Terminal

from job.__main__ import main
from job.config.config_file import load_search_config
from job.config.model import ModelConfig
from job.config.training import OptimizerConfig
from job.documents import parse_record
from job.errors import UserError
from job.inference.generate import generate_text
from job.nn.language_model import build_model
from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.training.optimizer import build_optimizer, load_optimizer_tensors
from job.tuning.trials import load_trials

pytestmark = pytest.mark.slow

EVIL = "evil:Cell"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the module ``evil`` importable; returns whether it was imported."""
    (tmp_path / "evil.py").write_text("from torch.nn import RNN as Cell")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return lambda: "evil" in sys.modules


def rewrite(checkpoint: Path, name: str, data: bytes) -> None:
    """Replaces a file of a checkpoint, and writes the manifest that fits."""
    (checkpoint / name).write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    content = manifest["content"]
    content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def finished(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    storage = tmp_path_factory.mktemp("storage")
    ended = job("train", *SMALL, "--corpus.source", prose, "--run.storage", storage, "--run.name", "run")
    assert ended.status == 0, ended.err
    return storage / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def evil_run(run: Path) -> Path:
    """A run whose checkpoints name a cell to import."""
    for checkpoint in (run / "checkpoints").iterdir():
        text = (checkpoint / "config.toml").read_text()
        rewrite(checkpoint, "config.toml", text.replace('cell = "rnn"', f'cell = "{EVIL}"').encode())
    return run


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_checkpoint_with_custom_cell_is_refused_unless_the_user_names_the_cell(
    evil_run: Path, evil: Callable[..., Any], verb: str
) -> None:
    checkpoint = max((evil_run / "checkpoints").iterdir())
    for target in (evil_run, checkpoint):
        assert_user_error(job(verb, target), f"model.cell = {EVIL}", f"add --model.cell {EVIL}")
        assert_user_error(job(verb, target, "--model.cell", "rnn"), f"this checkpoint's is {EVIL}")
        assert_user_error(job(verb, target, "--model.cell", "other:Cell"), f"this checkpoint's is {EVIL}")
        assert not evil()
    ended = job(verb, evil_run, "--model.cell", EVIL)
    assert ended.status == 0, ended.err
    assert evil()


def test_train_on_files_that_name_a_cell_does_not_import_it(
    evil_run: Path, evil: Callable[..., Any], prose: Path
) -> None:
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", evil_run.parent]
    initialized = job("train", *arguments, "--run.name", "second", "--model.init", evil_run)
    resumed = job("train", *arguments, "--run.name", "run", "--train.epochs", 3)
    assert (initialized.status, resumed.status) == (0, 0), initialized.err + resumed.err
    config = evil_run / "config.toml"
    config.write_text(config.read_text().replace('cell = "rnn"', f'cell = "{EVIL}"'))
    assert_user_error(job("train", *arguments, "--run.name", "run"), f'model.cell ("{EVIL}" → "rnn")')
    assert not evil()


def test_generate_text_with_configuration_of_the_user_does_not_import_the_stored_cell(
    evil_run: Path, evil: Callable[..., Any]
) -> None:
    """As a driver does when its run has ended."""
    loaded = open_checkpoint(Folder(str(evil_run)))
    config, _ = load_search_config(None, {})
    with pytest.raises(UserError, match="code named by a file is not imported"):
        generate_text(loaded, config)
    assert not evil()


def test_load_trials_with_a_cell_outside_the_search_raises_user_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "search" / "trials").mkdir(parents=True)
    config = run / "config.toml"
    config.write_text(config.read_text().replace('cell = "rnn"', f'cell = "{EVIL}"'))
    run.rename(tmp_path / "search" / "trials" / "00000")
    path = tmp_path / "search.toml"
    for domain in ('"optimizer.learning_rate" = { grid = [1, 2] }', '"model.cell" = { grid = ["rnn", "gru"] }'):
        path.write_text(f"[search.space]\n{domain}")
        base, search = load_search_config(str(path), {})
        with pytest.raises(UserError, match="is not a cell of this search"):
            load_trials(Folder(str(tmp_path / "search")), base, search)


def test_run_with_custom_cell_prints_the_command_that_generates(prose: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", tmp_path, "--run.name", "run"]
    ended = job("train", *arguments, "--model.cell", "torch.nn:GRU")
    assert f"generate {tmp_path}/run --model.cell torch.nn:GRU --generate.prefix" in ended.out
    assert job("generate", tmp_path / "run", "--model.cell", "torch.nn:GRU").status == 0


DEEP_JSON = b"[" * 100_000
MALFORMED = {
    "deep": DEEP_JSON,
    "deep but parsed": b'{"a":' * 300 + b"1" + b"}" * 300,
    "not an object": b"[1]",
    "empty": b"",
    "no field": b"{}",
    "null": b"null",
    "large integer": b'{"epochs": %d, "steps": 1}' % 10**30,
    "binary": b"\x00\xff",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("parse", [lambda data: parse_record(data, {"epochs": int})])
def test_parse_record_of_malformed_json_raises_value_error(data: bytes, parse: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse(data)


def changed(record: dict[str, Any], **fields: Any) -> bytes:
    """A JSON object with other values; without those that are None."""
    return json.dumps({name: value for name, value in {**record, **fields}.items() if value is not None}).encode()


def assert_no_crash(ended: Ended) -> None:
    assert ended.status in (0, 2), ended.err
    assert ended.err.count("\n") == (ended.status == 2)


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "config.toml"])
def test_train_with_malformed_file_in_the_run_does_not_crash(run: Path, prose: Path, name: str) -> None:
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", run.parent, "--run.name", "run"]
    record = json.loads((run / name).read_text().splitlines()[0]) if name == "metrics.jsonl" else {}
    record = json.loads((run / name).read_text()) if name == "result.json" else record
    documents = [*MALFORMED.values(), *(changed(record, **{field: None}) for field in record)]
    documents += [changed(record, seconds=math.inf), changed(record, generated=["x"], step="1", split=7)]
    documents += [changed(record, validation_perplexity=1.5), b"[a]\n" + b"a" + b".a" * 5000 + b" = 1"]
    for data in documents:
        (run / name).write_bytes(data)
        assert_no_crash(job("train", *arguments))
        if name != "result.json":  # so that the run trains
            assert_no_crash(job("train", *arguments, "--train.epochs", 3))
            (run / "result.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["vocabulary.json", "progress.json", "config.toml", "manifest.json"])
def test_generate_from_checkpoint_with_malformed_file_is_an_error(run: Path, name: str) -> None:
    checkpoint = max((run / "checkpoints").iterdir())
    record = {} if name == "config.toml" else json.loads((checkpoint / name).read_bytes())
    documents = [*MALFORMED.values(), *(changed(record, **{field: [None]}) for field in record if field != "corpus")]
    if name == "progress.json":
        losses = {"nats": "x", "tokens": 1}, {"nats": 1.0, "tokens": [1]}, {"nats": 1.0}
        documents += [json.dumps({**record, "epoch_mean": loss}).encode() for loss in losses]
    if name == "vocabulary.json":
        documents.append(changed(record, tokens=["<unk>", "\ud800"]))
    for data in documents:
        if name == "manifest.json":
            (checkpoint / name).write_bytes(data)
        else:
            rewrite(checkpoint, name, data)
        assert_user_error(job("generate", checkpoint))


@pytest.mark.parametrize("window", [10**12, -1])
def test_train_from_checkpoint_with_position_outside_the_text_is_an_error(run: Path, prose: Path, window: int) -> None:
    """The run never ended."""
    for checkpoint in (run / "checkpoints").iterdir():
        record = json.loads((checkpoint / "progress.json").read_bytes())
        rewrite(checkpoint, "progress.json", json.dumps({**record, "window": window}).encode())
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", run.parent, "--run.name", "run"]
    ended = job("train", *arguments, "--train.epochs", 4)
    assert ended.status == 1
    assert "its window is not one of the text" in ended.err


@pytest.mark.parametrize("name", ["exp_avg/linear.bias", "exp_avg/absent", "absent"])
def test_load_optimizer_tensors_that_do_not_fit_the_model_raises_user_error(name: str) -> None:
    """A foreign name ended a worker with a KeyError, another shape with that of torch."""
    model = build_model(ModelConfig(hidden_size=4), 5, 0)
    optimizer = build_optimizer(OptimizerConfig(name="adamw"), model)
    with pytest.raises(UserError, match=f"optimizer.safetensors: {name} does not fit the model"):
        load_optimizer_tensors(optimizer, model, {name: torch.zeros(3)})


DEEP_TOML = "{ a = " * 2000 + "1" + " }" * 2000


@pytest.mark.parametrize(
    "text",
    [
        "[stream]\noffset = " + "[" * 100_000,
        '[search.space]\n"model.dropout" = ' + DEEP_TOML,
        "[search.space]\n" + "a." * 5000 + "a = 1",
        "[search.space]\nx = { choice = " + "[" * 200 + "]" * 200 + " }",
    ],
    ids=["list", "inline tables", "dotted key", "choice"],
)
def test_configuration_that_is_nested_deeply_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    assert_user_error(job("tune", tmp_path / "a.toml"), "a.toml: not TOML: nested too deeply")
    assert_user_error(job("train", tmp_path / "a.toml"), "a.toml: not TOML: nested too deeply")


def test_flag_that_is_nested_deeply_is_an_error() -> None:
    assert_user_error(job("train", "--stream.offset", "[" * 100_000), "stream.offset")


@pytest.mark.parametrize(
    "line",
    ['[run]\nstorage = "a\\u0000b"', '[corpus]\nsource = "/\\u0000"', '[model]\ninit = "file:///a\\u0000"',
     '[search.space]\n"corpus.source" = { choice = ["a", "b\\u0000"] }'],
)  # fmt: skip
def test_path_with_nul_is_an_error(run: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "a.toml").write_text(line)
    assert_user_error(job("tune", tmp_path / "a.toml"), "a.toml", "contains a NUL character")
    if not line.startswith("[search"):
        checkpoint = max((run / "checkpoints").iterdir())
        rewrite(checkpoint, "config.toml", line.encode())
        assert_user_error(job("evaluate", checkpoint), "contains a NUL character")
    assert_no_crash(job("evaluate", checkpoint if "run" in line else run, "--corpus.source", "file:///a%00b"))


def test_generate_with_control_characters_in_the_vocabulary_escapes_them_on_a_terminal_only(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = max((run / "checkpoints").iterdir())
    vocabulary = json.loads((checkpoint / "vocabulary.json").read_bytes())
    vocabulary["tokens"] = ["<unk>", *(chr(0x1B) + chr(0x100 + index) for index in range(1, len(vocabulary["tokens"])))]
    vocabulary["kind"] = "word"
    rewrite(checkpoint, "vocabulary.json", json.dumps(vocabulary).encode())
    arguments = ["generate", checkpoint, "--generate.prefix", vocabulary["tokens"][1]]
    piped = job(*arguments)
    assert (piped.status, piped.err) == (0, "")
    assert piped.out.count("\x1b") > 10
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert main([str(argument) for argument in arguments]) == 0
    terminal.flush()
    shown = terminal.sent.getvalue().decode()
    assert "\x1b" not in shown
    assert shown.count("\\x1b") == piped.out.count("\x1b")
