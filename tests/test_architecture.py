"""The shape of the project: layers without a circle, and a core that knows neither Ray nor a network."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

# Each folder imports only from itself and from those before it.
LAYERS = [
    "config",
    "data",
    "kernels",
    "nn",
    "distributed",
    "training",
    "inference",
    "export",
    "serving",
    "run",
    "tuning",
    "report",
    "cluster",
]
ENTRY_POINTS = {"__main__.py", "api.py"}  # the top: they import from all layers, and Ray only if it is needed
BASE = {"errors", "hub", "documents", "paths", "storage", "console"}
pytestmark = pytest.mark.xdist_group("architecture")  # one process, which parses the sources once
SOURCES = sorted(path for path in (ROOT / "job").rglob("*.py"))


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def layer(module: str) -> str:
    """The folder of a module ``job.FOLDER.NAME``, or its name if it is directly in ``job``."""
    return module.removeprefix("job.").partition(".")[0]


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of ``job`` that a file imports at its top."""
    for node in syntax_tree(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("job"):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("job"))


def test_source_list_finds_nested_modules() -> None:
    assert len(SOURCES) > 50
    assert {path.parent.name for path in SOURCES} == {"job", *LAYERS}
    assert sum(path.parent.name == "job" for path in SOURCES) <= 9


def test_folders_import_only_from_earlier_layers() -> None:
    for path in SOURCES:
        folder = path.parent.name
        if path.name in ENTRY_POINTS and path.parent.name == "job":
            continue
        allowed = BASE | ({folder, *LAYERS[: LAYERS.index(folder)]} if folder in LAYERS else set())
        assert {layer(module) for module in imported_modules(path)} <= allowed, path


def test_only_cluster_imports_ray() -> None:
    for path in SOURCES:
        for node in ast.walk(syntax_tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert path.parent.name == "cluster" or "ray" not in {name.partition(".")[0] for name in names}, path


@pytest.mark.slow
def test_core_without_ray_and_network_imports() -> None:
    core = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in SOURCES
        if path.parent.name != "cluster" and not path.name.startswith("__")
    ]
    code = f"""
import builtins, socket, sys
def refuse(*args, **kwargs): raise AssertionError("a network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.modules["ray"] = None
for name in {core}: __import__(name)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_functions_contain_no_imports() -> None:
    """Except the verbs of the command line and the API, so that they load only what a run needs."""
    for path in SOURCES:
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.FunctionDef) and path.name not in ENTRY_POINTS:
                inner = [child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)]
                assert not inner, f"{path.name}: {node.name}"


def test_benchmarks_build_runs_as_the_program_does() -> None:
    """There is no second way: a run's specification comes from build_run_spec, and nothing private is used."""
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(syntax_tree(path)):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called not in ("RunSpec", "Dataset", "TrainState", "Trainer"), f"{path.name}: {called}"
            private = (
                re.search(r"^job\..*\._[a-z]", node.value)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
                else None
            )
            assert not private, path.name
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("job"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path.name


def test_error_messages_are_not_parsed() -> None:
    """Problem and remedy are fields of an error; code that needs one of them reads the field."""
    parsing = re.compile(
        r"""\bin str\((error|exception|problem|failure)\)|str\(\w+\)\.(startswith|endswith|find|index)\("""
        r"""|(partition|split|removeprefix|removesuffix)\(["']; """
    )
    for example in (
        'str(error).partition("; ")',
        "if where not in str(error):",
        'text.removeprefix("; did you mean ")',
    ):
        assert parsing.search(example)
    for path in SOURCES:
        assert not parsing.search(path.read_text()), path


def test_user_errors_separate_problem_and_remedy() -> None:
    for path in SOURCES:
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                problem = node.args[0] if node.args else node
                texts = [text.value for text in ast.walk(problem) if isinstance(text, ast.Constant)]
                assert not any("; " in str(text) for text in texts), f"{path}:{node.lineno}: give the remedy separately"


def test_documented_tests_exist() -> None:
    """Each failure in the matrix names a test that proves what it says."""
    tests = (ROOT / "tests").glob("test_*.py")
    defined = {name for path in tests for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert set(re.findall(r"`(test_\w+)`", path.read_text())) <= defined
    matrix = (ROOT / "docs" / "reliability.md").read_text().partition("## What happens when")[2].splitlines()
    failures = [line for line in matrix if line.startswith("| ") and not line.startswith(("| failure", "| ---"))]
    assert len(failures) > 20
    assert [line for line in failures if line.count(" | ") != 4 or "`test_" not in line] == []
