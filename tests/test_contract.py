"""The contract of the command line, for every verb from one table."""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import ROOT, Ended, job

from job.__main__ import VERBS, CommandLine
from job.config.inference import GenerateConfig
from job.config.toml import FILE_FIELDS
from job.console import format_json
from job.data.text_size import TextSize
from job.inference.evaluate import Evaluation
from job.training.progress import LossSum

SMALL = ["--scale.workers", 0, "--model.hidden_size", 16, "--train.epochs", 1, "--generate.prefix", "the"]


@dataclass(frozen=True)
class Contract:
    """What a verb accepts.

    Args:
        missing: what is wrong if its file or folder does not exist
        flag: one of its flags
        misspelled: the same flag, not quite
        boolean: one of its flags for a boolean
        refused: flags of other verbs, and what is wrong with them
        has_json: whether it accepts ``--json``
        required: flags that it needs
    """

    missing: str
    flag: str = ""
    misspelled: str = ""
    boolean: str = ""
    refused: tuple[tuple[str, str], ...] = ()
    has_json: bool = True
    required: tuple[str, ...] = ()


NO_JSON = ("json", "generate, evaluate, doctor, runs can use it")
NO_ADDRESS = ("address", "doctor can use it")
ONLY_TUNE = ("search.trials", "only tune accepts fields of [search]")
NO_FIELDS = ("model.hidden_size", "does not accept fields of a configuration")
BY_CHECKPOINT = ("model.hidden_size", "is fixed by the checkpoint and cannot be changed")
CONTRACTS = {
    "train": Contract(
        "no such configuration file", "model.hidden_size", "model.hiden_size", "train.reproducible",
        (NO_JSON, NO_ADDRESS, ONLY_TUNE), has_json=False,
    ),
    "tune": Contract(
        "no such configuration file", "search.trials", "search.trails", "train.reproducible",
        (NO_JSON, NO_ADDRESS), has_json=False,
    ),
    "prepare": Contract(
        "no such configuration file", "model.hidden_size", "model.hiden_size", "train.reproducible",
        (NO_JSON, NO_ADDRESS, ONLY_TUNE), has_json=False,
    ),
    "generate": Contract(
        "neither a run with a checkpoint nor a checkpoint", "generate.length", "generate.lengths", "generate.unknown",
        (NO_ADDRESS, ONLY_TUNE, BY_CHECKPOINT, ("corpus.source", "is fixed by the checkpoint")),
    ),
    "evaluate": Contract(
        "neither a run with a checkpoint nor a checkpoint", "corpus.max_tokens", "corpus.max_token", "",
        (NO_ADDRESS, ONLY_TUNE, BY_CHECKPOINT, ("generate.length", "is fixed by the checkpoint")),
    ),
    "doctor": Contract(
        "no such configuration file", "model.hidden_size", "model.hiden_size", "train.reproducible", (ONLY_TUNE,)
    ),
    "runs": Contract("no such folder", refused=(NO_ADDRESS, NO_FIELDS, ONLY_TUNE)),
    "report": Contract(
        "neither a run nor a search", refused=(NO_JSON, NO_ADDRESS, NO_FIELDS, ONLY_TUNE), has_json=False
    ),
    "serve": Contract(
        "neither a run with a checkpoint nor a checkpoint", "evaluate.weights", "evaluate.weight", "",
        (NO_JSON, NO_ADDRESS, ONLY_TUNE, BY_CHECKPOINT), has_json=False,
    ),
    "export": Contract(
        "neither a run with a checkpoint nor a checkpoint", "evaluate.weights", "evaluate.weight", "",
        (NO_JSON, NO_ADDRESS, ONLY_TUNE, BY_CHECKPOINT), has_json=False,
        required=("--format", "hub", "--output", "no/such/output"),
    ),
}  # fmt: skip

every_verb = pytest.mark.parametrize("verb", CONTRACTS)
with_flags = pytest.mark.parametrize("verb", [verb for verb, contract in CONTRACTS.items() if contract.flag])
with_boolean = pytest.mark.parametrize("verb", [verb for verb, contract in CONTRACTS.items() if contract.boolean])
with_json = pytest.mark.parametrize("verb", [verb for verb, contract in CONTRACTS.items() if contract.has_json])


def assert_error(ended: Ended, *parts: str) -> None:
    """Checks for exit status 2, one line on standard error that contains all parts, and nothing on standard output."""
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1), ended
    assert ended.err.startswith("error: ")
    for part in parts:
        assert part in ended.err


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[CommandLine]:
    """What verbs are called with, in place of a call."""
    lines: list[CommandLine] = []

    def call(line: CommandLine) -> int:
        lines.append(line)
        return 0

    for name, verb in VERBS.items():
        monkeypatch.setitem(VERBS, name, replace(verb, run=call))
    return lines


