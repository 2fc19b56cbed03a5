"""Shared by all tests: calls of the command line, corpora, reference traces, one Ray cluster, rules of the suite."""

import contextlib
import errno
import gc
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

# As job sets it for commands, and before torch is loaded: threads that spin take the core from the other process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Importing and collecting the tests makes a million objects that stay, which the collector would visit many times.
gc.disable()

import numpy as np
import pytest
import torch
from hypothesis import settings
from matplotlib.figure import Figure
from safetensors.torch import save_file

from job import __main__ as command_line
from job import cluster as _cluster  # noqa: F401  sets the environment that Ray reads when it is imported
from job.config.search_space import SearchConfig, SearchSpace
from job.kernels.build import load_library, unavailable_reason
from job.storage import Folder

# Ray's processes need a token, and a machine on which Ray has never run has no ~/.ray/auth_token.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# A shell starts background commands with SIGINT ignored, which the commands that tests interrupt would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("quick", max_examples=20)  # of make test-quick

NEEDS_CUDA = "needs CUDA"  # the reason of a skip
RAY_TIMEOUT_S = 120.0  # for a thread of Ray Train or Ray Tune to end after its test
ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / "reference"
SHARED = ROOT.parent / "shared"  # reference traces and corpora that are not in the repository
T = TypeVar("T")
BOOK = SHARED / "corpora" / "timemachine.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allowed-skips", metavar="FILE", help="fail if a test is skipped that FILE does not list")
    parser.addoption("--time-table", action="store_true", help="print the seconds that each file took, as Markdown")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Lets the garbage collector ignore what exists once all tests are collected."""
    result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs cluster tests last and deselects tests marked ``shared`` if ``../shared`` is absent.

    Tests marked ``cuda`` are skipped without a GPU.
    Tests that use the same module-scoped fixture run in one process, so that it is set up once.
    """
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)
    if not SHARED.is_dir():
        missing = [item for item in items if item.get_closest_marker("shared")]
        config.hook.pytest_deselected(items=missing)
        items[:] = [item for item in items if item not in missing]
    for item in items:
        assert isinstance(item, pytest.Function)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NEEDS_CUDA))
        definitions = item._fixtureinfo.name2fixturedefs
        scoped = [name for name, fixtures in definitions.items() if fixtures[-1].scope == "module"]
        if scoped and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(f"{item.module.__name__}-{scoped[0]}"))


def skipped_tests(config: pytest.Config) -> dict[str, str]:
    """The reason of each skipped test."""
    reports = not_none(config.pluginmanager.get_plugin("terminalreporter")).stats.get("skipped", [])
    return {report.nodeid.partition("@")[0]: report.longrepr[2] for report in reports}  # pytest-xdist adds "@group"


def unexpected_skips(config: pytest.Config) -> list[str]:
    """Skipped tests that the file given by ``--allowed-skips`` does not list, with their reasons.

    A line of the file names one test, or a test function with all its parameters.
    """
    allowed = {line.split("#")[0].strip() for line in Path(config.option.allowed_skips).read_text().splitlines()}
    skips = skipped_tests(config).items()
    return [f"{test}: {reason}" for test, reason in skips if not {test, test.partition("[")[0]} & allowed]


