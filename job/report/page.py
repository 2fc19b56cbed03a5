"""The page of a report: one HTML file with its style, scripts and data, which loads nothing and runs nothing else."""

import base64
import gzip
import hashlib
import json
from functools import cache
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from job.console import finite_values
from job.errors import UserError

PACKAGE = "plotly"  # whose installed files contain plotly.js
_LIBRARY_FILE = "package_data/plotly.min.js"
_COMPRESSION_LEVEL = 6  # 9 takes longer and saves 0.2%


class NoLibrary(UserError):
    """The package with the plotting library is not installed."""


def check_library() -> None:
    """Raises NoLibrary if the package with the plotting library is not installed."""
    if not find_spec(PACKAGE):
        raise NoLibrary("report: the plotting library is not installed", "pip install 'lanes[report]'")


def render_page(report: dict[str, Any]) -> bytes:
    """Returns a report as an HTML file.

    All that is shown is text of the JSON data, which the script inserts as text. The policy of the page allows two
    scripts by their digests, and no requests.

    Args:
        report: a value of JSON with a ``title``; numbers that are not finite become null
    """
    library, digest = _library()
    script = _own_file("report.js")
    return (
        Template(_own_file("report.html"))
        .substitute(
            title=escape(report["title"]),
            script_hashes=f"'sha256-{_digest(script.encode())}' 'sha256-{digest}'",
            style=_own_file("report.css"),
            script=script,
            library=library,
            data=json.dumps(finite_values(report), ensure_ascii=False).replace("<", "\\u003c"),
        )
        .encode(errors="replace")
    )


@cache
def _library() -> tuple[str, str]:
    """Returns plotly.js, compressed, in base64, and the digest of its text."""
    check_library()
    spec = find_spec(PACKAGE)  # the package is not imported: that takes longer than all the rest
    assert spec
    assert spec.submodule_search_locations
    script = Path(spec.submodule_search_locations[0], _LIBRARY_FILE).read_bytes()
    compressed = gzip.compress(script, _COMPRESSION_LEVEL, mtime=0)
    return base64.b64encode(compressed).decode(), _digest(script)


def _digest(script: bytes) -> str:
    return base64.b64encode(hashlib.sha256(script).digest()).decode()


def _own_file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
