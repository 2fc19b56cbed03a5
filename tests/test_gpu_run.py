"""The GPU bundle and the GPU run: what they pack, unpack, run and report. None of it needs a GPU."""

import contextlib
import io
import json
import lzma
import os
import platform
import subprocess
import sys
import tarfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from benchmarks.gpu import DTYPES, EAGER, REFERENCE, SkewedShapes, plain_variant, prepare, reference_losses
from benchmarks.gpu_bundle import closure, packed_name, project_requirements, repack, unsatisfied, write
from benchmarks.gpu_packages import Bundle, BundleError, choose_packages, missing_packages
from benchmarks.gpu_report import RIVAL_GRAPH, TARGET_NATS, Report, marks, time_to_target
from benchmarks.gpu_run import RUN_ID_ENV_VAR, Outcome, facts_of_tests, prepared, read_json_lines, run_process
from benchmarks.transformer import QUICK, Transformer, learning_rate_at

pytestmark = pytest.mark.slow

PYTHON = ".".join(platform.python_version_tuple()[:2])
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def write_bundle(path: Path, files: dict[str, bytes], **changes: object) -> Path:
    """A bundle of these files with a correct manifest, but for the changes."""
    sums = {name: sha256(content).hexdigest() for name, content in files.items()}
    manifest = {"python": PYTHON, "requires": [], "packages": {}, "sha256": sums} | changes
    write({"manifest.json": json.dumps(manifest).encode(), **files}, path)
    return path


def write_wheel(path: Path, files: dict[str, str], executable: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o755 if name == executable else 0o644) << 16
            wheel.writestr(entry, text)
    return path


def test_closure_of_project_is_complete_without_torch() -> None:
    packages = closure(project_requirements(), "3.12")
    assert unsatisfied(packages) == []
    assert {"ray", "pyarrow", "pytest", "hypothesis", "tensorboardx", "msgpack"} <= packages.keys()
    assert not {"torch", "sympy", "optuna", "sqlalchemy"} & packages.keys()


def test_unsatisfied_names_what_a_package_lacks() -> None:
    packages = closure(project_requirements(), "3.12")
    packages["numpy"].version = "1.0"
    del packages["yarl"]
    problems = unsatisfied(packages)
    assert any(line.startswith("numpy") for line in problems)
    assert any(line.startswith("yarl") for line in problems)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ray/train/__init__.py", "ray/train/__init__.py"),
        ("ray/rllib/algorithms/ppo.py", None),
        ("ray/dashboard/client/build/index.html", None),
        ("ray/dashboard/agent.py", "ray/dashboard/agent.py"),
        ("pyarrow/libarrow.so.2600", "pyarrow/libarrow.so.2600"),
        ("pyarrow/libarrow_flight.so.2600", None),
        ("pyarrow/libarrow_python.so", None),
        ("pyarrow/libarrow_python.so.2600", "pyarrow/libarrow_python.so.2600"),
        ("pyarrow/include/arrow/api.h", None),
        ("numpy/_core/tests/test_api.py", None),
        ("numpy/testing/__init__.py", "numpy/testing/__init__.py"),
        ("thing-1.data/purelib/thing/__init__.py", "thing/__init__.py"),
        ("thing-1.data/scripts/thing", None),
        ("thing/", None),
    ],
)
def test_packed_name_leaves_out_what_nothing_imports(path: str, expected: str | None) -> None:
    assert packed_name(path) == expected


def test_unpacked_package_has_the_wheels_files_and_modes(tmp_path: Path) -> None:
    files = {"thing/__init__.py": "x = 1\n", "thing/server": "binary", "thing/tests/test_x.py": ""}
    archive = repack(write_wheel(tmp_path / "thing-1-py3-none-any.whl", files, "thing/server"))
    bundle = Bundle(write_bundle(tmp_path / "bundle.tar", {"packages/thing.tar.xz": archive}))
    bundle.unpack_package("thing", tmp_path / "site")
    assert (tmp_path / "site/thing/__init__.py").read_text() == "x = 1\n"
    assert os.access(tmp_path / "site/thing/server", os.X_OK)
    assert not os.access(tmp_path / "site/thing/__init__.py", os.X_OK)
    assert not (tmp_path / "site/thing/tests").exists()