def tests_without_cuda(config: pytest.Config) -> list[str]:
    """A line for each test function that was skipped because it needs CUDA, with the number of its cases."""
    cases = Counter(test.partition("[")[0] for test, reason in skipped_tests(config).items() if NEEDS_CUDA in reason)
    return [f"{NEEDS_CUDA}: {test}{f' ({count} cases)' if count > 1 else ''}" for test, count in cases.items()]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    is_controller = not hasattr(config, "workerinput")
    if is_controller and config.option.allowed_skips and unexpected_skips(config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints what needs CUDA, the skips that are not allowed, and the seconds that each file took."""
    for line in tests_without_cuda(config):
        terminalreporter.write_line(line)
    if config.option.allowed_skips:
        for skip in unexpected_skips(config):
            terminalreporter.write_line(f"not in {config.option.allowed_skips}: skipped {skip}", red=True)
    if config.option.time_table:
        reports = [report for reports in terminalreporter.stats.values() for report in reports]
        for line in time_table([report for report in reports if isinstance(report, pytest.TestReport)]):
            terminalreporter.write_line(line)


def time_table(reports: list[pytest.TestReport]) -> list[str]:
    """A Markdown table of files, their number of tests, and their seconds with fixtures; slowest first."""
    count, seconds = Counter[str](), dict[str, float]()
    for report in reports:
        name = report.nodeid.partition("::")[0]
        count[name] += report.when == "call"
        seconds[name] = seconds.get(name, 0.0) + report.duration
    rows = [
        f"| `{name}` | {count[name]} | {total:.0f} |"
        for name, total in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return ["| file | tests | seconds |", "| --- | --: | --: |", *rows]


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    """Resets torch's number of threads and determinism, which a run sets for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


SAVE_PICTURE = Figure.savefig


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Draws no pictures but within ``pictures``: one takes as long as the rest of a small run."""

    def save(figure: Figure, file: io.BytesIO, **_: object) -> None:
        file.write(b"\x89PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


@contextlib.contextmanager
def pictures() -> Iterator[None]:
    """Draws pictures within the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", SAVE_PICTURE)
        yield


def is_picture(data: bytes) -> bool:
    """Whether this is a PNG file, and not what replaces it in most tests."""
    return data.startswith(b"\x89PNG") and len(data) > 1000


@dataclass
class Ended:
    """How a command line ended."""

    status: int
    out: str
    err: str


def job(*words: object) -> Ended:
    """Calls the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["job", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command_line.command()
    finally:
        sys.argv = before
    return Ended(status, out.getvalue(), err.getvalue())


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _kill_started_processes() -> Iterator[None]:
    """Kills the commands that a failed test left running."""
    yield
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def start_job(
    *words: object, env: dict[str, str] | None = None, cwd: Path = ROOT, **options: Any
) -> subprocess.Popen[str]:
    """Starts the command line in its own process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "job", *map(str, words)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    _started.append(process)
    return process


def wait_until(condition: Callable[[], object], timeout_s: float, message: str, interval_s: float = 0.2) -> None:
    """Waits for another process or thread. Fails with the message after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(interval_s)


def not_none(value: T | None) -> T:
    """The value, which must be there."""
    assert value is not None
    return value


def search_config(space: Any = None, **fields: Any) -> SearchConfig:
    """A search over a space as TOML states it."""
    return SearchConfig(space=SearchSpace.parse(space or {}), **fields)


def rows(run: Path, split: str) -> list[dict[str, Any]]:
    """The metrics rows of one split."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 40,000 characters: English words in a fixed random order."""
    rng = np.random.default_rng(7)
    words = ["the", "time", "traveller", "was", "a", "man", "who", "came", "with", "his", "machine", "of", "light"]
    lines = [" ".join(rng.choice(words, 12)) for _ in range(600)]
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def stored_prose(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store of ``prose``, in several shards."""
    store = tmp_path_factory.mktemp("store") / "prose"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("job.data.pieces.PIECE_BYTES", 4096)
        ended = job("prepare", "--corpus.source", prose, "--corpus.store", store, "--scale.workers", 0)
    assert ended.status == 0, ended.err
    assert len(list(store.glob("tokens-*.bin"))) > 3
    return store


@pytest.fixture
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts become stores of several shards."""
    monkeypatch.setattr("job.data.pieces.PIECE_BYTES", 150)


@dataclass
class Trace:
    """A recorded run of the d2l book's own code, and the arguments of ``train`` that repeat it."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    arguments: list[str]


def _trace_arguments(meta: dict[str, Any], offsets: np.ndarray, corpus: Path, init: Path) -> list[str]:
    return [
        "--corpus.source", str(corpus), "--corpus.cleaning", "d2l" if corpus == BOOK else "none",
        "--corpus.max_tokens", str(max(0, meta["max_tokens"])),
        "--stream.batch_size", str(meta["batch_size"]), "--stream.num_steps", str(meta["num_steps"]),
        "--stream.offset", str(offsets.tolist()),
        "--model.cell", meta["cell"].lower(), "--model.hidden_size", str(meta["num_hiddens"]),
        "--model.num_layers", str(meta["num_layers"]), "--model.init", str(init),
        "--optimizer.learning_rate", str(meta["lr"]),
        "--optimizer.grad_clip_norm", str(meta["grad_clip_norm"] or 0),
        "--train.epochs", str(meta["num_epochs"]),
        "--train.precision", "fp64", "--train.log_every", "1",
        "--generate.prefix", meta["prefix"],
    ]  # fmt: skip


@pytest.fixture
def trace(request: pytest.FixtureRequest, tmp_path: Path) -> Trace:
    """The reference trace that the test's parameter names; the ``portable-…`` ones contain their corpus."""
    portable = request.param.startswith("portable-")
    folder = REFERENCE if portable else SHARED / "reference"
    with np.load(folder / f"{request.param}.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    corpus = BOOK
    if portable:
        corpus = tmp_path / "corpus.txt"
        corpus.write_bytes(arrays["text"].tobytes())
    meta = json.loads(str(arrays["meta"]))
    init = tmp_path / "init.safetensors"
    weights = {name[5:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("init.")}
    save_file(weights, str(init))
    (tmp_path / "vocabulary.json").write_text(json.dumps({"kind": "char", "tokens": meta["vocab"]}))
    return Trace(meta, arrays, _trace_arguments(meta, arrays["offsets"], corpus, init))


def disable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the model use torch's operators, as on a machine without a compiler."""
    monkeypatch.setattr("job.kernels.ops.supports_dtype", lambda dtype: False)


@pytest.fixture(params=["kernel", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the kernel and without it."""
    if request.param == "torch":
        disable_kernel(monkeypatch)
    elif load_library() is None:
        pytest.skip(f"no kernel: {unavailable_reason()}")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _wait_for_ray_train(request: pytest.FixtureRequest) -> Iterator[None]:
    """Waits longer for Ray Train to shut down: unlike a command's process, that of the tests runs further tests.

    For the session, because fixtures of modules train on Ray, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        if any(item.get_closest_marker("cluster") for item in request.session.items):
            patch.setattr("job.cluster.launcher.SHUTDOWN_TIMEOUT_S", 60.0)
        yield


@pytest.fixture(autouse=True)
def _ray_is_disconnected() -> Iterator[None]:
    """Fails a test that leaves this process connected to Ray, where the next one would use that connection.

    A run that does not end within its time on a busy machine stays connected on purpose: it is waited for.
    """
    yield
    if "ray" in sys.modules:
        disconnect_from_ray()


def disconnect_from_ray() -> None:
    """Ends the connection to Ray. Fails if there was one although no thread used it."""
    import ray

    from job.cluster.connection import BackgroundTask

    tasks = [thread for thread in threading.enumerate() if isinstance(thread, BackgroundTask)]
    for task in tasks:
        task.join(RAY_TIMEOUT_S)
    if was_connected := ray.is_initialized():
        ray.shutdown()
    assert not any(task.is_alive() for task in tasks), "a thread of Ray does not end"
    assert tasks or not was_connected, "the test left this process connected to Ray"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, a ``playwright.sync_api.Browser``.

    Not for the session: playwright's event loop runs in this thread until it is closed, where other tests start loops.
    """
    from browser import launch_chromium

    with launch_chromium() as chromium:
        yield chromium


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Small models of the kinds of tokens, as ``LoadedCheckpoint``, for the tests of serving."""
    from serving import train_kind

    folder = tmp_path_factory.mktemp("kinds")
    flags: dict[str, dict[str, Any]] = {
        "char": {"model.cell": "lstm"},
        "byte": {"model.cell": "gru", "model.num_layers": 2},
        "word": {"vocabulary.end_of_line": "true"},
        "bpe": {"vocabulary.size": 300, "model.cell": "minlstm"},
    }
    return {kind: train_kind(folder, kind, **flags[kind]) for kind in flags}


@pytest.fixture(scope="session")
def models(checkpoints: dict[str, Any]) -> dict[str, Any]:
    """The models of ``checkpoints`` as ``ServedModel``."""
    from job.config.schema import Config
    from job.serving.server import load_models

    return dict(zip(checkpoints, load_models(list(checkpoints.values()), Config()), strict=True))


@pytest.fixture(scope="module")
def served(models: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """A ``Server`` of ``models``, and its address."""
    from serving import serving

    with serving(list(models.values())) as pair:
        yield pair


@pytest.fixture
def url(served: tuple[Any, str]) -> str:
    """The address of the server of ``models``."""
    return served[1]


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of one node with eight CPUs. Its workers can import the tests' modules."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    from ray.cluster_utils import Cluster

    node = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    yield node.address
    disconnect_from_ray()  # Ray removes no node to which this process is connected
    node.shutdown()


@pytest.fixture
def on_cluster(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs jobs of the test on the session's cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)


@contextlib.contextmanager
def full_disk(name: str) -> Iterator[None]:
    """Lets each write of a file of this name to a folder of the storage fail, as on a full disk."""
    write = Folder.write

    def fill(folder: Folder, file: str, *parts: bytes) -> None:
        if file == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, file, *parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "write", fill)
        yield
