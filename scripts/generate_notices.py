"""Writes the table of dependencies in ``THIRD_PARTY_NOTICES.md`` from pyproject.toml and the installed packages."""

import tomllib
from importlib.metadata import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
NOTICES = ROOT / "THIRD_PARTY_NOTICES.md"
BEGIN, END = "<!-- begin of the generated table -->\n", "<!-- end of the generated table -->\n"


def dependencies() -> list[str]:
    """Returns the names of the direct dependencies that are installed to use this package, also the optional ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = [
        *project["dependencies"],
        *(line for name in extras if name not in ("dev", "docs") for line in extras[name]),
    ]
    return sorted({Requirement(line).name for line in used}, key=str.lower)


def field_of(package: str, name: str) -> str:
    """Returns a field of a package's metadata; empty if there is none, also if importlib_metadata reads them."""
    return (metadata(package).get_all(name) or [""])[0]


def license_of(package: str) -> str:
    """Returns what a package's metadata call its licence."""
    fields = metadata(package)
    classifiers = [line.rpartition(" :: ")[2] for line in fields.get_all("Classifier") or [] if "License ::" in line]
    expression = field_of(package, "License-Expression")
    return expression or " and ".join(classifiers) or field_of(package, "License").splitlines()[0]


def home_page_of(package: str) -> str:
    """Returns a package's home page."""
    fields = metadata(package)
    pages = dict(line.split(", ", 1) for line in fields.get_all("Project-URL") or [])
    named = {name.lower(): url for name, url in pages.items()}
    return field_of(package, "Home-page") or named.get("homepage") or named["source"]


def table() -> str:
    """Returns the table as Markdown."""
    rows = [f"| [{name}]({home_page_of(name)}) | {license_of(name)} |" for name in dependencies()]
    return "\n".join(["| package | licence |", "| --- | --- |", *rows]) + "\n"


if __name__ == "__main__":
    before, _, rest = NOTICES.read_text().partition(BEGIN)
    NOTICES.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
