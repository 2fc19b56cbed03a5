"""The Python API: the same runs as by the command line, in a process that stays as it was."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from cells import LinearCell
from conftest import ROOT, is_picture, pictures, result
from conftest import job as command
from torch.overrides import _get_current_function_mode_stack

import job
from job.config.text import CorpusConfig
from job.data.content import content_name
from job.data.corpus import read_corpus

pytestmark = pytest.mark.slow

SMALL: dict[str, dict[str, Any]] = {
    "stream": {"batch_size": 8, "num_steps": 20},
    "model": {"hidden_size": 16},
    "train": {"epochs": 2, "max_steps": 40, "log_every": 10, "precision": "fp32"},
    "scale": {"workers": 0},
    "generate": {"prefix": "the", "length": 5},
}


def small(**sections: Any) -> dict[str, Any]:
    """The sections of a small run, overridden by others field by field."""
    overrides = {name: value for name, value in sections.items() if isinstance(value, Mapping)}
    merged = {name: {**SMALL.get(name, {}), **overrides.get(name, {})} for name in {**SMALL, **overrides}}
    return {**sections, **merged}


def flags(**sections: Any) -> list[str]:
    """The same as arguments of the command line."""
    fields = {f"--{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return [word for name, value in fields.items() for word in (name, str(value))]


@pytest.fixture
def text(prose: Path) -> str:
    return prose.read_text()


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


class NotebookCell(LinearCell):
    """A cell that no worker can import by its name."""


def local_cell() -> type[torch.nn.Module]:
    """A class that is not an attribute of its module, as one of a notebook that has no module."""

    class LocalCell(LinearCell):
        def forward(self, inputs: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
            outputs, state = super().forward(inputs, state)
            return torch.tanh(outputs), state

    return LocalCell


def interrupting_cell(signal_number: int) -> type[torch.nn.Module]:
    """A cell whose process gets a signal in its fifth window, once."""

    class InterruptingCell(LinearCell):
        pending = True

        def forward(self, inputs: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
            outputs, count = super().forward(inputs, state)
            if count.max() >= 100 and InterruptingCell.pending:
                InterruptingCell.pending = False
                signal.raise_signal(signal_number)
            return outputs, count

    return InterruptingCell


# --- the same as the command line ---


def test_train_equals_command_line_whatever_the_kind_of_text(
    tmp_path: Path, prose: Path, text: str, storage: str
) -> None:
    ended = command("train", *flags(**small(run={"storage": storage, "name": "command"}, corpus={"source": prose})))
    assert ended.status == 0, ended.err
    expected = result(tmp_path / "runs" / "command")

    def train(name: str, **arguments: Any) -> job.Run:
        return job.train(**small(run={"storage": storage, "name": name}, **arguments))

    run = train("path", corpus=prose)
    (checkpoint,) = (Path(storage) / "path" / "checkpoints").glob(f"step-{expected['steps']:06}-*")
    vocabulary = json.loads((checkpoint / "vocabulary.json").read_text())["tokens"]
    tokens = np.array([vocabulary.index(character) for character in text])
    file = {"file": checkpoint / "vocabulary.json"}
    runs = [
        run,
        train("text", text=text),
        train("tokens", tokens=tokens, vocabulary=file),
        train("tokens-8", tokens=torch.from_numpy(tokens.astype(np.uint8)), vocabulary=file),
    ]
    for run in runs:
        assert run.result is not None
        for name in ("weights_sha256", "perplexity", "generated", "steps", "tokens"):
            assert run.result[name] == expected[name]
        assert run.result["corpus"] == {**expected["corpus"], "source": run.config.corpus.source}
        assert run.perplexity == expected["perplexity"]
        assert [row["nats"] for row in run.metrics] == [row["nats"] for row in runs[0].metrics]
    assert runs[2].config.corpus.source == runs[3].config.corpus.source


@pytest.mark.parametrize(("kind", "cleaning"), [("char", "d2l"), ("word", "none"), ("byte", "none"), ("byte", "d2l")])
def test_read_corpus_of_text_in_memory_equals_a_file(tmp_path: Path, kind: str, cleaning: str) -> None:
    data = "\ufeffThe Traveller,\r\n came\n".encode()
    (tmp_path / "text.txt").write_bytes(data)
    from_file = read_corpus(CorpusConfig(source=str(tmp_path / "text.txt"), cleaning=cleaning), kind)
    corpus = read_corpus(CorpusConfig(source=content_name(data), cleaning=cleaning), kind, data)
    assert corpus.documents == from_file.documents
    assert corpus.source != content_name(data + b".")


def test_train_of_file_and_configuration_are_overridden_field_by_field(prose: Path, storage: str) -> None:
    arguments = small(run={"storage": storage}, corpus=str(prose), model={"hidden_size": np.int64(8)})
    run = job.train(ROOT / "configs" / "seed.toml", **arguments)
    seed = tomllib.loads((ROOT / "configs" / "seed.toml").read_text())
    assert run.folder.name == "seed-1"
    assert run.config.model.hidden_size == 8
    assert run.config.optimizer.learning_rate == seed["optimizer"]["learning_rate"]
    again = job.train(run.config, run={"name": "again"}, optimizer={"learning_rate": np.float32(0.5)})
    assert again.config.optimizer.learning_rate == 0.5
    assert again.config.model.hidden_size == 8
    third = job.train(run.config, run={"name": "third"}, model={"init": run.folder})
    assert third.config.model.init == os.fspath(run.folder) == f"{storage}/seed-1"


def test_train_cell_class_equals_module_and_name(text: str, storage: str) -> None:
    cells: tuple[dict[str, Any], ...] = (
        {"cell": LinearCell},
        {"model": {"cell": "cells:LinearCell"}},
        {"cell": NotebookCell},
    )
    runs = [job.train(text=text, **small(run={"storage": storage, "name": f"r{i}"}, **c)) for i, c in enumerate(cells)]
    assert len({run.result["weights_sha256"] for run in runs if run.result}) == 1
    assert [run.config.model.cell for run in runs] == ["cells:LinearCell"] * 2 + ["test_api:NotebookCell"]


def test_train_cell_that_cannot_be_imported_trains_and_generates(text: str, storage: str) -> None:
    cell = local_cell()
    run = job.train(text=text, cell=cell, **small(run={"storage": storage, "name": "local"}))
    linear = job.train(text=text, cell=LinearCell, **small(run={"storage": storage, "name": "linear"}))
    assert run.perplexity != linear.perplexity
    assert run.generate("time", length=9) == job.load(run.folder, cell=cell).generate("time", length=9)
    with pytest.raises(
        job.UserError, match=r"if you trust it, add --model\.cell test_api:LocalCell, or cell= in Python"
    ):
        job.load(run.folder).generate("time")
    ended = command("generate", run.folder.address, "--model.cell", "test_api:LocalCell")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    other = job.train(run.config, text=text, model={"cell": "cells:LinearCell"}, run={"name": "other"})
    assert other.perplexity == linear.perplexity
    with pytest.raises(job.UserError, match="cell = test_api:LocalCell: the cell of this run is rnn; leave it out"):
        job.load(job.train(text=text, **small(run={"storage": storage})).folder, cell=cell)


def test_evaluate_equals_the_verb(text: str, storage: str, tmp_path: Path) -> None:
    run = job.train(text=text, **small(run={"storage": storage}))
    (tmp_path / "text").write_text(text[:300])
    cases: list[dict[str, Any]] = [{}, {"context": 7}]
    for fields in cases:
        words = [word for name, value in fields.items() for word in (f"--evaluate.{name}", value)]
        ended = command("evaluate", run.folder.address, "--corpus.source", tmp_path / "text", *words, "--json")
        found = run.evaluate(tmp_path / "text", **fields)
        expected = json.loads(ended.out)
        assert found.perplexity == expected["perplexity"]
        assert (found.loss.nats_per_token, found.loss.tokens) == (expected["nats_per_token"], expected["targets"])
    assert run.evaluate({"source": tmp_path / "text", "max_tokens": 100}).loss.tokens == 99
    with pytest.raises(job.UserError, match=r"unknown field evaluate.contexts; did you mean evaluate.context\?"):
        run.evaluate(contexts=1)


def test_generate_and_evaluate_of_an_ensemble_equal_the_verbs(text: str, storage: str, tmp_path: Path) -> None:
    runs = [job.train(text=text, **small(run={"storage": storage, "name": f"seed-{n}", "seed": n})) for n in (1, 2)]
    folders = [run.folder.address for run in runs]
    words = ["--generate.prefix", "a man", "--generate.temperature", 1, "--generate.seed", 3]
    ended = command("generate", *folders, *words)
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    found = runs[0].generate("a man", ensemble=runs[1:], **fields)
    assert found + "\n" == ended.out
    assert found != runs[0].generate("a man", **fields)
    (tmp_path / "text").write_text(text[:300])
    expected = json.loads(command("evaluate", *folders, "--corpus.source", tmp_path / "text", "--json").out)
    assert runs[0].evaluate(tmp_path / "text", ensemble=runs[1:]).perplexity == expected["perplexity"]


def test_generate_equals_the_verb(text: str, storage: str) -> None:
    run = job.train(text=text, **small(run={"storage": storage}))
    for fields in ({"length": 7}, {"temperature": 0.8, "seed": 5, "length": 30}):
        names = {name: "run.seed" if name == "seed" else f"generate.{name}" for name in fields}
        words = [word for name, value in fields.items() for word in (f"--{names[name]}", value)]
        ended = command("generate", run.folder.address, "--generate.prefix", "a man", *words)
        for opened in (run, job.load(run.folder.address), job.load(Path(run.folder.address))):
            assert opened.generate("a man", **fields) + "\n" == ended.out
    assert run.generate() == (Path(run.folder.address) / "sample.txt").read_text().removesuffix("\n")
    with pytest.warns(UserWarning, match="generate.prefix: not in the vocabulary, and read as <unk>: '4'"):
        run.generate("the 4")
    with pytest.raises(job.UserError, match=r"unknown field generate.lengths; did you mean generate.length\?"):
        run.generate("the", lengths=4)
    with pytest.raises(job.UserError, match="none of its tokens is in the vocabulary"):
        run.generate("4")


def test_plot_returns_a_figure_that_a_notebook_shows(text: str, storage: str) -> None:
    figure: Any = job.train(text=text, **small(run={"storage": storage})).plot()
    with pictures():
        assert is_picture(figure._repr_png_())
    assert figure.axes[0].get_title() == "run-1"


# --- a run of a text in memory ---


def test_train_again_with_the_same_text_returns_the_result_and_with_another_is_an_error(
    text: str, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = small(run={"storage": storage, "name": "memory"})
    first = job.train(text=text, **sections)
    assert capsys.readouterr().out.startswith("run memory: text:")
    again = job.train(text=text, **sections)
    assert again.result == first.result
    assert capsys.readouterr().out.count("\n") == 1  # "… is finished; to train longer, …"
    with pytest.raises(job.UserError, match=r"exists with another configuration: corpus.source \(.text:\w+. → .text:"):
        job.train(text=text + ".", **sections)
    with pytest.raises(job.UserError, match=r"corpus.source = text:\w+: is text that job.train was given in Python"):
        job.train(**{**sections, "train": {**SMALL["train"], "max_steps": 50}})
    longer = flags(**{**sections, "train": {**SMALL["train"], "max_steps": 50}})
    ended = command("train", *longer)
    assert ended.status == 2
    assert ended.err.startswith("error: corpus.source = text:")
    assert ended.err.endswith("give job.train the same text again, or name another source\n")


# --- the process ---


def process_state() -> dict[str, Any]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    return {
        "signals": [signal.getsignal(number) for number in numbers],
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": len(_get_current_function_mode_stack()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "float32": (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
        "grad": torch.is_grad_enabled(),
        "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),  # noqa: NPY002  the state that all share
        "logging": [(log.level, log.propagate, *log.handlers) for log in map(logging.getLogger, ("", "job"))],
        "stdout": sys.stdout,
        "stderr": sys.stderr,
        "directory": os.getcwd(),
    }


@pytest.fixture
def unusual_process() -> Iterator[None]:
    """A process whose settings are not the defaults."""
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def test_train_leaves_the_process_as_it_was_and_does_not_depend_on_it(
    text: str, storage: str, request: pytest.FixtureRequest
) -> None:
    sections = small(run={"storage": storage})
    expected = job.train(text=text, cell=NotebookCell, **sections)
    request.getfixturevalue("unusual_process")
    before = process_state()
    with torch.inference_mode():
        run = job.train(text=text, cell=NotebookCell, **sections)
    assert run.folder.name == "run-2"
    assert run.result is not None
    assert expected.result is not None
    assert run.result["weights_sha256"] == expected.result["weights_sha256"]
    assert run.generate("the", temperature=1.0) == expected.generate("the", temperature=1.0)
    assert process_state() == before


def test_train_in_contexts_of_torch_leaves_them_and_does_not_depend_on_them(text: str, storage: str) -> None:
    sections = small(run={"storage": storage})
    expected = job.train(text=text, cell=NotebookCell, **sections)
    outside = process_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = process_state()
        run = job.train(text=text, cell=NotebookCell, **sections)
        assert process_state() == before
    assert process_state() == outside
    assert run.result is not None
    assert expected.result is not None
    assert run.result["weights_sha256"] == expected.result["weights_sha256"]


def test_train_computes_products_in_float32_and_restores_their_precision(text: str, storage: str) -> None:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    found: list[tuple[str, str]] = []

    class PrecisionCell(LinearCell):
        def forward(self, inputs: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
            found.append((matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
            return super().forward(inputs, state)

    for precision in ("medium", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        before = (*process_state()["float32"], matmul.fp32_precision)
        job.train(text=text, cell=PrecisionCell, **small(run={"storage": storage, "name": precision}))
        assert (*process_state()["float32"], matmul.fp32_precision) == before
    assert set(found) == {("ieee", "ieee")}


@pytest.mark.usefixtures("unusual_process")
def test_train_that_fails_leaves_the_process_as_it_was(text: str, storage: str) -> None:
    before = process_state()
    with pytest.raises(job.RunFailed, match="no more") as failure:
        job.train(text=text, **small(run={"storage": storage}, model={"cell": "cells:RaisingCell"}))
    assert "no checkpoint was written: the same call starts over" in str(failure.value)
    assert process_state() == before
    with pytest.raises(job.UserError, match="the corpus has 5"):
        job.train(text="abcde", **small(run={"storage": storage}))
    assert process_state() == before


@pytest.mark.usefixtures("unusual_process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_interrupted_saves_and_resumes_as_if_uninterrupted(
    text: str, storage: str, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before, cell = process_state(), interrupting_cell(number)
    sections = small(run={"storage": storage, "name": "stopped"})
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stop:
        job.train(text=text, cell=cell, **sections)
    assert stop.type is KeyboardInterrupt or stop.value.args == (143,)
    assert process_state() == before
    out = capsys.readouterr().out
    assert 'Resume: the same call with run={"name": "stopped"}. Sample: job.load(' in out
    if number == signal.SIGTERM:
        return
    unfinished = job.load(Path(storage) / "stopped", cell=cell)
    assert (unfinished.result, unfinished.perplexity) == (None, None)
    assert unfinished.generate("the", length=3).startswith("the")
    resumed = job.train(text=text, cell=cell, **sections)
    uninterrupted = job.train(text=text, cell=cell, **small(run={"storage": storage, "name": "whole"}))
    assert resumed.result is not None
    assert uninterrupted.result is not None
    assert resumed.result["restarts"] == 1
    assert resumed.result["weights_sha256"] == uninterrupted.result["weights_sha256"]
    assert [row["step"] for row in resumed.metrics] == [row["step"] for row in uninterrupted.metrics]


def test_train_in_another_thread_trains(text: str, storage: str) -> None:
    runs: list[job.Run] = []
    sections = small(run={"storage": storage})
    thread = threading.Thread(target=lambda: runs.append(job.train(text=text, **sections)))
    thread.start()
    thread.join()
    assert runs[0].perplexity == job.train(text=text, **sections).perplexity


@pytest.mark.cluster
def test_train_uses_the_cluster_to_which_the_process_is_connected(
    text: str, storage: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # the connection has priority
    cell, sections = local_cell(), small(run={"storage": storage}, train={"reproducible": True})
    alone = job.train(text=text, cell=cell, **sections)
    ray.init(address=cluster, log_to_driver=False, logging_level="error")
    try:
        before = process_state()
        run = job.train(
            text=text, cell=cell, **{**sections, "scale": {"workers": 2}, "run": {"storage": storage, "name": "ray"}}
        )
        assert process_state() == before
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert run.result is not None
    assert alone.result is not None
    assert run.result["workers"] == 2
    assert run.result["weights_sha256"] == alone.result["weights_sha256"]


# --- invalid arguments ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modell": {}}, "unknown argument modell; did you mean model?"),
        ({"txt": "a"}, "unknown argument txt; did you mean text?"),
        ({"model": {"hiden_size": 3}}, "unknown field model.hiden_size; did you mean model.hidden_size?"),
        ({"model": {"hidden_size": "3"}}, 'job.train: model.hidden_size = "3": must be an integer'),
        ({"model": 3}, 'model = 3: must be a dict of fields; such as model={"field": value}'),
        ({"config": "absent.toml"}, "absent.toml: no such configuration file"),
        ({"config": 3}, "config: must be a path and not int; give a configuration file or a Config"),
        ({"config": "$UNSET/a.toml"}, "config: the environment variable UNSET is not set"),
        ({"stream": {"num_steps": np.arange(2)}}, "job.train: stream.num_steps = [0, 1]: must be an integer"),
        ({"corpus": "absent.txt", "scale": {"workers": 0}}, "corpus.source = absent.txt: no such file; give a file"),
        ({"text": 3}, "text: must be a str and not int; corpus= takes the path of a file"),
        ({"text": "a\udc80"}, r"text: character 1, '\udc80', is not valid in UTF-8"),
        ({"text": "", "scale": {"workers": 0}}, "text: contains no text"),
        ({"text": "a", "corpus": "b.txt"}, "text: corpus.source is given, too; give one of them"),
        ({"text": "a", "tokens": [1]}, "text: tokens are given, too; give one of them"),
        ({"tokens": [1]}, 'tokens: their vocabulary is missing; add vocabulary={"file": …}, a vocabulary.json'),
        ({"tokens": [1.5]}, "tokens: must be a one-dimensional array of token ids, not float64 of (1,)"),
        ({"tokens": [[1]]}, "tokens: must be a one-dimensional array of token ids, not int64 of (1, 1)"),
        ({"tokens": [2**31]}, "tokens: must be a one-dimensional array of token ids"),
        ({"tokens": [-(2**31) - 1]}, "tokens: must be a one-dimensional array of token ids"),
        ({"tokens": [[1], [1, 2]]}, "tokens: must be a one-dimensional array of token ids: setting an array element"),
        (
            {"tokens": [0, 256], "vocabulary": {"kind": "byte"}, "scale": {"workers": 0}},
            "tokens: 256 is not the id of a token, of which there are 256",
        ),
        ({"tokens": [0, -1], "vocabulary": {"kind": "byte"}, "scale": {"workers": 0}}, "tokens: -1 is not the id"),
        ({"cell": LinearCell(1, 1, 1)}, "cell: must be a class and not LinearCell; see 'Custom cells' in the README"),
        ({"cell": LinearCell, "model": {"cell": "gru"}}, "cell: model.cell is given, too; give one of them"),
        (
            {"cell": int, "text": "ab" * 999, "scale": {"workers": 0}},
            "model.cell = builtins:int: not a torch.nn.Module",
        ),
        ({"run": {"storage": "s3://name:secret@host/bucket"}}, "run.storage: a URI with credentials"),
    ],
)
def test_train_of_invalid_arguments_raises_a_user_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(job.UserError) as error:
        job.train(**arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_load_of_no_run_raises_user_error(tmp_path: Path) -> None:
    for folder, problem in ((tmp_path, f"{tmp_path}: is not a run"), (None, "folder: must be a path and not NoneType")):
        with pytest.raises(job.UserError) as error:
            job.load(folder)  # type: ignore[arg-type]
        assert str(error.value) == f"{problem}; give a run's folder, such as runs/seed-1 or run.folder"


# --- the import ---


def test_import_loads_nothing_and_works_after_torch() -> None:
    code = """
import os, sys, job
heavy = {"torch", "numpy", "pyarrow", "ray", "matplotlib", "importlib.metadata"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert sorted(dir(job)) == sorted([*job.__all__, "__version__"])
print(job.__version__)
assert "torch" not in sys.modules
assert issubclass(job.UserError, ValueError) and issubclass(job.RunFailed, RuntimeError)
assert "torch" not in sys.modules
del sys.modules["job"]
import torch
import job
assert job.Config().model.cell == "rnn"
assert callable(job.train) and callable(job.load) and "ray" not in sys.modules
try:
    job.absent
except AttributeError as error:
    assert str(error) == "module 'job' has no attribute 'absent'"
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ended.stdout == f"{version('lanes')}\n"


def test_version_of_package_that_is_not_installed_is_that_of_pyproject_toml(tmp_path: Path) -> None:
    """As in the image: folders that ``docker/Dockerfile`` copies, and no metadata."""
    shutil.copytree(ROOT / "job", tmp_path / "job", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    command = [sys.executable, "-S", "-c", "import job; print(job.__version__)"]  # without site-packages
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("1.2.3\n", "")