def test_table_has_every_verb() -> None:
    assert list(CONTRACTS) == list(VERBS)
    assert ", ".join(verb for verb, contract in CONTRACTS.items() if contract.has_json) in NO_JSON[1]


# --- help ---


@pytest.mark.parametrize("verb", [None, *VERBS])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_80_columns_and_aligns_them(verb: str | None, flag: str) -> None:
    ended = job(*([verb] if verb else []), flag)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"usage: python -m job {verb or 'VERB'} ")
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    columns = {match.end() for line in lines if (match := re.match(r"  \S+  +| {3,}", line))}
    assert len(columns) == 1


def test_help_imports_no_large_package() -> None:
    code = f"""
import sys
for name in ("torch", "numpy", "pyarrow", "ray", "matplotlib", "rich", "pydantic"): sys.modules[name] = None
from job.__main__ import main
for words in [[], *([verb] for verb in {list(VERBS)}), ["help"]]: assert main([*words, "--help"]) == 0
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@every_verb
def test_help_lists_the_flags_that_the_verb_accepts(verb: str, called: list[CommandLine]) -> None:
    listed = re.findall(r"(?m)^  --(\S+)", job(verb, "-h").out)
    assert listed[-1] == "debug"
    assert ("json" in listed) == CONTRACTS[verb].has_json
    for name in listed[:-1]:
        ended = job(verb, f"--{name}")
        if name == "json":
            assert (ended.status, called.pop().json) == (0, True)
        else:
            assert_error(ended, f"--{name}: a value is missing")
    for name, problem in CONTRACTS[verb].refused:
        assert name not in listed
        assert_error(job(verb, f"--{name}", "1"), f"--{name}", problem)
    assert called == []


def test_help_for_tune_lists_every_field_with_its_default() -> None:
    text = " ".join(job("tune", "--help").out.split())
    assert re.findall(r" --(\w+\.\w+) ", text) == list(FILE_FIELDS)
    assert re.findall(r"\(default: (.*?)\)(?= --| \[| Other)", text) == [
        option.default_text for option in FILE_FIELDS.values()
    ]


def test_help_for_generate_lists_only_its_fields() -> None:
    flags = re.findall(r"(?m)^  --(\S+)", job("generate", "-h").out)
    fields = GenerateConfig.config_fields()
    assert flags == ["run.seed", "model.cell", *fields, "evaluate.weights", "json", "debug"]


# --- arguments ---


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            [],
            f"the verb is missing; one of {', '.join(CONTRACTS)}; python -m job --help",
        ),
        (["trian"], "unknown verb trian; did you mean train?"),
        (["--model.cell", "rnn"], "unknown verb --model.cell"),
        ([""], "unknown verb"),
        (["a\0b\x1b"], r'unknown verb "a\u0000b\u001b"'),
    ],
)
def test_unknown_verb_is_an_error(words: list[str], part: str) -> None:
    assert_error(job(*words), part)


@with_flags
def test_unknown_flag_names_the_nearest(verb: str) -> None:
    contract = CONTRACTS[verb]
    for words in ([f"--{contract.misspelled}", "1"], [f"--{contract.misspelled}=1"], [f"--{contract.misspelled}"]):
        assert_error(job(verb, *words), f"unknown field {contract.misspelled}; did you mean {contract.flag}?")


@with_flags
def test_flag_keeps_its_underscores(verb: str) -> None:
    flag = "corpus.max_tokens" if verb == "evaluate" else "model.hidden_size"
    assert_error(job(verb, f"--{flag.replace('_', '-')}", "1"), f"did you mean {flag}?")


@with_flags
def test_flag_given_twice_has_the_last_value(verb: str, called: list[CommandLine]) -> None:
    flag = CONTRACTS[verb].flag
    assert job(verb, f"--{flag}", "1", "x", f"--{flag}=--a=b").status == 0
    assert job(verb, f"--{flag}=--a=b", f"--{flag}", "1").status == 0
    assert called == [CommandLine(("x",), {flag: "--a=b"}), CommandLine((), {flag: "1"})]


@with_boolean
def test_boolean_is_true_or_false(verb: str, run: Path) -> None:
    name = CONTRACTS[verb].boolean
    target = [run] if "RUN" in VERBS[verb].arguments else []
    for value in ("yes", "True", "1", ""):
        assert_error(job(verb, *target, f"--{name}", value), f"{name} = ", "must be true or false")


@every_verb
def test_missing_file_or_folder_is_an_error(verb: str) -> None:
    contract = CONTRACTS[verb]
    assert_error(job(verb, "no/such", *contract.required), "no/such: ", contract.missing)
    assert_error(job(verb, "file:///no/such", *contract.required), "no/such: ", contract.missing)


@every_verb
def test_second_file_or_folder_is_an_error_unless_the_verb_takes_several(verb: str) -> None:
    takes_several = "…" in VERBS[verb].arguments
    assert_error(job(verb, "a", "b"), CONTRACTS[verb].missing if takes_several else "b: a is given already")


@every_verb
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["a\0b"], "a\\x00b: contains a NUL character"),
        (["$NO_SUCH_VARIABLE/a"], "the environment variable NO_SUCH_VARIABLE is not set"),
        (["s3://key:hunter2@bucket/a"], "a URI with credentials would be stored and shown"),
        (["--no\0such", "1"], r'unknown field "no\u0000such"'),
        (["-x"], "-x: "),
    ],
)
def test_invalid_argument_is_an_error(verb: str, words: list[str], part: str) -> None:
    ended = job(verb, *words, *CONTRACTS[verb].required)
    assert_error(ended, part)
    assert "hunter2" not in ended.err


@every_verb
def test_debug_shows_the_traceback_of_an_error(verb: str) -> None:
    ended = job("--debug", verb, "no/such", *CONTRACTS[verb].required)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("Traceback (most recent call last):")
    assert CONTRACTS[verb].missing in ended.err
    assert job(verb, "no/such", *CONTRACTS[verb].required, "--debug") == ended


@with_json
def test_json_leaves_errors_as_they_are(verb: str) -> None:
    for words in (["no/such", "--json"], ["--json", "no/such"]):
        assert job(verb, *words) == job(verb, "no/such")
    assert_error(job(verb, "--json=true"), "--json: takes no value")


def test_generate_and_evaluate_without_a_run_are_an_error() -> None:
    for verb in ("generate", "evaluate"):
        assert_error(job(verb), "the folder of a run or checkpoint is missing; give one, such as runs/seed-1")


# --- lines that programs read ---


@pytest.fixture(scope="module")
def trained(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The folder of a finished run, and how its command ended."""
    storage = tmp_path_factory.mktemp("storage")
    ended = job("train", *SMALL, "--corpus.source", prose, "--run.storage", storage, "--run.name", "run")
    assert (ended.status, ended.err) == (0, "")
    return storage / "run", ended


