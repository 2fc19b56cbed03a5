"""Rules of this test suite that CI relies on: which tests are left out where, and how many may be skipped."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Path:
    """A checkout with this project's conftest, settings and three tests, in a folder of its own."""
    tests = pytester.mkdir("checkout") / "tests"
    tests.mkdir()
    (tests.parent / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tests / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tests / "test_it.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.cluster\ndef test_last(): pass\n\n"
        "@pytest.mark.shared\ndef test_with_shared(): pass\n\n"
        "def test_first(): pass\n\n"
        "@pytest.mark.skip(reason='why not')\ndef test_skipped(): pass\n"
    )
    pytester.chdir()
    return tests


def collected(pytester: pytest.Pytester, tests: Path) -> tuple[list[str], str]:
    """The names of the tests that pytest would run, and its exit status and summary."""
    collection = pytester.runpytest_subprocess("--collect-only", f"--rootdir={tests.parent}", str(tests))
    names = [line.rpartition("::")[2] for line in collection.outlines if "::" in line]
    return names, collection.stdout.str()


def test_collection_without_shared_folder_deselects_marked_tests(pytester: pytest.Pytester, suite: Path) -> None:
    names, summary = collected(pytester, suite)
    assert names == ["test_first", "test_skipped", "test_last"]
    assert "1 deselected" in summary


def test_collection_with_shared_folder_keeps_marked_tests(pytester: pytest.Pytester, suite: Path) -> None:
    (suite.parent.parent / "shared").mkdir()
    names, summary = collected(pytester, suite)
    assert names == ["test_with_shared", "test_first", "test_skipped", "test_last"]
    assert "deselected" not in summary


def test_skip_that_is_not_allowed_fails_session(pytester: pytest.Pytester, suite: Path) -> None:
    flags = ["--allowed-skips", str(suite / "skips.txt"), f"--rootdir={suite.parent}", "-m", "not cluster"]
    arguments = [*flags, str(suite)]
    (suite / "skips.txt").write_text("# a comment\n")
    session = pytester.runpytest_subprocess("--numprocesses=2", *arguments)
    assert session.ret == pytest.ExitCode.TESTS_FAILED
    session.stdout.fnmatch_lines(["*skipped tests/test_it.py::test_skipped: Skipped: why not"])
    (suite / "skips.txt").write_text("tests/test_it.py::test_skipped  # why not\n")
    session = pytester.runpytest_subprocess("--time-table", *arguments)
    assert session.ret == pytest.ExitCode.OK
    session.stdout.fnmatch_lines(["| file | tests | seconds |", "| `tests/test_it.py` | 1 | *"])


def test_allowed_skips_name_existing_tests_and_allowed_reasons() -> None:
    reasons = ("needs a GPU", "needs privileges")
    for line in (ROOT / ".ci" / "skips.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            test, _, reason = line.partition("#")
            path, _, name = test.strip().partition("::")
            assert reason.strip() in reasons, line
            assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), line


def test_tests_with_same_module_fixture_run_in_one_process(pytester: pytest.Pytester, suite: Path) -> None:
    (suite / "test_it.py").write_text(
        "import pytest\n\n"
        f"@pytest.fixture(scope='module')\ndef shared(): open({str(suite / 'set-ups')!r}, 'a').write('one ')\n\n"
        "@pytest.mark.parametrize('number', range(6))\ndef test_with_fixture(shared, number): pass\n\n"
        "@pytest.mark.parametrize('number', range(6))\ndef test_without_fixture(number): pass\n"
    )
    arguments = ["--numprocesses=2", "--dist=loadgroup", f"--rootdir={suite.parent}", str(suite)]
    assert pytester.runpytest_subprocess(*arguments).ret == pytest.ExitCode.OK
    assert (suite / "set-ups").read_text() == "one "


def test_words_check_reports_replaced_word_with_its_line(tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text("A worker starts again.\nThe driver is TOLD; `refuse_if_alive` runs.\nA story is tolden.\n")
    check = subprocess.run(
        [sys.executable, ROOT / ".ci" / "words.py", text], capture_output=True, text=True, check=False
    )
    assert check.returncode == 1
    assert check.stdout.splitlines() == [
        f"{text}:2: 'TOLD'; use: reported",
        f"{text}:2: 'refuse_if_alive'; use: check_ or raise_if_",
    ]
    text.write_text("A worker starts again.\n")
    subprocess.run([sys.executable, ROOT / ".ci" / "words.py", text], check=True)
