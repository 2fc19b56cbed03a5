"""Exported models: their graphs against the model, and the documentation's scripts against ``generate``."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cells import DecayCell
from conftest import ROOT, job, result
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_command_line import assert_user_error
from tokenizers import Tokenizer

from job.api import load
from job.config.model import BUILTIN_CELLS, ModelConfig
from job.errors import UserError
from job.export.hub_model import LanguageModel as HubModel
from job.export.model_card import escape_markdown
from job.export.onnx_graph import build_graph, state_sizes
from job.export.onnx_model import onnx_file
from job.nn.language_model import LanguageModel, build_model
from job.storage import Folder

TEXT = "the time traveller came back once upon a time with his machine of light and ivory\n" * 20
PREFIX, LENGTH = "time traveller", 50
FORMATS = {"onnx": {"model.onnx"}, "hub": {"model.safetensors", "model.py", "README.md"}}


def lively_model(model_config: ModelConfig, num_tokens: int = 9) -> LanguageModel:
    """A model whose predictions differ much from token to token."""
    model = build_model(model_config, num_tokens, 1).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


# --- graphs ---


INPUTS: list[dict[str, Any]] = [
    {},
    {"embedding_size": 12},
    {"embedding_size": 9, "tied": True},
    {"softmax": "adaptive", "adaptive_cutoffs": (3, 8)},
]


def each_model(function: Callable[..., None]) -> Callable[..., None]:
    """Runs a test for each cell, with each kind of input and of output layer, and with a token that resets."""
    for name, values in (("reset_token", [None, 10]), ("inputs", INPUTS), ("cell", BUILTIN_CELLS)):
        function = pytest.mark.parametrize(name, values)(function)
    return function


def model_of_two_sizes(cell: str, inputs: dict[str, Any], reset_token: int | None) -> tuple[ModelConfig, LanguageModel]:
    config = ModelConfig(cell=cell, hidden_size=(7, 9), num_layers=2, **inputs)
    model = lively_model(config, 11)
    model.reset_token = reset_token
    return config, model


@each_model
def test_graph_of_cell_computes_logits_of_model(cell: str, inputs: dict[str, Any], reset_token: int | None) -> None:
    config, model = model_of_two_sizes(cell, inputs, reset_token)
    proto = build_graph(onnx, config, model.state_dict(), 11, reset_token)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    tokens_TB = torch.randint(11, (8, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_TBV, _ = model(tokens_TB, None)
    assert (tokens_TB[1:] == 10).any() and float(expected_TBV.std()) > 0.3
    state = {name: np.zeros((5, size), np.float32) for name, size in state_sizes(config).items()}
    for tokens_B, expected_BV in zip(tokens_TB.numpy(), expected_TBV.numpy(), strict=True):
        logits_BV, *new_state = session.run(None, {"tokens": tokens_B, **state})
        np.testing.assert_allclose(logits_BV, expected_BV, atol=2e-5)
        state = dict(zip(state, new_state, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_onnx_file_of_other_dtype_has_float32_weights(dtype: torch.dtype) -> None:
    config = ModelConfig(cell="gru", hidden_size=8)
    model = lively_model(config).to(dtype)
    if dtype == torch.bfloat16:
        with pytest.raises(UserError, match="differs from the model"):  # whose logits have 8 bits
            onnx_file(model, config)
    else:
        types = {tensor.data_type for tensor in onnx.load_from_string(onnx_file(model, config)).graph.initializer}
        assert types == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_onnx_file_that_differs_from_model_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(cell="rnn", hidden_size=8)
    model = lively_model(config)
    session_class = onnxruntime.InferenceSession

    def wrong_session(data: bytes, *arguments: Any, **options: Any) -> Any:
        proto = onnx.load_from_string(data)
        next(node for node in proto.graph.node if node.op_type == "Tanh").op_type = "Sigmoid"
        return session_class(proto.SerializeToString(), *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", wrong_session)
    with pytest.raises(UserError, match=r"ONNX Runtime differs from the model by .* of the largest value"):
        onnx_file(model, config)


def test_onnx_file_of_too_many_weights_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.export.onnx_model.MAX_BYTES", 900)
    with pytest.raises(UserError, match=r"--format onnx: the weights have 932 bytes, more than an ONNX"):
        onnx_file(lively_model(ModelConfig(hidden_size=8)), ModelConfig(hidden_size=8))


# --- the model of a hub folder ---


@each_model
def test_hub_model_of_cell_computes_logits_of_model(cell: str, inputs: dict[str, Any], reset_token: int | None) -> None:
    _, model = model_of_two_sizes(cell, inputs, reset_token)
    described = {
        "cell": cell, "hidden_size": [7, 9], "vocabulary_size": 11, "reset_token": reset_token,
        "adaptive_cutoffs": list(inputs.get("adaptive_cutoffs", ())),
    }  # fmt: skip
    exported, state = HubModel(described, model.state_dict()), None
    tokens_TB = torch.randint(11, (8, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_TBV, _ = model(tokens_TB, None)
        for tokens_B, expected_BV in zip(tokens_TB, expected_TBV, strict=True):
            logits_BV, state = exported(tokens_B, state)
            torch.testing.assert_close(logits_BV, expected_BV, atol=2e-5, rtol=0)
    assert (tokens_TB[1:] == 10).any() and float(expected_TBV.std()) > 0.3


def test_hub_model_generates_no_suppressed_token() -> None:
    config = ModelConfig(cell="gru", hidden_size=8)
    described = {
        "cell": "gru", "hidden_size": [8], "vocabulary_size": 9, "reset_token": None, "adaptive_cutoffs": [],
        "suppress_tokens": [],
    }  # fmt: skip
    weights = lively_model(config).state_dict()
    free = HubModel(described, weights).generate([1, 2], 30)
    suppressed = HubModel({**described, "suppress_tokens": [free[2]]}, weights).generate([1, 2], 30)
    assert len(free) == len(suppressed) == 32 and free[2] not in suppressed[2:]


# --- folders ---


def train(folder: Path, name: str, **fields: Any) -> Path:
    """A run of a few steps on one sentence."""
    flags: dict[str, Any] = {
        "corpus.source": folder / "text.txt", "scale.workers": 0, "run.storage": folder, "run.name": name,
        "stream.batch_size": 4, "stream.num_steps": 20, "optimizer.name": "adamw", "optimizer.learning_rate": 0.03,
        "model.hidden_size": 16, "train.max_steps": 1, "train.precision": "fp32", "generate.prefix": PREFIX, **fields,
    }  # fmt: skip
    ended = job("train", *(word for flag, value in flags.items() for word in (f"--{flag}", value)))
    assert ended.status == 0, ended.err
    return folder / name


def last_checkpoint(run: Path) -> Path:
    return run / result(run)["checkpoint"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each built-in cell."""
    folder = tmp_path_factory.mktemp("storage")
    (folder / "text.txt").write_text(TEXT)
    sizes = {cell: 6 if cell in ("gru", "minlstm", "mogrifier") else 0 for cell in BUILTIN_CELLS}
    flags = {"model.num_layers": 2, "train.max_steps": 50}
    return {
        cell: train(folder, cell, **flags, **{"model.cell": cell, "model.embedding_size": size})
        for cell, size in sizes.items()
    }


