"""``<unk>``: in prefixes and samples, its share in every text, and the text whose tokens make the vocabulary."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, job, result, rows, search_config

from job.config.config_file import load_config
from job.console import Console
from job.inference.generate import generate_text
from job.inference.prefix import prefix_warnings
from job.nn.language_model import build_model
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.checkpoint import Checkpoint, LoadedCheckpoint
from job.training.progress import Progress
from job.tuning.setup import check_search

SMALL: dict[str, object] = {"scale.workers": 0, "stream.batch_size": 4, "stream.num_steps": 5, "model.hidden_size": 8}
SMALL |= {"train.epochs": 1, "train.max_steps": 2, "generate.length": 5, "generate.prefix": "the time"}
WORDS = "the time traveller and a man " * 20 + " ".join(f"rare{number}" for number in range(900))


def write_flags(tmp_path: Path, text: str, **flags: Any) -> dict[str, str]:
    (tmp_path / "text").write_text(text)
    flags = {**SMALL, "corpus.source": tmp_path / "text", "run.storage": tmp_path, "run.name": "run", **flags}
    return {name: str(value) for name, value in flags.items()}


def train_small(tmp_path: Path, text: str, **flags: Any) -> tuple[Path, Ended]:
    """Trains a run on the text, and returns its folder and how the command ended."""
    flags = write_flags(tmp_path, text, **flags)
    ended = job("train", *[word for name, value in flags.items() for word in (f"--{name}", value)])
    assert ended.status == 0, ended.err
    return tmp_path / "run", ended


def untrained_checkpoint(tmp_path: Path, dtype: torch.dtype = torch.float32, **flags: Any) -> LoadedCheckpoint:
    """A checkpoint of a run on ``WORDS`` that has not started; its model expects ``<unk>`` after each token."""
    spec = build_run_spec(load_config(None, write_flags(tmp_path, WORDS, **flags)), Folder(str(tmp_path)))
    vocabulary = spec.dataset.vocabulary
    weights = build_model(spec.config.model, len(vocabulary), 0).to(dtype).state_dict()
    weights["linear.bias"][0] = 3
    checkpoint = Checkpoint(spec.checkpoints, "step-000000-abcdef", 0, {}, None)
    return LoadedCheckpoint(checkpoint, spec.config, vocabulary, weights, Progress())


@pytest.mark.parametrize(
    ("flags", "prefix", "unknown"),
    [
        ({}, "naïve theï", "'ï'"),
        ({}, "\tThe ω, the Ω: ω", "'\\t', 'T', 'ω', ',', 'Ω', ':'"),
        ({"vocabulary.kind": "word"}, "the naïve  time", "'naïve'"),
        ({"vocabulary.kind": "word"}, "a blank at its end: ", "'blank', 'at', 'its', 'end:'"),
        ({}, "the " + "".join(map(chr, range(0x410, 0x430))), "'А', 'Б', 'В', 'Г', 'Д', 'Е', 'Ж', 'З', 'И', 'Й', …"),
        ({"corpus.cleaning": "d2l"}, "The Time: 1,000!", None),
        ({"vocabulary.kind": "byte"}, "naïve theï", None),
        ({"vocabulary.kind": "word"}, "the <unk> time", None),
    ],
)
@pytest.mark.parametrize("length", [0, 5])
def test_sample_begins_with_prefix_as_typed_and_unknown_tokens_are_named_once(
    tmp_path: Path, flags: dict[str, str], prefix: str, unknown: str | None, length: int
) -> None:
    more: dict[str, Any] = {**flags, "generate.prefix": prefix, "generate.length": length}
    loaded = untrained_checkpoint(tmp_path, **more)
    text = generate_text(loaded, loaded.config)
    assert text.startswith(prefix)
    if not length:
        assert text == prefix
    elif loaded.vocabulary.kind == "word":
        assert text.split()[: len(prefix.split())] == prefix.split()
        assert len(text.split()) == len(prefix.split()) + length
        assert "  " not in text.removeprefix(prefix)
    elif loaded.vocabulary.kind == "char":
        assert len(text) == len(prefix) + length
    warnings = [f"generate.prefix: not in the vocabulary, and read as <unk>: {unknown}"] if unknown else []
    assert prefix_warnings(loaded.config.generate.prefix, loaded.config.corpus, loaded.vocabulary) == warnings


def test_train_and_generate_warn_about_unknown_tokens_of_the_prefix_once(tmp_path: Path) -> None:
    run, trained = train_small(tmp_path, WORDS, **{"generate.prefix": "naïve theï"})
    warning = "warning: generate.prefix: not in the vocabulary, and read as <unk>: 'ï'\n"
    assert trained.out.count(warning) == trained.out.count("warning") == 1
    assert (trained.err, result(run)["generated"][:10]) == ("", "naïve theï")
    generated = job("generate", run)
    assert (generated.status, generated.out, generated.err) == (0, result(run)["generated"] + "\n", warning)
    refused = job("generate", run, "--generate.prefix", "ïω")
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        (torch.float32, {}),
        (torch.float32, {"model.hidden_size": 32}),  # decoded by the kernel
        (torch.float32, {"model.hidden_size": 32, "model.cell": "lstm", "model.num_layers": 2}),
        (torch.float64, {"vocabulary.kind": "word"}),
        (torch.float32, {"vocabulary.kind": "word", "vocabulary.size": 2}),
    ],
)
def test_generate_text_contains_unknown_only_if_asked(
    tmp_path: Path, dtype: torch.dtype, flags: dict[str, Any]
) -> None:
    loaded = untrained_checkpoint(tmp_path, dtype, **flags, **{"generate.length": 40})
    weights = {name: weight.clone() for name, weight in loaded.weights.items()}
    for temperature in (0.0, 1.0):
        for unknown in (False, True):
            generate = replace(loaded.config.generate, temperature=temperature, unknown=unknown)
            assert ("<unk>" in generate_text(loaded, replace(loaded.config, generate=generate))) == unknown
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.weights.items())


@pytest.mark.parametrize(
    ("text", "flags", "share", "validation_share"),
    [
        ("a b c d e f g h i j " * 100, {"vocabulary.kind": "word", "vocabulary.size": 9}, "20%", "20%"),
        (WORDS, {"vocabulary.kind": "word", "vocabulary.min_frequency": 2}, "85.3%", "100%"),
        ("abcx" * 50 + "abcd" * 400 + "abcx" * 50, {"vocabulary.size": 5}, "3.12%", "12.5%"),
        ("abcd" * 500, {}, None, None),
        ("ab\0d" * 500, {"vocabulary.kind": "byte"}, None, None),
    ],
    ids=["most frequent words", "repeated words", "most frequent characters", "all characters", "bytes"],
)
def test_train_reports_share_of_unknown_tokens_of_training_and_validation(
    tmp_path: Path, text: str, flags: dict[str, Any], share: str | None, validation_share: str | None
) -> None:
    flags = {**flags, "corpus.validation_fraction": 0.2, "train.log_every": 1, "generate.prefix": text[:3]}
    run, trained = train_small(tmp_path, text, **flags)
    shares = [float((text or "0%").rstrip("%")) / 100 for text in (share, share, validation_share)]
    stored = [rows(run, split)[0]["unknown_share"] for split in ("train", "epoch", "validation")]
    assert stored == pytest.approx(shares, rel=2e-3)
    assert (result(run)["unknown_share"], result(run)["validation_unknown_share"]) == tuple(stored[1:])
    lines = trained.out.splitlines()
    shown = [f", {text} <unk>" if text else "" for text in (share, share, validation_share)]
    for start, end in zip(("run run: ", "perplexity ", "validation "), shown, strict=True):
        (line,) = [line for line in lines if line.startswith(start)]
        assert line.endswith(end), line
        assert ("<unk>" in line) == bool(end)
    for name, value in (("training", shares[1]), ("validation", shares[2])):
        assert (f"warning: the {name} text is" in trained.out) == (value > 0.2)


def test_run_with_vocabulary_of_training_text_resumes_only_with_the_same_scope(tmp_path: Path) -> None:
    flags = {"corpus.validation_fraction": 0.2, "vocabulary.scope": "training"}
    run, trained = train_small(tmp_path, "abc" * 400 + "xyz" * 100, **flags, **{"generate.prefix": "abxc"})
    assert "warning: the validation text is 100% <unk>" in trained.out
    assert "read as <unk>: 'x'" in trained.out
    assert (result(run)["unknown_share"], result(run)["validation_unknown_share"]) == (0, 1)
    arguments = ["--scale.workers", 0, "--stream.batch_size", 4, "--stream.num_steps", 5, "--model.hidden_size", 8]
    arguments += ["--corpus.source", tmp_path / "text", "--run.storage", tmp_path, "--run.name", "run"]
    arguments += ["--corpus.validation_fraction", 0.2, "--train.epochs", 1, "--train.max_steps", 4]
    refused = job("train", *arguments)
    assert (refused.status, 'vocabulary.scope ("training" → "corpus")' in refused.err) == (2, True)
    assert job("train", *arguments, "--vocabulary.scope", "training").status == 0
    assert result(run)["steps"] == 4


def test_check_search_warns_about_unknown_tokens_of_its_configuration(tmp_path: Path) -> None:
    flags = {"vocabulary.kind": "word", "vocabulary.size": 3, "generate.prefix": "the naïve time"}
    config = load_config(None, write_flags(tmp_path, WORDS, **flags))
    search = search_config(metric="perplexity", space={"optimizer.learning_rate": {"grid": [0.1, 1]}})
    stream = io.StringIO()
    check_search(config, search, Folder(str(tmp_path / "search")), Console(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("warning: the training text is 96.1% <unk>")
    assert lines[1:] == ["warning: generate.prefix: not in the vocabulary, and read as <unk>: 'naïve'"]


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("char", {"tαβγδ ε": "83.3%", "the time": None}),
        ("word", {"the Greek word λόγος": "100%", "the" + " the time" * 5 + " 12": "9.09%", "the time": None}),
        ("byte", {"αβγδ ε": None}),
    ],
)
def test_evaluate_reports_share_of_unknown_targets(tmp_path: Path, kind: str, texts: dict[str, Any]) -> None:
    run, _ = train_small(tmp_path, WORDS, **{"vocabulary.kind": kind})
    for text, share in texts.items():
        (tmp_path / "other").write_text(text)
        evaluated = job("evaluate", run, "--corpus.source", tmp_path / "other")
        assert evaluated.status == 0
        assert evaluated.out.endswith(f"other, {share} <unk>)\n" if share else "other)\n")
        is_large = share not in (None, "9.09%")
        assert evaluated.err.startswith("warning: the evaluated text is") == is_large
        assert evaluated.err.count("\n") == is_large
