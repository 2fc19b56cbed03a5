"""A pytest plugin that writes one line of JSON per test while the tests run: ``-p benchmarks.pytest_results``.

Unlike a report at the end, it is complete up to the moment at which the tests are killed. The file is named by
``TEST_RESULTS_FILE``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the name of the variable is also read where pytest may be missing
    import pytest

RESULTS_ENV_VAR = "TEST_RESULTS_FILE"
MAX_REASON = 2000  # characters


def _write(name: str, outcome: str, seconds: float, reason: str) -> None:
    with Path(os.environ[RESULTS_ENV_VAR]).open("a") as file:
        line = {"name": name, "outcome": outcome, "seconds": round(seconds, 2), "reason": reason[-MAX_REASON:]}
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes a test's outcome: that of its call, or of a set-up or tear-down that did not pass."""
    if report.when != "call" and report.outcome == "passed":
        return
    is_skip = report.outcome == "skipped" and isinstance(report.longrepr, tuple)
    reason = str(report.longrepr[2]) if is_skip and isinstance(report.longrepr, tuple) else report.longreprtext
    _write(report.nodeid, report.outcome, report.duration, reason)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Writes the error of a file that cannot be imported."""
    if report.failed:
        _write(report.nodeid, "error", 0.0, report.longreprtext)
