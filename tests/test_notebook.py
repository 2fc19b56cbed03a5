"""The notebooks, executed in a kernel."""

import os
import re
import tempfile
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BEFORE = """
import os, signal, sys
import job
job.train
def process():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    return [dict(os.environ), sys.stdout, sys.stderr, *map(signal.getsignal, numbers)]
state_before = process()
"""
# What a reader of the notebook might do next. The cell gets a signal, as when the user interrupts the kernel.
AFTER = """
import ray
assert process() == state_before
assert not ray.is_initialized()
class InterruptedGRU(MinimalGRU):
    pending = True
    def forward(self, inputs, state):
        if state is not None and len(inputs) > 3 and InterruptedGRU.pending:
            InterruptedGRU.pending = False
            signal.raise_signal(signal.SIGINT)
        return super().forward(inputs, state)
arguments = {**sections, "cell": InterruptedGRU, "model": {"hidden_size": 32}, "scale": {"workers": 0}}
interrupted = False
try:
    job.train(**arguments, run={"name": "interrupted"})
except KeyboardInterrupt:
    interrupted = True
assert interrupted
assert process() == state_before
resumed = job.train(**arguments, run={"name": "interrupted"})
assert resumed.result["restarts"] == 1
assert resumed.result["weights_sha256"] == own.result["weights_sha256"]
"""


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncKernelManager]:
    """A kernel of this Python, reached by sockets in a private folder, whose paths must be short."""
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="nb-") as sockets:
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", sockets)
        manager = AsyncKernelManager(transport="ipc", ip=f"{sockets}/socket")
        yield manager
        assert not manager.has_kernel, "the kernel has not ended"


def outputs(cell: Any) -> list[Any]:
    """The values that a cell of code shows."""
    return [output for output in cell.outputs if output.output_type in ("execute_result", "display_data")]


def execute(name: str, kernel: AsyncKernelManager, folder: Path, before: str = "", after: str = "") -> list[Any]:
    """Executes a notebook with few epochs and with code before and after it; returns what its cells show."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source, replaced = re.subn(r"epochs = \d+", "epochs = 2", code[0].source)
    assert replaced == 1
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (before, *(cell.source for cell in code), after)]
    client = NotebookClient(notebook, km=kernel, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute(cleanup_kc=True)  # without it the kernel, which is not the client's own, lives as long as pytest
    return [output.data for cell in notebook.cells for output in outputs(cell)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)


@pytest.mark.slow
def test_notebook_of_book_trains_plots_and_generates(tmp_path: Path, kernel: AsyncKernelManager) -> None:
    run, plot, greedy, sampled = execute("time_machine", kernel, tmp_path)
    assert run["text/plain"].startswith("Run('runs/time-machine', perplexity=")
    assert "image/png" in plot
    assert greedy["text/plain"].startswith("'time traveller") and sampled["text/plain"].startswith("'time traveller")
    assert (tmp_path / "runs" / "time-machine" / "result.json").exists()


@pytest.mark.cluster
@pytest.mark.long
def test_notebook_of_own_cell_compares_it_and_leaves_process_as_it_was(
    tmp_path: Path, kernel: AsyncKernelManager
) -> None:
    compared, frame, are_equal, sample = execute("own_cell", kernel, tmp_path, BEFORE, AFTER)
    perplexities = literal_eval(compared["text/plain"])
    assert perplexities.keys() == {"own-cell", "lstm"} and min(perplexities.values()) > 1
    assert 'src="comparison.html"' in frame["text/html"]
    page = (tmp_path / "comparison.html").read_text()
    assert "own-cell" in page and "lstm" in page
    assert are_equal["text/plain"] == "True"
    assert sample["text/plain"].startswith("'the ")
