"""Paths and URIs as users write them: any character, variables, and no credentials."""

import os
import shlex
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import Ended, job, result

from job.config.config_file import load_config, load_search_config
from job.config.model import ModelConfig
from job.config.run import RunConfig
from job.config.schema import Config
from job.config.text import CorpusConfig
from job.config.toml import config_from_toml, config_to_toml, search_config_from_toml
from job.console import program_command
from job.data.corpus import read_corpus
from job.errors import UserError
from job.paths import expand_path, is_uri
from job.storage import Folder

TINY = ["--scale.workers", 0, "--model.hidden_size", 4, "--stream.batch_size", 4, "--stream.num_steps", 10]
TINY += ["--train.max_steps", 2, "--generate.prefix", "the", "--generate.length", 3]
NAMES = [
    "my$project",
    "a b",
    "über 中文",
    "100% #1",
    "what?[a]*",
    "$$",
    "a%20b&c=d;'\"\\",
    "x:",
    "${HOME}",
    "~tilde",
    "-",
]


def read(source: Path | str) -> list[str]:
    (document,) = read_corpus(load_config(None, {"corpus.source": str(source)}).corpus, "char").documents
    return [str(line) for line in document]


@pytest.mark.parametrize("name", ["my$project ${HOME} $$ x:", "über 中文 100% #1 what?[a]*", "~a%20b&c=d;'\"\\", "-"])
def test_train_with_any_character_in_every_path_trains_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("project", "elsewhere")
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    corpus, config = folder / f"{name}.txt", folder / f"{name}.toml"
    corpus.write_text("the time machine " * 40)
    config.write_text("[train]\nlog_every = 1\n")
    arguments = ["--corpus.source", corpus, "--run.storage", folder / "runs"]
    ended = job("train", config, *TINY, *arguments, "--run.name", "run")
    assert (ended.status, ended.err) == (0, "")
    assert job("train", *TINY, "--corpus.source", f"./{name}.txt").status == 0
    assert {path.name for path in (folder / "runs").iterdir()} == {"run", "run-1"}
    assert not (tmp_path / "elsewhere").exists()
    assert result(folder / "runs" / "run")["corpus"]["source"] == str(corpus)
    resumed = job("train", folder / "runs" / "run" / "config.toml", "--train.max_steps", 3, "--run.resume", "must")
    assert resumed.status == 0, resumed.err
    assert job("generate", folder / "runs" / "run").status == 0
    assert job("evaluate", folder / "runs" / "run").status == 0
    evaluated = job(
        "evaluate", f"file://{quote(str(folder))}/runs/run", "--corpus.source", f"file://{quote(str(corpus))}"
    )
    assert evaluated.status == 0, evaluated.err


@pytest.mark.parametrize("name", NAMES)
def test_folder_of_any_name_reads_what_it_wrote(tmp_path: Path, name: str) -> None:
    for folder in (Folder(str(tmp_path)) / name, Folder.resolve(f"file://{tmp_path}/{quote(name)}")):
        folder.write("file", b"data")
        assert (tmp_path / name / "file").read_bytes() == b"data"
        assert (folder.name, folder.parent.names()) == (name, [name])
        assert Folder(folder.address).read("file") == b"data"
        folder.remove("file")


def test_resolve_quotes_blanks_and_letters_in_uri(tmp_path: Path) -> None:
    (tmp_path / "über 1.txt").write_text("text")
    assert read(f"file://{tmp_path}/über 1.txt") == ["text"]


def test_resolve_in_folder_that_is_not_utf8_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    with pytest.raises(UserError, match="not UTF-8"):
        Folder.resolve("runs")


@pytest.mark.parametrize("folder", ["a[1]", "*", "part?"])
def test_read_corpus_existing_path_is_literal_before_it_is_a_glob(tmp_path: Path, folder: str) -> None:
    for name in (folder, "a1", "parts"):
        (tmp_path / name).mkdir()
    for name in ("x.txt", "y.txt", "[xy].txt"):
        (tmp_path / folder / name).write_text(name[0])
        (tmp_path / "a1" / name).write_text("wrong")
    assert read(tmp_path / folder / "[xy].txt") == ["["]
    assert "".join(map(str, read(tmp_path / folder / "?.txt"))).replace("\n", "") == "xy"
    (tmp_path / folder / "[xy].txt").unlink()
    assert "".join(map(str, read(tmp_path / folder / "[xy].txt"))).replace("\n", "") == "xy"


@pytest.mark.parametrize(
    ("source", "expanded"),
    [
        ("$DATA/a", "/data/$HOME/a"),  # a value is not expanded itself
        ("${DATA}b", "/data/$HOMEb"),
        ("$$DATA/a", "$DATA/a"),
        ("a$", "a$"),
        ("5$5", "5$5"),
        ("there$DATA/x", "there$DATA/x"),
        ("~/x", "/home/me/x"),
        ("s3://b/$DATA", "s3://b//data/$HOME"),
    ],
)
def test_expand_path_expands_variables_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expanded: str
) -> None:
    monkeypatch.setenv("DATA", "/data/$HOME")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    Path("there$DATA").mkdir()
    assert expand_path(source) == expanded
    config = load_config(None, {"run.storage": source, "corpus.source": source, "model.init": source})
    assert (config.run.storage, config.corpus.source, config.model.init) == (expanded,) * 3
    assert config_from_toml(config_to_toml(config), "") == config
    (tmp_path / "again.toml").write_text(config_to_toml(config))
    assert load_config("again.toml", {}) == config