def script(name: str) -> str:
    """A script of the documentation."""
    found = re.search(rf"```python\n(# {name}\.py\n.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert found
    return found[1]


RUN_SCRIPT = """
import contextlib, io, json, os, sys
script, folders = json.load(sys.stdin)
texts = []
for folder in folders:
    os.chdir(folder)
    sys.modules.pop("model", None)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(script, {})
    texts.append(out.getvalue())
assert not [name for name in sys.modules if name.partition(".")[0] == "job"]
print(json.dumps(texts))
"""


def run_script(code: str, folders: list[Path], cwd: Path) -> list[str]:
    """What a script prints in each folder, in a process that does not import this project."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given = json.dumps([code, [str(folder) for folder in folders]])
    command = [sys.executable, "-c", RUN_SCRIPT]
    ended = subprocess.run(command, input=given, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_script_of_documentation_prints_text_of_generate_for_each_cell(
    file_format: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    expected = []
    for cell in BUILTIN_CELLS:
        ended = job("export", runs[cell], "--format", file_format, "--output", tmp_path / cell / f"time-{file_format}")
        assert (ended.status, ended.err) == (0, "")
        flags = ["--generate.prefix", PREFIX, "--generate.length", LENGTH]
        expected.append(job("generate", runs[cell], *flags).out)
    texts = run_script(script(f"use_{file_format}"), [tmp_path / cell for cell in BUILTIN_CELLS], tmp_path)
    assert texts == expected
    assert min(len(set(text[len(PREFIX) :])) for text in texts) > 4, texts


@pytest.fixture(scope="module")
def run(runs: dict[str, Path]) -> Path:
    return runs["gru"]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_export_writes_all_files_for_others_to_read(file_format: str, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "output"
    ended = job("export", run, "--format", file_format, "--output", output)
    assert ended.out.startswith(f"step 50 in {output}: ")
    names = FORMATS[file_format] | {"config.json", "vocabulary.json"}
    assert {path.name for path in output.iterdir()} == names == set(ended.out.strip().rpartition(": ")[2].split(", "))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["output"]
    checkpoint = last_checkpoint(run)
    assert (output / "vocabulary.json").read_text() == (checkpoint / "vocabulary.json").read_text()
    config = json.loads((output / "config.json").read_text())
    assert (config["cell"], config["hidden_size"], config["suppress_tokens"]) == ("gru", [16, 16], [0])


def continue_greedily(folder: Path, prefix: list[int]) -> list[int]:
    """The ids that the model of an ONNX folder generates after some others."""
    config = json.loads((folder / "config.json").read_text())
    session, ids, length = onnxruntime.InferenceSession(folder / "model.onnx"), [*prefix], len(prefix) + LENGTH
    state = {name: np.zeros((1, size), np.float32) for name, size in config["state"].items()}
    for step in range(length - 1):
        logits, *new_state = session.run(None, {"tokens": np.array([ids[step]]), **state})
        state = dict(zip(state, new_state, strict=True))
        logits[:, config["suppress_tokens"]] = -np.inf
        ids += [int(logits.argmax())] * (len(ids) == step + 1)
    return ids


@pytest.fixture(scope="module", params=["byte", "word", "bpe", "documents"])
def trained(run: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A run with a kind of vocabulary, or with documents that reset the state, and another architecture each."""
    kind, storage = request.param, run.parent
    (storage / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXT.splitlines()))
    flags: dict[str, dict[str, Any]] = {
        "byte": {"vocabulary.kind": "byte", "model.cell": "mogrifier"},
        "word": {"vocabulary.kind": "word", "model.softmax": "adaptive", "model.cell": "gru"},
        "bpe": {"vocabulary.kind": "bpe", "vocabulary.size": 270, "model.embedding_size": 48, "model.tied": "true"},
        "documents": {
            "corpus.source": storage / "text.jsonl", "corpus.documents": "reset",
            "model.num_layers": 2, "model.hidden_size": "[48, 32]",
        },
    }  # fmt: skip
    return kind, train(
        storage, kind, **{"train.max_steps": 100, "model.cell": "lstm", "model.hidden_size": 48, **flags[kind]}
    )


