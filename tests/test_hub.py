"""Data sets of the Hugging Face hub: ``hf://datasets/…``, from a server on this machine."""

import gzip
import io
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, job, result
from hub_server import Hub, hub_server
from test_command_line import SMALL, assert_user_error

from job.data.source import find_files
from job.errors import UserError
from job.storage import Folder

TOKEN = "hf_abcdefghijklmnop"


def parquet(*texts: str) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), stream)
    return stream.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {
        "data/train-0.parquet": parquet("one two", "three"),
        "data/train-1.parquet": parquet("four"),
        "data/a b.txt": b"five\n",
        "lines.jsonl.gz": gzip.compress(b'{"text": "six"}\n'),
        ".gitattributes": b"",
        "README.md": b"read me\n",
    }
    hub = Hub({"me/set": files})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("huggingface_hub.utils._http.time.sleep", "job.hub.time.sleep"):
        monkeypatch.setattr(name, lambda _: None)
    with hub_server(hub) as endpoint:
        # What the library makes of HF_ENDPOINT when it is imported.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def read(source: str) -> dict[str, bytes]:
    return {file.name.removeprefix("hf://datasets/me/set"): file.read() for file in find_files(source)[1]}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", ["README.md", "data/a b.txt", "data/train-0.parquet", "data/train-1.parquet", "lines.jsonl.gz"]),
        ("/data", ["data/a b.txt", "data/train-0.parquet", "data/train-1.parquet"]),
        ("/data/*.parquet", ["data/train-0.parquet", "data/train-1.parquet"]),
        ("/**/*.parquet", ["data/train-0.parquet", "data/train-1.parquet"]),
        ("/data/a b.txt", ["data/a b.txt"]),
        ("/data/a%20b.txt", ["data/a b.txt"]),
    ],
)
def test_source_of_hub_is_a_file_a_folder_or_a_glob(hub: Hub, path: str, names: list[str]) -> None:
    files = hub.repositories["me/set"]
    found = read(f"hf://datasets/me/set{path}")
    assert [*found.values()] == [files[name] for name in names]


def test_source_of_hub_may_name_a_revision(hub: Hub) -> None:
    assert [*read("hf://datasets/me/set@v1/data/*.txt").values()] == [b"five\n"]
    assert all("/main" not in path for _, path in hub.requests)


def test_private_data_set_is_read_with_the_token_which_no_other_host_gets(hub: Hub) -> None:
    hub.token = f"Bearer {TOKEN}"
    assert read("hf://datasets/me/set/README.md")  # the server checks that the signed address gets no token
    folder = Folder.resolve("hf://datasets/me/set")
    assert TOKEN.encode() not in pickle.dumps(folder)
    assert pickle.loads(pickle.dumps(folder)).read("README.md") == b"read me\n"
    assert folder.read_block("README.md", -3, 9) == b"me\n"


@pytest.mark.parametrize("route", ["/api/datasets/me/set", "/tree/", "/resolve/", "/signed/"])
@pytest.mark.parametrize("status", [429, 503])
def test_hub_that_is_busy_is_asked_again(hub: Hub, route: str, status: int) -> None:
    hub.failures = [(route, status)] * 2
    assert [*read("hf://datasets/me/set/data/*.txt").values()] == [b"five\n"]
    assert not hub.failures


@pytest.mark.parametrize("route", ["/api/datasets/me/set", "/tree/", "/resolve/"])
@pytest.mark.parametrize(("status", "reason"), [(403, "Forbidden"), (503, "Service Unavailable")])
def test_hub_that_refuses_is_an_error_of_one_line(
    hub: Hub, capfd: pytest.CaptureFixture[str], route: str, status: int, reason: str
) -> None:
    hub.failures = [(route, status)] * 9
    with pytest.raises(UserError) as caught:
        read("hf://datasets/me/set/data/*.txt")
    message = str(caught.value)
    assert f"the hub answers {status} {reason}" in message
    assert "\n" not in message and "signed" not in message and TOKEN not in message
    assert capfd.readouterr() == ("", "")
    assert len(hub.failures) == (8 if status == 403 else hub.failures.count((route, status)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("me/none", "the hub answers 401 Unauthorized; check the name"),
        ("me/set/none.txt", "hf://datasets/me/set/none.txt: no such file"),
        ("me/set/*.csv", "no file matches"),
        ("me", "Invalid HF URI"),
    ],
)
def test_source_of_hub_that_is_missing_is_an_error(hub: Hub, source: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(f"hf://datasets/{source}")
    assert message in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_hub_is_not_written(hub: Hub) -> None:
    with pytest.raises(UserError, match="cannot be written to: the Hugging Face hub is only read"):
        Folder.resolve("hf://datasets/me/set").check_writable()
    assert all(method in ("GET", "HEAD") for method, _ in hub.requests)


def test_hub_passes_on_the_error_of_who_reads_a_file(hub: Hub) -> None:
    def parse(*_: object) -> None:
        raise UserError("not text")

    with pytest.raises(UserError, match=r"^not text$"):
        Folder.resolve("hf://datasets/me/set").read_with("README.md", parse)


def test_hub_without_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub is not installed; pip install huggingface_hub$"):
        find_files("hf://datasets/me/set")


@pytest.mark.slow
def test_run_from_the_hub_equals_the_run_from_its_files(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("data/train-0.parquet", "data/train-1.parquet"):
        hub.repositories["me/set"][name] = parquet(*["some words of text " * 20] * 9)
        (tmp_path / name).write_bytes(hub.repositories["me/set"][name])
    sources = {"hub": "hf://datasets/me/set/data/*.parquet", "disk": f"{tmp_path}/data/*.parquet"}
    for name, source in sources.items():
        words = ["--corpus.source", source, "--run.storage", tmp_path, "--run.name", name, "--train.max_steps", 2]
        assert job("train", *SMALL, *words).status == 0
    assert result(tmp_path / "hub")["weights_sha256"] == result(tmp_path / "disk")["weights_sha256"]
    assert_user_error(job("train", *SMALL, "--corpus.source", "hf://datasets/me/none"), "corpus.source", "401")


@pytest.mark.slow
def test_hub_of_the_environment_that_does_not_answer_is_an_error_of_one_line(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "HF_TOKEN": TOKEN}
        script = (
            "import job.hub, job.data.source as s; job.hub._RETRY_DELAYS_S = (); s.find_files('hf://datasets/me/a')"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **variables, "HOME": str(tmp_path)}, cwd=ROOT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert "UserError: the hub cannot be read: " in ended.stderr.splitlines()[-1]
    assert "refused" in ended.stderr and TOKEN not in ended.stderr
