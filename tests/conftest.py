"""What tests share: a command line to call, corpora, reference traces, and one Ray cluster."""

import contextlib
import io
import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import job.cluster
from job import __main__ as command_line

# Ray's processes need a token, and a machine on which Ray has never run has no ~/.ray/auth_token.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
BOOK = SHARED / "corpora" / "timemachine.txt"


def pytest_collection_modifyitems(items):
    """Cluster tests last, so that the quick ones speak first."""
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)


@pytest.fixture(autouse=True)
def _restore_torch():
    """A run sets torch's threads and determinism for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


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


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _end_what_was_started():
    """A test that fails leaves no command running under those after it."""
    yield
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def start_job(*words: object, env: dict[str, str] | None = None, cwd: Path = ROOT, **options: Any) -> subprocess.Popen:
    """Starts the command line in a process of its own."""
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


def rows(run: Path, split: str) -> list[dict[str, Any]]:
    """A run's rows of metrics of one split."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


@pytest.fixture(scope="session")
def prose(tmp_path_factory) -> Path:
    """English-like text that a test makes itself: 40,000 characters of words in a fixed random order."""
    rng = np.random.default_rng(7)
    words = ["the", "time", "traveller", "was", "a", "man", "who", "came", "with", "his", "machine", "of", "light"]
    lines = [" ".join(rng.choice(words, 12)) for _ in range(600)]
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text("\n".join(lines))
    return path


@dataclass
class Trace:
    """A recorded run of the d2l book's own code."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    flags: list[str]


def _flags(trace_meta: dict[str, Any], offsets: np.ndarray, init: Path) -> list[str]:
    return [
        "--corpus.source", str(BOOK), "--corpus.cleaning", "d2l",
        "--corpus.max_tokens", str(max(0, trace_meta["max_tokens"])),
        "--stream.batch_size", str(trace_meta["batch_size"]), "--stream.num_steps", str(trace_meta["num_steps"]),
        "--stream.offset", str(offsets.tolist()),
        "--model.cell", trace_meta["cell"].lower(), "--model.hidden_size", str(trace_meta["num_hiddens"]),
        "--model.num_layers", str(trace_meta["num_layers"]), "--model.init", str(init),
        "--optimizer.learning_rate", str(trace_meta["lr"]),
        "--optimizer.grad_clip_norm", str(trace_meta["grad_clip_norm"] or 0),
        "--train.epochs", str(trace_meta["num_epochs"]),
        "--train.precision", "fp64", "--train.log_every", "1",
        "--generate.prefix", trace_meta["prefix"],
    ]  # fmt: skip


@pytest.fixture
def trace(request, tmp_path) -> Trace:
    """The reference trace that the test's parameter names."""
    path = SHARED / "reference" / f"{request.param}.npz"
    if not path.exists():
        pytest.skip(f"the reference traces are not here ({path})")
    with np.load(path, allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    meta = json.loads(str(arrays["meta"]))
    init = tmp_path / "init.safetensors"
    weights = {name[5:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("init.")}
    save_file(weights, str(init))
    return Trace(meta, arrays, _flags(meta, arrays["offsets"], init))


def disable_kernel(monkeypatch):
    """Makes the model use torch's operators, as on a machine without a compiler."""
    monkeypatch.setattr("job.nn.dispatch.supports_dtype", lambda dtype: False)


@pytest.fixture(autouse=True)
def until_ray_has_ended(request, monkeypatch):
    """A command's process would end with Ray Train still at work; that of the tests goes on, and must not be in it."""
    if request.node.get_closest_marker("cluster"):
        monkeypatch.setattr("job.cluster.launcher.SHUTDOWN_TIMEOUT_S", 60.0)


@pytest.fixture(scope="session")
def cluster():
    """A Ray cluster of one node with eight slots, which tests reach by its address.

    Its workers find the tests' own modules, as a job's find those of its working directory.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    from ray.cluster_utils import Cluster

    node = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    yield node.address
    node.shutdown()


@pytest.fixture
def on_cluster(cluster, monkeypatch):
    """Has jobs run on the shared cluster."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)