def expected_text(run: Path, *flags: str) -> str:
    """What ``generate`` prints, which is no short loop."""
    text = job("generate", run, "--generate.length", LENGTH, *flags).out.removesuffix("\n")
    assert len(set(text[-LENGTH:])) > 4, text
    return text


@pytest.mark.slow
def test_onnx_folder_of_vocabulary_gives_tokens_of_generate(trained: tuple[str, Path], tmp_path: Path) -> None:
    kind, run = trained
    assert job("export", run, "--format", "onnx", "--output", tmp_path / "onnx").status == 0
    if kind == "bpe":
        tokenizer = Tokenizer.from_file(str(tmp_path / "onnx" / "tokenizer.json"))
        text = tokenizer.decode(continue_greedily(tmp_path / "onnx", tokenizer.encode(PREFIX).ids))
    elif kind == "byte":
        text = bytes(continue_greedily(tmp_path / "onnx", [*PREFIX.encode()])).decode()
    else:
        tokens = [*json.loads((tmp_path / "onnx" / "vocabulary.json").read_text())["tokens"], "<|endoftext|>"]
        ids = [tokens.index(token) for token in (PREFIX.split() if kind == "word" else PREFIX)]
        text = (" " * (kind == "word")).join(tokens[index] for index in continue_greedily(tmp_path / "onnx", ids))
    assert text == expected_text(run, "--generate.prefix", PREFIX)