@pytest.mark.parametrize("name", ["../outside.py", "/tmp/lanes-outside.py", "thing/../../outside.py"])
def test_unpack_of_package_with_path_outside_its_folder_writes_nothing_there(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    path = write_bundle(tmp_path / "bundle.tar", {"packages/thing.tar.xz": lzma.compress(buffer.getvalue())})
    with contextlib.suppress(BundleError):
        Bundle(path).unpack_package("thing", tmp_path / "site")
    assert not (tmp_path / "outside.py").exists()
    assert not Path("/tmp/lanes-outside.py").exists()


def test_unpack_of_altered_package_is_refused(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle.tar", {"packages/thing.tar.xz": lzma.compress(b"")}, sha256={})
    with pytest.raises(BundleError, match="checksum"):
        Bundle(path).read("packages/thing.tar.xz")


@pytest.mark.parametrize("manifest", [b"{}", b"[]", b"{"])
def test_bundle_with_damaged_manifest_is_refused(tmp_path: Path, manifest: bytes) -> None:
    write({"manifest.json": manifest}, tmp_path / "bundle.tar")
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle(tmp_path / "bundle.tar")


def test_bundle_that_lacks_a_package_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    archive = repack(write_wheel(tmp_path / "thing-1-py3-none-any.whl", {"thing.py": ""}))
    bundle = Bundle(write_bundle(tmp_path / "bundle.tar", {"packages/thing.tar.xz": archive}))
    with pytest.raises(BundleError, match="absent"):
        bundle.unpack_package("absent", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="thing: cannot be unpacked"):
        bundle.unpack_package("thing", tmp_path / "file")


def test_prepared_with_bundle_that_fails_halfway_uses_none_of_it(tmp_path: Path) -> None:
    archive = repack(write_wheel(tmp_path / "a-1-py3-none-any.whl", {"a_of_bundle.py": ""}))
    packages = {name: {"version": "1", "requires": []} for name in ("a-of-bundle", "b-of-bundle")}
    files = {"packages/a-of-bundle.tar.xz": archive, "packages/b-of-bundle.tar.xz": b"damaged"}
    path = write_bundle(tmp_path / "bundle.tar", files, packages=packages)
    with prepared(Namespace(bundle=path, device="cpu", quick=True)) as (session, used):
        assert list(used) == ["not used"] and "b-of-bundle" in used["not used"][0]
        assert not (session.folder / "packages").exists()


@pytest.mark.parametrize(("flag", "problem"), [("--bundle", "no such file"), ("--output", "File exists")])
def test_gpu_run_with_unusable_path_is_one_line(flag: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / ("file" if flag == "--output" else "absent")
    command = [sys.executable, str(ROOT / "scripts/gpu-run"), "--device", "cpu", flag, str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: {flag} {path}: {problem}\n"


@pytest.mark.parametrize("content", [b"", b"not a tar file", b"\0" * 2048])
def test_bundle_that_is_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bundle.tar").write_bytes(content)
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle(tmp_path / "bundle.tar")


def test_bundle_for_another_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"for Python 2\.7"):
        Bundle(write_bundle(tmp_path / "bundle.tar", {}, python="2.7"))


def test_bundle_gives_back_corpora(tmp_path: Path) -> None:
    files = {"corpora/text.txt.xz": lzma.compress(b"some text")}
    Bundle(write_bundle(tmp_path / "bundle.tar", files)).unpack_corpora(tmp_path / "texts")
    assert (tmp_path / "texts/text.txt").read_bytes() == b"some text"


def test_choose_packages_takes_missing_ones_and_those_in_the_wrong_version() -> None:
    packages = {
        "pydantic": {"version": "2.14", "requires": ["pydantic_core==2.50", "numpy>=1"]},
        "pydantic-core": {"version": "2.50", "requires": ["typing-extensions>=4.14"]},
        "typing-extensions": {"version": "4.16", "requires": []},
        "numpy": {"version": "2.4", "requires": []},
        "ray": {"version": "2.60", "requires": ["pandas"]},
    }
    manifest = {"packages": packages, "requires": ["ray>=2.55", "torch>=2.11"]}
    installed = {"pydantic-core": "2.49", "typing-extensions": "4.1", "numpy": "2.5", "ray": "2.40", "torch": "2.11"}
    chosen = choose_packages(manifest, installed.get)
    assert chosen == {"pydantic", "pydantic-core", "typing-extensions", "ray"}
    assert missing_packages(manifest, chosen, installed.get) == ["pandas"]
    assert choose_packages(manifest, lambda name: "99" if name != "pydantic-core" else "2.50") == set()


@pytest.mark.parametrize("new_session", [False, True])
def test_run_process_at_its_limit_ends_its_children(tmp_path: Path, new_session: bool) -> None:
    # Both processes outlive any test, so that only run_process can end them.
    program = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session={new_session})
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
print("started", flush=True)
time.sleep(600)
"""
    outcome = run_process(
        [sys.executable, "-c", program], 3, tmp_path / "log", ENVIRONMENT | {RUN_ID_ENV_VAR: str(tmp_path)}
    )
    assert (outcome.status, outcome.exit_status, outcome.output) == ("timeout", None, "started")
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    deadline = time.monotonic() + 30
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_run_process_that_fails_reports_the_end_of_its_output(tmp_path: Path) -> None:
    program = "print('x\\n' * 100 + 'last'); raise SystemExit(3)"
    outcome = run_process([sys.executable, "-c", program], 60, tmp_path / "log", ENVIRONMENT)
    assert (outcome.status, outcome.exit_status) == ("failed", 3)
    assert outcome.output.splitlines()[-1] == "last"
    assert len(outcome.output.splitlines()) == 30


def test_read_json_lines_of_cut_off_file_gives_the_complete_ones(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_json_lines(tmp_path / "rows") == [{"a": 1}, {"a": 2}]
    assert read_json_lines(tmp_path / "absent") == []


def test_results_plugin_writes_the_outcome_of_each_test(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='needs CUDA')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no')\n"
        "def test_broken(broken): pass\n"
    )
    (tmp_path / "test_other.py").write_text("import absent_module\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(tmp_path),
        "-p",
        "benchmarks.pytest_results",
        "-p",
        "no:cacheprovider",
    ]
    environment = ENVIRONMENT | {"TEST_RESULTS_FILE": str(tmp_path / "rows")}
    command += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), "-c", os.devnull]
    subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL)
    rows = {row["name"].split("::")[-1]: row for row in read_json_lines(tmp_path / "rows")}
    outcomes = {name: row["outcome"] for name, row in rows.items()}
    assert outcomes == {
        "test_other.py": "error", "test_good": "passed", "test_bad": "failed", "test_skipped": "skipped",
        "test_broken": "failed",
    }  # fmt: skip
    assert "assert 1 == 2" in rows["test_bad"]["reason"]
    assert "needs CUDA" in rows["test_skipped"]["reason"]
    assert "absent_module" in rows["test_other.py"]["reason"]


def row(name: str, outcome: str, reason: str = "") -> dict[str, Any]:
    return {"name": name, "outcome": outcome, "seconds": 0.1, "reason": reason}


def test_tests_facts_without_ray_lists_its_files_as_not_run() -> None:
    rows = [row("a", "passed"), row("tests/b.py", "error", "ModuleNotFoundError: No module named 'ray'")]
    failed = Outcome("failed", 1, 2.0, "…")
    facts = facts_of_tests(failed, rows, ["cluster"], has_ray=False)
    assert (facts["status"], facts["passed"], facts["error"]) == ("ok", 1, 0)
    assert facts["results"][1]["outcome"] == "not run"
    assert facts["not_run"] == ["tests marked cluster: Ray is missing"]
    assert facts_of_tests(failed, [*rows, row("c", "failed")], ["cluster"], has_ray=False)["status"] == "failed"
    assert facts_of_tests(failed, rows, [], has_ray=True)["status"] == "failed"


DESCRIBED = {"device": {"type": "cuda", "name": "H"}, "versions": {"torch": "2.11.0", "driver": None}}
PACKAGES: dict[str, Any] = {"unpacked": ["ray"], "missing": []}


def test_report_is_complete_after_each_part_and_fails_with_one(tmp_path: Path) -> None:
    report = Report(tmp_path, False, PACKAGES, DESCRIBED)
    report.add("smoke", {"status": "ok", "exit_status": 0, "seconds": 1.0})
    assert report.exit_status == 0
    report.add(
        "tests", facts_of_tests(Outcome("timeout", None, 9.0, "cut | off"), [row("t", "failed", "why")], [], True)
    )
    facts = json.loads((tmp_path / "gpu-report.json").read_text())
    assert (facts["complete"], facts["tests"]["failed"], facts["versions"]["torch"]) == (False, 1, "2.11.0")
    assert "not complete" in (tmp_path / "gpu-report.md").read_text()
    report.finish()
    assert report.exit_status == 1
    text = (tmp_path / "gpu-report.md").read_text()
    assert "cut | off" in text and "| t | failed | why |" in text and "not complete" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-report.json", "gpu-report.md"]


def case(
    cell: str, units: int, lanes: int, fp16: float, bf16: float, share: float, packed: bool = True
) -> dict[str, Any]:
    ratios = {name: {"median": r, "low": r, "high": r} for name, r in (("plain fp16", fp16), ("plain bf16", bf16))}
    variants = {"plain fp16": {"packed": packed}, "ours, CUDA graph": {"share": share}}
    return {"cell": cell, "units": units, "lanes": lanes, "ratios": ratios, "variants": variants}


def results_of(report: dict[str, Any]) -> list[str]:
    return [row["result"] for row in marks({"quick": False, **DESCRIBED, **report})]


def test_marks_without_measurements_are_not_measured() -> None:
    assert set(results_of({})) == {"not measured"}
    cases = {"benchmarks": {"cases": [case("rnn", 256, 32, 4, 9, 0.6)]}}
    assert set(results_of(cases | {"device": {"type": "cpu"}})) == {"not measured"}
    assert set(results_of(cases | {"quick": True})) == {"not measured"}


def test_marks_of_benchmarks_compare_with_the_fastest_plain_modules() -> None:
    cases = [
        case("rnn", 256, 32, 3.1, 9, 0.1),
        case("gru", 256, 32, 2.9, 9, 0.1),
        case("lstm", 4096, 512, 1.1, 3, 0.49),
    ]
    expected = ["reached", "not reached", "not measured", "reached", "not reached", "not measured"]
    assert results_of({"benchmarks": {"cases": cases}}) == expected
    captured = case("rnn", 256, 32, 3.1, 9, 0.1)
    captured["ratios"]["plain fp16, CUDA graph"] = {"median": 1.5, "low": 1.0, "high": 2.0}
    assert results_of({"benchmarks": {"cases": [captured]}})[0] == "reached"
    cases[0]["variants"]["ours, CUDA graph"]["agrees"] = cases[2]["variants"]["ours, CUDA graph"]["agrees"] = False
    expected = ["not reached", "not reached", "not measured", "not reached", "not reached", "not measured"]
    assert results_of({"benchmarks": {"cases": cases}}) == expected
    unpacked = [case("lstm", 4096, 512, 1.1, 3, 0.6, packed=False)]
    assert results_of({"benchmarks": {"cases": unpacked}})[3:5] == ["not measured", "reached"]


def losses(*pairs: tuple[float, float], evaluation_seconds: float = 0.0) -> list[dict[str, Any]]:
    return [{"step": 1, "seconds": s, "nats": n, "evaluation_seconds": evaluation_seconds} for s, n in pairs]


def training(ours: float | None, rival: list[dict[str, Any]], status: str = "ok") -> str:
    own = {"status": "ok", "seconds": 50.0, "seconds_to_target": ours}
    transformer = {
        "status": status, "seconds": 100.0, "validation": rival, "seconds_to_target": time_to_target(rival)
    }  # fmt: skip
    return results_of({"training": own, "transformer": transformer})[-1]


def test_mark_of_training_compares_times_to_the_target() -> None:
    slow, fast = losses((20, 2.0), (60, TARGET_NATS)), losses((30, 1.4))
    assert training(40.0, slow) == "reached"
    assert training(40.0, fast) == "not reached"
    assert training(None, slow) == "not reached"
    assert training(40.0, losses((60, TARGET_NATS), evaluation_seconds=25)) == "not reached"
    assert training(40.0, losses((60, 1.5))) == "reached"
    assert training(40.0, losses((30, 1.5)), "timeout") == "reached"
    assert training(100.0, losses((30, 1.5)), "timeout") == "not measured"
    assert training(90.0, losses((30, 1.5), evaluation_seconds=20), "timeout") == "not measured"
    assert training(40.0, [], "failed") == "not measured"


def test_gpu_run_without_a_gpu_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/gpu-run"), "--output", str(tmp_path / "report")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: torch finds no GPU") and ended.stderr.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_benchmarked_variants_have_the_same_first_losses_only_if_they_learn(
    cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, cpu = SkewedShapes(cell, 8, 20, 32, 28), torch.device("cpu")
    reference = reference_losses(shapes, cpu)
    assert prepare(EAGER, shapes, cpu, reference).facts["agrees"]
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    untrained = reference_losses(shapes, cpu)
    assert not prepare(REFERENCE, shapes, cpu, reference).facts["agrees"]
    assert untrained[0] == reference[0]


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_captured_plain_step_has_the_losses_of_the_plain_loop(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        loss = torch.zeros(())  # like a graph's memory, overwritten by each replay
        return loss, lambda: loss.copy_(step())

    monkeypatch.setattr("benchmarks.gpu.capture_graph", capture)
    monkeypatch.setitem(DTYPES, RIVAL_GRAPH, torch.float32)
    shapes, cpu = SkewedShapes(cell, 2, 4, 16, 28), torch.device("cpu")
    plain, captured = (plain_variant(name, shapes, cpu).losses for name in (REFERENCE, RIVAL_GRAPH))
    for _ in range(205):  # beyond an epoch of 199 windows
        assert next(captured) == pytest.approx(next(plain), rel=1e-6)


def test_transformer_does_not_see_later_characters() -> None:
    torch.manual_seed(0)
    model = Transformer(QUICK, 11).eval()
    tokens = torch.randint(11, (2, QUICK.context))
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 11
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


def test_learning_rate_of_transformer_rises_and_falls_to_a_tenth() -> None:
    rates = [learning_rate_at(step, QUICK) for step in range(QUICK.steps + 1)]
    assert rates[0] < rates[1] < rates[QUICK.warmup_steps] == max(rates) == QUICK.learning_rate
    assert rates[-1] == pytest.approx(QUICK.learning_rate / 10)
