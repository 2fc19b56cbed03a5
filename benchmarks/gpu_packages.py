"""Unpacks what this machine lacks from a bundle of ``scripts/gpu-bundle``. Imports nothing that may be missing."""

import importlib
import io
import json
import lzma
import platform
import re
import sys
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class BundleError(Exception):
    """The bundle cannot be used on this machine; the message says why."""


@contextmanager
def described(problem: str) -> Iterator[None]:
    """Raises BundleError, with the problem and its reason, for what a bundle that is damaged or a full disk raises."""
    try:
        yield
    except (OSError, EOFError, LookupError, TypeError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
        raise BundleError(f"{problem}: {type(error).__name__}: {error}") from None


class Bundle:
    """A bundle that is open for reading."""

    def __init__(self, path: Path) -> None:
        with described(f"{path}: not a bundle of scripts/gpu-bundle"):
            self.archive = tarfile.open(path)  # noqa: SIM115 - until the program ends
            self.manifest: dict[str, Any] = json.loads(self._content(MANIFEST))
            python, *_ = (self.manifest[name] for name in ("python", "sha256", "packages", "requires"))
        if python != ".".join(platform.python_version_tuple()[:2]):
            raise BundleError(f"{path}: for Python {python}, this is {platform.python_version()}")

    def _content(self, name: str) -> bytes:
        member = self.archive.extractfile(name)
        if member is None:
            raise KeyError(name)
        return member.read()

    def read(self, name: str) -> bytes:
        """A file of the bundle, decompressed. Raises BundleError if its checksum differs from the manifest's."""
        with described(f"{name}: cannot be read from the bundle"):
            content = self._content(name)
            if sha256(content).hexdigest() != self.manifest["sha256"].get(name):
                raise BundleError(f"{name}: differs from its checksum in the bundle's manifest")
            return lzma.decompress(content)

    def unpack_package(self, name: str, folder: Path) -> None:
        """Extracts a package; a member that would be written elsewhere is an error."""
        content = io.BytesIO(self.read(f"packages/{name}.tar.xz"))
        with described(f"{name}: cannot be unpacked"), tarfile.open(fileobj=content) as package:
            package.extractall(folder, filter="data")

    def unpack_corpora(self, folder: Path) -> None:
        """Writes the corpora into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.manifest["sha256"]:
            if name.startswith("corpora/"):
                text = self.read(name)
                with described(f"{name}: cannot be unpacked"):
                    (folder / Path(name).name).with_suffix("").write_bytes(text)


def installed_version(name: str) -> str | None:
    """The version of an installed package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def choose_packages(manifest: dict[str, Any], installed: Callable[[str], str | None]) -> set[str]:
    """The packages of the bundle that are not installed, or in a version that the others cannot use."""
    packages = manifest["packages"]
    chosen = {name for name in packages if installed(name) is None}
    while more := {name for name in _unmet(manifest, chosen, installed) if name in packages and name not in chosen}:
        chosen |= more
    return chosen


def missing_packages(
    manifest: dict[str, Any], chosen: Collection[str], installed: Callable[[str], str | None]
) -> list[str]:
    """What is needed and neither in the bundle nor installed, such as numpy."""
    return sorted(name for name in _unmet(manifest, chosen, installed) if name not in manifest["packages"])


def _unmet(manifest: dict[str, Any], chosen: Collection[str], installed: Callable[[str], str | None]) -> set[str]:
    """Names of packages whose installed version does not meet the project's or a chosen package's requirement."""
    requirement_class = importlib.import_module("packaging.requirements").Requirement
    lines = manifest["requires"] + [line for name in chosen for line in manifest["packages"][name]["requires"]]
    names = set()
    for requirement in map(requirement_class, lines):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        found = manifest["packages"][name]["version"] if name in chosen else installed(name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            names.add(name)
    return names


def unpack(bundle: Bundle, folder: Path) -> dict[str, list[str]]:
    """Unpacks what is needed into the folder; returns names of unpacked and of missing packages."""
    if installed_version("packaging") is None:
        bundle.unpack_package("packaging", folder)
        sys.path.insert(0, str(folder))
    chosen = choose_packages(bundle.manifest, installed_version)
    for name in sorted(chosen):
        bundle.unpack_package(name, folder)
    return {"unpacked": sorted(chosen), "missing": missing_packages(bundle.manifest, chosen, installed_version)}