def card_script(folder: Path) -> str:
    """The script of a model card."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.slow
def test_script_of_model_card_prints_text_of_generate(trained: tuple[str, Path], tmp_path: Path) -> None:
    assert job("export", trained[1], "--format", "hub", "--output", tmp_path / "hub").status == 0
    code = card_script(tmp_path / "hub")
    assert len([line for line in code.splitlines() if line]) <= 11
    (text,) = run_script(code, [tmp_path / "hub"], tmp_path)
    assert text.removesuffix("\n") == expected_text(trained[1])


@pytest.mark.slow
def test_hub_folder_has_weights_of_checkpoint_and_a_valid_card_without_licence(run: Path, tmp_path: Path) -> None:
    assert job("export", run, "--format", "hub", "--output", tmp_path / "hub").status == 0
    checkpoint = last_checkpoint(run)
    weights, exported = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "hub"))
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in weights)
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.tags == ["recurrent-neural-network", "gru"]
    assert card.data.license is None
    assert f"<pre>{result(run)['generated']}</pre>" in card.text
    documented = script("use_hub").partition("\n")[2]
    assert card_script(tmp_path / "hub") == documented.replace('folder = "time-hub"', 'folder = "."')
    perplexity = escape_markdown(f"{result(run)['perplexity']:.4g}")
    assert f"| training perplexity | {perplexity} |" in card.text


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_export_of_run_with_average_writes_it_unless_raw_is_given(file_format: str, run: Path, tmp_path: Path) -> None:
    flags = {"optimizer.averaging": "mean", "optimizer.average_start": 1, "train.max_steps": 6}
    averaged = train(run.parent, f"averaged-{file_format}", **flags, **{"optimizer.learning_rate": 0.5})
    folder = last_checkpoint(averaged)
    for choice, file in (("auto", "average"), ("average", "average"), ("raw", "model")):
        output = tmp_path / choice
        arguments = ["--format", file_format, "--output", output, "--evaluate.weights", choice]
        assert job("export", averaged, *arguments).status == 0
        expected = load_file(folder / f"{file}.safetensors")["linear.weight"]
        if file_format == "hub":
            found = load_file(output / "model.safetensors")["linear.weight"].numpy()
            assert ("the average over the steps" in (output / "README.md").read_text()) == (file == "average")
        else:
            constants = onnx.load(output / "model.onnx").graph.initializer
            found = next(onnx.numpy_helper.to_array(value) for value in constants if value.name == "linear.weight")
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_export_of_custom_cell_writes_its_weights_and_refuses_onnx(run: Path, tmp_path: Path) -> None:
    custom = train(run.parent, "custom", **{"model.cell": "cells:DecayCell", "model.hidden_size": 8})
    refused = job("export", custom, "--format", "onnx", "--output", tmp_path / "onnx")
    assert_user_error(refused, "model.cell = cells:DecayCell: only built-in cells can be exported to ONNX")
    assert not (tmp_path / "onnx").exists()
    for flags, has_sample in (([], False), (["--model.cell", "cells:DecayCell"], True)):
        output = tmp_path / str(has_sample)
        assert job("export", custom, "--format", "hub", "--output", output, *flags).status == 0
        assert (
            load_file(output / "model.safetensors").keys()
            == load_file(last_checkpoint(custom) / "model.safetensors").keys()
        )
        card = (output / "README.md").read_text()
        assert ("<pre>" in card) == has_sample
        assert "cells\\:DecayCell" in card
    load(custom, cell=DecayCell).export("hub", tmp_path / "python")
    assert (tmp_path / "python" / "README.md").read_text() == card


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--output", "new"], ["--format is missing", "onnx, hub"]),
        (["--format", "onnx"], ["--output is missing"]),
        (["--format", "onx", "--output", "new"], ["unknown --format onx; did you mean onnx?"]),
        (["--format", "hub", "--output", ""], ["--output : is not a local folder"]),
        (["--format", "hub", "--output", "s3://bucket/x"], ["--output s3://bucket/x: is not a local folder"]),
        (["--format", "hub", "--output", "full"], ["--output full: exists and is not an empty folder"]),
        (["--format", "hub", "--output", "full/file"], ["--output full/file: exists and is not an empty folder"]),
        (["--format", "hub", "--output", "full/file/new"], ["full/file/new: cannot be written: Not a directory"]),
        (["--format", "hub", "--output", "$NO_SUCH"], ["--output: the environment variable NO_SUCH is not set"]),
        (
            ["--format", "hub", "--output", "new", "--evaluate.weights", "average"],
            ["evaluate.weights = average: optimizer.averaging = none"],
        ),
        (["--format", "hub", "--output", "new", "--generate.length", 3], ["generate.length is fixed"]),
    ],
)
def test_export_with_bad_input_is_one_line_and_writes_nothing(
    flags: list[object], parts: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert_user_error(job("export", run, *flags), *parts)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


@pytest.mark.slow
def test_export_to_link_to_private_empty_folder_keeps_both(run: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("private")
    ended = job("export", run, "--format", "hub", "--output", tmp_path / "link")
    assert (ended.status, ended.err) == (0, "")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "README.md").exists()
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    assert {path.name for path in tmp_path.iterdir()} == {"private", "link"}


def test_export_of_folder_without_checkpoint_is_one_line(tmp_path: Path) -> None:
    ended = job("export", tmp_path / "none", "--format", "hub", "--output", tmp_path / "new")
    assert_user_error(ended, "none: neither a run with a checkpoint nor a checkpoint")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_export_of_search_with_several_runs_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = tmp_path / "search"
    search.mkdir()
    (search / "search.toml").touch()
    monkeypatch.setattr("job.tuning.trials.finished_checkpoints", lambda _: [Folder(str(run))] * 2)
    ended = job("export", search, "--format", "hub", "--output", tmp_path / "new")
    assert_user_error(ended, "search: is a search with 2 runs; give one of them")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_export_to_onnx_without_its_packages_is_one_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    ended = job("export", tmp_path, "--format", "onnx", "--output", tmp_path / "new")
    assert_user_error(ended, f"--format onnx: {package} is not installed; pip install {package}")


@pytest.mark.slow
def test_export_that_runs_out_of_space_leaves_nothing(run: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # of a file: as on a disk with this much space
    try:
        ended = job("export", run, "--format", "hub", "--output", tmp_path / "deep" / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_user_error(ended, "new: cannot be written: File too large")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_model_card_escapes_text_of_others(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "<img src=x>|`a`.txt"
    text.write_text("</pre><script>alert(1)</script>\n[a](b) ![c](d) | ` * _\n" * 40)
    flags = {"corpus.source": text, "generate.prefix": "</pre><script>"}
    hostile = train(tmp_path, "hostile", **flags)
    assert job("export", hostile, "--format", "hub", "--output", tmp_path / "hub").status == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert re.findall("<[^|>][^>]*>", card.replace("\\<", "")) == ["<pre>", "</pre>"]
    assert str(tmp_path) not in card
    assert escape_markdown(text.name) == r"\<img src\=x\>\|\`a\`\.txt"
    assert escape_markdown(text.name) in card