@pytest.mark.parametrize("name", ["run.storage", "corpus.source", "model.init"])
def test_load_config_unset_variable_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(UserError, match=rf"^{name} = \$NO_SUCH/x: .* NO_SUCH is not set; set it, or write \$\$"):
        load_config(None, {name: "$NO_SUCH/x"})
    (tmp_path / "a.toml").write_text("[run]\nstorage = '$NO_SUCH'")
    with pytest.raises(UserError, match=r"a\.toml: run\.storage = \$NO_SUCH: "):
        load_config(str(tmp_path / "a.toml"), {})
    assert config_from_toml('[run]\nstorage = "$NO_SUCH"', "").run.storage == "$NO_SUCH"  # as early versions stored it


def test_search_space_paths_are_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/a$b")
    (tmp_path / "a.toml").write_text('[search.space]\ncorpus.source = { grid = ["$DATA/1", "$DATA/2"] }\n')
    config, search = load_search_config(str(tmp_path / "a.toml"), {})
    assert search.space.domains["corpus.source"].values == ("/a$b/1", "/a$b/2")
    assert search_config_from_toml(config_to_toml(config, search), "") == (config, search)


def test_is_uri_needs_a_scheme() -> None:
    assert all(map(is_uri, ["s3://b/x", "file:///x", "abfs+x://a"]))
    assert not any(map(is_uri, ["/a/b://c", "./a://b", "runs", "a:/b", "über://x"]))


SECRETS = [
    "s3://KEY:SECRET@bucket/x",
    "s3://KEY:SEC/RET+SECRET@bucket/x",
    "s3://KEY%3ASECRET@bucket/x",
    "https://me:SECRET@host/x.txt",
    "https://SECRET@host/x.txt",
    "gs://bucket/x?access_token=SECRET",
    "s3://bucket/x?region=eu&access_key=K&secret_key=SECRET",
    "s3://bucket/x?endpoint_override=http%3A%2F%2FK%3ASECRET%40host",
    "https://host/x?X-Amz-Signature=SECRET",
    "abfs://container:SECRET@account/x",
    "s3://KEY:SE$CRETSECRET@bucket/x",
    "$SECRET_URI/x",
]
FIELDS = ["run.storage", "corpus.source", "model.init", "model.cell"]


def assert_refused(ended: Ended, tmp_path: Path) -> None:
    assert ended.status == 2
    assert (ended.out, ended.err.count("\n")) == ("", 1)
    assert "SECRET" not in ended.err.replace("AWS_SECRET_ACCESS_KEY", "")
    assert "AWS_ACCESS_KEY_ID" in ended.err
    assert "~/.aws/credentials or an instance role" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("uri", SECRETS)
def test_credentials_in_uri_are_refused_and_neither_shown_nor_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("SECRET_URI", "s3://KEY:SECRET@bucket")
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.toml"
    for name in FIELDS[: 4 if "$" not in uri else 3]:
        section, key = name.split(".")
        config.write_text(f'[{section}]\n{key} = "{uri}"\n')
        for arguments in (["train", f"--{name}", uri], ["train", config], ["doctor", config], ["tune", config]):
            assert_refused(job(*arguments, *TINY), tmp_path)
            assert "SECRET" not in job(*arguments, "--debug").err.replace("AWS_SECRET_ACCESS_KEY", "")
    config.write_text(f'[search.space]\n"corpus.source" = {{ grid = ["{uri}", "x"] }}\n')
    assert_refused(job("tune", config), tmp_path)
    for verb in ("generate", "evaluate", "train", "tune", "doctor"):
        assert_refused(job(verb, uri), tmp_path)
    assert_refused(job("evaluate", "run", "--corpus.source", uri), tmp_path)


def test_credentials_in_a_configuration_made_by_a_program_are_refused() -> None:
    with pytest.raises(UserError, match=r"corpus\.source: a URI with credentials"):
        read_corpus(CorpusConfig(source=SECRETS[0]), "char")
    with pytest.raises(UserError, match="a URI with credentials"):
        Folder.resolve(SECRETS[0])


def test_credentials_that_an_early_version_stored_are_masked(tmp_path: Path, prose: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    old = Config(run=RunConfig("run", str(tmp_path)), corpus=CorpusConfig(SECRETS[0]), model=ModelConfig(hidden_size=4))
    (run / "config.toml").write_text(config_to_toml(old))
    for debug in ([], ["--debug"]):
        ended = job("train", *TINY, "--corpus.source", prose, "--run.storage", tmp_path, "--run.name", "run", *debug)
        assert ended.status == 2
        assert "s3://***@bucket/x" in ended.err
        assert "SECRET" not in ended.err


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a@b",
        "s3://bucket/x?region=eu&endpoint_override=127.0.0.1%3A1",
        "http://host:8080/a@b",
        "http://[::1]:80/a@b",
        "https://host/x#sha256=ab",
        "abfs://container@account.dfs.core.windows.net/x",
        "hdfs://me@host:9000/x",
        "gs://anonymous@bucket/x",
    ],
)
def test_uri_without_credentials_is_accepted(uri: str) -> None:
    assert load_config(None, {"corpus.source": uri, "run.storage": uri}).run.storage == uri


def test_prefix_may_contain_anything() -> None:
    assert load_config(None, {"generate.prefix": SECRETS[0]}).generate.prefix == SECRETS[0]


@pytest.mark.parametrize("name", ["a b", "my$project", "it's"])
def test_printed_commands_are_quoted_for_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / name / "python"))
    assert shlex.split(program_command()) == [f"{name}/python", "-m", "job"]
    monkeypatch.setattr("sys.argv", [str(tmp_path / name / "lanes"), "train"])
    assert shlex.split(program_command()) == [f"{name}/lanes"]
    (tmp_path / name).mkdir()
    (path,) = shlex.split(Folder.resolve(name).shell_quoted)
    assert Folder.resolve(expand_path(path)) == Folder(str(tmp_path / name))
