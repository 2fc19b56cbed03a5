"""The shape of the project: no circles, and a core that knows neither Ray nor a network."""

import ast
import graphlib
import subprocess
import sys

from conftest import ROOT

KNOW_RAY = {
    "attempt", "autoscaler", "cluster", "doctor", "elastic", "mailbox", "network", "onray", "probe", "steering", "tune",
    "watch", "worker",
}  # fmt: skip


def imports():
    """Each module of ``job`` with the modules of ``job`` that it imports."""
    found = {}
    for path in sorted((ROOT / "job").glob("*.py")):
        uses = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "job":
                uses |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("job."):
                uses.add(node.module.removeprefix("job."))
        found[path.stem] = uses
    return found


def test_imports_make_no_circle():
    graph = imports()
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)
    assert all(uses <= graph.keys() for uses in graph.values())


def test_only_the_cluster_side_knows_ray():
    for path in (ROOT / "job").glob("*.py"):
        knows = any(line.startswith(("import ray", "from ray")) for line in path.read_text().splitlines())
        assert knows == (path.stem in KNOW_RAY), path
    for module, uses in imports().items():
        assert module in KNOW_RAY or not uses & KNOW_RAY, module


def test_the_core_imports_without_ray_and_without_a_network():
    core = [f"job.{name}" for name in imports() if name not in KNOW_RAY and not name.startswith("__")]
    code = f"""
import builtins, socket, sys
def refuse(*args, **kwargs): raise AssertionError("a network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.modules["ray"] = None
for name in {core}: __import__(name)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_is_imported_inside_a_function():
    for path in (ROOT / "job").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                inner = [child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)]
                assert not inner, f"{path.name}: {node.name}"
