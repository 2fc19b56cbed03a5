"""The example notebook, executed in a kernel."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOK = ROOT / "examples" / "time_machine.ipynb"
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
assert resumed.result["weights_sha256"] == local.result["weights_sha256"]
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
        yield AsyncKernelManager(transport="ipc", ip=f"{sockets}/socket")


def outputs(cell: Any) -> list[Any]:
    """The values that a cell of code shows."""
    return [output for output in cell.outputs if output.output_type in ("execute_result", "display_data")]


def test_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)


@pytest.mark.cluster
def test_notebook_executes_alone_and_with_workers_and_stays_as_it_was(
    tmp_path: Path, kernel: AsyncKernelManager
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before, after = nbformat.v4.new_code_cell(BEFORE), nbformat.v4.new_code_cell(AFTER)
    notebook.cells = [before, *notebook.cells, after]
    client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [output.data for cell in notebook.cells if cell.cell_type == "code" for output in outputs(cell)]
    assert shown[0]["text/plain"].startswith("Run('runs/run-1', perplexity=")
    assert "image/png" in shown[1]
    texts = [data["text/plain"] for data in shown[2:]]
    assert texts[0].startswith("'the ")
    assert float(texts[1]) > 1
    assert texts[2] == "True"
    assert texts[3].startswith("'the ")