@pytest.fixture(scope="module")
def run(trained: tuple[Path, Ended]) -> Path:
    """The folder of a finished run."""
    return trained[0]


def test_train_ends_with_perplexity_sample_and_paths(trained: tuple[Path, Ended]) -> None:
    run, ended = trained
    found = json.loads((run / "result.json").read_text())
    pattern = (
        rf"perplexity {found['perplexity']:.4g} after 1 epochs, {found['steps']:,} steps, \d+ s on 1 worker\n\n"
        rf"    {re.escape(found['generated'])}\n\n"
        rf"curve      {run}/perplexity\.png\nmetrics    {run}/metrics\.jsonl\ncheckpoint {run}/{found['checkpoint']}\n"
        rf"continue   \S+ -m job generate {run} --generate\.prefix '…'\nreport     {run}/report\.html\n$"
    )
    assert re.search(pattern, ended.out), ended.out


@pytest.mark.parametrize(("kind", "unit"), [("char", "character"), ("byte", "byte"), ("word", "character")])
def test_evaluate_prints_the_line_that_programs_read(prose: Path, tmp_path: Path, kind: str, unit: str) -> None:
    words = ["--corpus.source", prose, "--run.storage", tmp_path, "--run.name", "run", "--vocabulary.kind", kind]
    assert job("train", *SMALL, *words, "--train.max_steps", 1, "--stream.num_steps", 5).status == 0
    (tmp_path / "text").write_text("the time zzz")
    ended = job("evaluate", tmp_path / "run", "--corpus.source", tmp_path / "text")
    unknown = "" if kind == "byte" else r", \d+(\.\d+)?% <unk>"
    number = r"\d[\d.e+]*"
    pattern = (
        rf"perplexity {number}, {number} bits per {unit}, {number} nats per token over \d+ targets "
        rf"\(step 1, {tmp_path}/text{unknown}\)\n"
    )
    assert re.fullmatch(pattern, ended.out), ended.out


# --- JSON output ---


def test_evaluate_json_has_the_numbers_of_the_text_output_without_rounding(run: Path) -> None:
    text, ended = job("evaluate", run), job("evaluate", run, "--json")
    assert (ended.status, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert list(found) == [
        "perplexity", "bits_per_character", "bits_per_byte", "bits_per_word", "nats_per_token", "targets",
        "unknown_share", "source", "checkpoint", "step",
    ]  # fmt: skip
    assert f"perplexity {found['perplexity']:.6g}, {found['bits_per_character']:.4f} bits per character, " in text.out
    assert f"{found['nats_per_token']:.6f} nats per token over {found['targets']:,} targets" in text.out
    assert found["perplexity"] == math.exp(found["nats_per_token"])
    assert found["checkpoint"] == str(max((run / "checkpoints").iterdir()))


def test_evaluate_json_of_a_loss_that_is_not_finite_is_null(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation(LossSum(math.nan, 9), 9, 0.5, TextSize(9, 9, 2))
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
