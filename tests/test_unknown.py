"""``<unk>``: in prefixes and samples, its share in every text, and the text whose tokens make the vocabulary."""

import io

import pytest
from conftest import job, result, rows

from job.config.config_file import load_config
from job.config.search_space import SearchConfig
from job.console import Console
from job.storage import Folder
from job.tuning.setup import check_search

SMALL = {"scale.workers": 0, "stream.batch_size": 4, "stream.num_steps": 5, "model.hidden_size": 8}
SMALL |= {"train.epochs": 1, "train.max_steps": 2, "generate.length": 5, "generate.prefix": "the time"}
WORDS = "the time traveller and a man " * 20 + " ".join(f"rare{number}" for number in range(900))


def train_small(tmp_path, text, **flags):
    """Trains a run on the text, and returns its folder and how the command ended."""
    (tmp_path / "text").write_text(text)
    flags = {**SMALL, "corpus.source": tmp_path / "text", "run.storage": tmp_path, "run.name": "run", **flags}
    ended = job("train", *[word for name, value in flags.items() for word in (f"--{name}", value)])
    assert ended.status == 0, ended.err
    return tmp_path / "run", ended


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
def test_sample_begins_with_prefix_as_typed_and_unknown_tokens_are_named_once(tmp_path, flags, prefix, unknown):
    run, trained = train_small(tmp_path, WORDS, **flags, **{"generate.prefix": prefix})
    warning = f"warning: generate.prefix: not in the vocabulary, and read as <unk>: {unknown}\n"
    assert trained.out.count(warning) == trained.out.count("warning") == (unknown is not None)
    sample = result(run)["generated"]
    generated = job("generate", run, "--generate.prefix", prefix)
    assert (generated.status, generated.out) == (0, sample + "\n")
    assert generated.err == (warning if unknown else "")
    blank = " " if flags.get("vocabulary.kind") == "word" and not prefix.endswith(" ") else ""
    assert sample.startswith(prefix + blank)
    assert job("generate", run, "--generate.prefix", prefix, "--generate.length", 0).out == prefix + "\n"


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"model.hidden_size": "32"},  # decoded by the kernel
        {"model.hidden_size": "32", "model.cell": "lstm", "model.num_layers": "2"},
        {"train.precision": "fp64"},
    ],
)
def test_generate_returns_unknown_only_if_asked(tmp_path, flags):
    """Of a text that is mostly ``<unk>``, which a model then expects."""
    flags = {"vocabulary.kind": "word", "vocabulary.size": "6", "generate.length": "40", **flags}
    flags |= {"train.epochs": "8", "train.max_steps": "0", "optimizer.learning_rate": "1"}
    run, _ = train_small(tmp_path, WORDS, **flags, **{"generate.prefix": "the time"})
    assert "<unk>" not in result(run)["generated"]
    assert len(result(run)["generated"].split()) == 42
    for flag, contains in ((), False), (("--generate.unknown", "true"), True):
        for temperature in (0, 1):
            generated = job("generate", run, "--generate.temperature", temperature, *flag)
            assert ("<unk>" in generated.out, generated.err) == (contains, "")


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
    tmp_path, text, flags, share, validation_share
):
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


def test_run_with_vocabulary_of_training_text_resumes_only_with_the_same_scope(tmp_path):
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


def test_check_search_warns_about_unknown_tokens_of_its_configuration(tmp_path):
    (tmp_path / "text").write_text(WORDS)
    flags = {"corpus.source": tmp_path / "text", "vocabulary.kind": "word", "vocabulary.size": 3}
    flags |= {"stream.batch_size": 4, "stream.num_steps": 5, "generate.prefix": "the naïve time"}
    config = load_config(None, {name: str(value) for name, value in flags.items()})
    search = SearchConfig(metric="perplexity", space={"optimizer.learning_rate": {"grid": [0.1, 1]}})
    stream = io.StringIO()
    check_search(config, search, Folder(str(tmp_path / "search")), Console(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("warning: the training text is 96.1% <unk>")
    assert lines[1:] == ["warning: generate.prefix: not in the vocabulary, and read as <unk>: 'naïve'"]


@pytest.mark.parametrize(
    ("flags", "text", "shown"),
    [
        ({}, "αβγδ ε", "83.3% <unk>"),
        ({"vocabulary.kind": "word"}, "the Greek word λόγος", "75% <unk>"),
        ({"vocabulary.kind": "word"}, "the the time time time traveller the time man 12", "10% <unk>"),
        ({"vocabulary.kind": "word"}, "the time traveller", None),
        ({"vocabulary.kind": "byte"}, "αβγδ ε", None),
    ],
)
def test_evaluate_reports_share_of_unknown_targets(tmp_path, flags, text, shown):
    run, _ = train_small(tmp_path, WORDS, **flags)
    (tmp_path / "other").write_text(text[:1] + text if flags == {} else "the " + text)
    evaluated = job("evaluate", run, "--corpus.source", tmp_path / "other")
    assert evaluated.status == 0
    assert evaluated.out.endswith(f"other, {shown})\n" if shown else "other)\n")
    is_large = shown not in (None, "10% <unk>")
    assert evaluated.err.startswith("warning: the evaluated text is") == is_large
    assert evaluated.err.count("\n") == is_large
