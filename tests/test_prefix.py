"""The prefix of a sample: the default, one that the user gave, and one that is taken from the text."""

from pathlib import Path
from typing import Any

import pytest
from conftest import job, not_none, result, search_config

from job.config.config_file import load_config
from job.config.inference import GenerateConfig
from job.config.schema import Config
from job.config.toml import override_config
from job.console import Console
from job.errors import UserError
from job.run.run_dir import read_existing_run
from job.run.setup import build_run_spec
from job.storage import Folder
from job.tuning.setup import check_search

CHINESE = "今天天气很好，我们去公园散步。\n" * 200
DEFAULT = GenerateConfig.prefix
SMALL = {"scale.workers": "0", "stream.batch_size": "4", "stream.num_steps": "5", "model.hidden_size": "8"}
SMALL |= {"train.epochs": "1", "train.max_steps": "2", "generate.length": "5"}


def load_small_config(tmp_path: Path, text: str, **flags: Any) -> Config:
    (tmp_path / "text").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(
        None, {**SMALL, "corpus.source": str(tmp_path / "text"), "run.storage": str(tmp_path / "runs"), **flags}
    )


def resolve(tmp_path: Path, text: str, **flags: Any) -> str:
    """The prefix of a run on the text."""
    return build_run_spec(load_small_config(tmp_path, text, **flags), Folder(str(tmp_path))).config.generate.prefix


@pytest.mark.parametrize(
    ("text", "flags", "prefix"),
    [
        (CHINESE, {}, CHINESE[:12]),
        (CHINESE, {"vocabulary.kind": "byte"}, CHINESE[:12]),
        ("\n\n  " + CHINESE, {}, CHINESE[:12]),
        ("\n" * 3000, {}, "\n" * 12),
        ("\u3000" * 3000, {}, "\u3000" * 12),
        ("12 34 56 78 9 " * 200, {"vocabulary.min_frequency": "900"}, " "),
        ("31 41 59 26 53 " * 200, {}, "31 41 59 26 "),
        ("31 41 59 26 53 " * 200, {"vocabulary.kind": "word"}, "31 41 59"),
        ("one two three four " * 200, {"vocabulary.kind": "word", "corpus.cleaning": "d2l"}, "one two three"),
        ("rare " + "one two three four " * 200, {"vocabulary.kind": "word", "vocabulary.size": "4"}, "one two three"),
        ("xyz once " * 200, {"corpus.cleaning": "d2l"}, "xyz once xyz"),
        ("Привет, мир! " * 200, {}, "Привет, мир!"),
        ("🙂🙃 " * 500, {"vocabulary.kind": "byte"}, "🙂🙃 " * 4),
        (b"\xff\0\x80" * 500, {"vocabulary.kind": "byte"}, "\ufffd\0\ufffd" * 4),
        ("time traveller and a man " * 200, {}, DEFAULT),
        ("a traveller of time " * 200, {"vocabulary.kind": "word"}, DEFAULT),
        ("time traveller and a man " * 200, {"vocabulary.kind": "byte"}, DEFAULT),
    ],
)
def test_build_run_spec_default_prefix_is_taken_from_a_text_without_it(
    tmp_path: Path, text: str, flags: dict[str, str], prefix: str
) -> None:
    assert resolve(tmp_path, text, **flags) == prefix


@pytest.mark.parametrize(
    ("text", "prefix", "flags"),
    [
        (CHINESE, "hello", {}),
        ("31 41 59 26 53 " * 200, "π", {}),
        ("one two three four " * 200, "five", {"vocabulary.kind": "word"}),
    ],
)
def test_build_run_spec_prefix_of_the_user_is_checked(
    tmp_path: Path, text: str, prefix: str, flags: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=f"generate.prefix = '{prefix}': none of its tokens is in the vocabulary"):
        resolve(tmp_path, text, **flags, **{"generate.prefix": prefix})


@pytest.mark.parametrize(
    ("prefix", "flags", "message"),
    [
        ("", {}, "generate.prefix is empty, and the vocabulary has no separator or newline to begin with; give a text"),
        ("", {"vocabulary.kind": "word"}, "generate.prefix is empty, and the vocabulary has no separator or newline"),
        (" ", {"vocabulary.kind": "word"}, "generate.prefix = ' ': contains no words"),
        ("1234", {"corpus.cleaning": "d2l"}, "generate.prefix = '1234': contains no letters from A to Z"),
    ],
)
def test_build_run_spec_prefix_without_tokens_raises(
    tmp_path: Path, prefix: str, flags: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(tmp_path, "one two three four " * 200, **flags, **{"generate.prefix": prefix})


@pytest.mark.parametrize("flags", [{"vocabulary.size": "1"}, {"vocabulary.min_frequency": "100000"}])
def test_build_run_spec_vocabulary_without_tokens_raises(tmp_path: Path, flags: dict[str, str]) -> None:
    with pytest.raises(UserError, match="vocabulary: contains no token of the training text"):
        resolve(tmp_path, CHINESE, **flags)


@pytest.mark.parametrize(
    ("text", "kind"), [(CHINESE, "char"), ("31 41 59 26 53\n" * 200, "word"), ("Привет, мир! " * 200, "byte")]
)
def test_generate_continues_the_prefix_that_the_run_took_from_its_text(tmp_path: Path, text: str, kind: str) -> None:
    config = load_small_config(tmp_path, text)
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    flags += ["--corpus.source", config.corpus.source, "--run.storage", config.run.storage, "--run.name", "it"]
    trained = job("train", *flags, "--vocabulary.kind", kind)
    assert trained.status == 0, trained.err
    run = tmp_path / "runs" / "it"
    prefix = not_none(read_existing_run(Folder(str(run)))).config.generate.prefix
    assert text.replace("\n", " ").startswith(prefix)
    assert result(run)["generated"].startswith(prefix)
    generated = job("generate", run)
    assert (generated.status, generated.out) == (0, result(run)["generated"] + "\n")


@pytest.mark.parametrize(
    ("text", "flags", "hint"),
    [
        ("今天天气很好我们去公园散步" * 200, {}, "set vocabulary.kind = char: .* 2,600 characters"),
        (CHINESE[:64], {"corpus.validation_fraction": "0.5"}, "set vocabulary.kind = char"),
        ("ACGT" * 500, {}, "set vocabulary.kind = char"),
        ("วันนี้อากาศดีมาก เราไปเดินเล่น ", {}, "set vocabulary.kind = char"),
        ("three short words", {}, "lower them or give more text"),
    ],
)
def test_build_run_spec_with_too_few_words_names_the_cause(
    tmp_path: Path, text: str, flags: dict[str, str], hint: str
) -> None:
    with pytest.raises(UserError, match=f"; {hint}"):
        resolve(tmp_path, text, **{"vocabulary.kind": "word", **flags})


def test_check_search_leaves_the_default_prefix_to_the_trials(tmp_path: Path) -> None:
    config = load_small_config(tmp_path, "31 41 59 26 53 " * 200)
    search = search_config(metric="perplexity", space={"vocabulary.kind": {"grid": ["char", "word", "byte"]}})
    base = check_search(config, search, Folder(str(tmp_path / "search")), Console())
    assert base.generate == config.generate
    trials = (override_config(base, {"vocabulary.kind": kind}) for kind in ("char", "word", "byte"))
    prefixes = [build_run_spec(trial, Folder(str(tmp_path))).config.generate.prefix for trial in trials]
    assert prefixes == ["31 41 59 26 ", "31 41 59", "31 41 59 26 "]
