"""Packs the packages that a GPU machine without a network may lack: ``scripts/gpu-bundle [--output FILE]``.

The bundle is a tar file with ``manifest.json``, an archive of each package, and the corpora of ``../shared`` if there
are any. Packages are those that ``job`` and its GPU tests need, in the versions of this environment; wheels are
downloaded for the other machine's Python. ``scripts/gpu-run`` unpacks those that it does not find installed.
"""

import argparse
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / ".gpu-bundle" / "bundle.tar"
MANIFEST = "manifest.json"
MAX_BYTES = 60 << 20  # 64 MiB are a usual limit of a transfer, which the checkout shares
TEST_PACKAGES = ("packaging", "pytest", "pytest-xdist", "hypothesis", "safetensors", "setuptools")
# Torch, which the other machine has, and what no run imports: it is for Ray's dashboard and its client, for workers
# with packages of their own, for Google's cloud, and for searches by Optuna.
NOT_NEEDED = {
    "torch", "setuptools", "grpcio", "py-spy", "virtualenv", "smart-open", "cryptography", "pyasn1-modules", "optuna",
}  # fmt: skip
# What nearly every machine with torch has, and the bundle has no room for.
EXPECTED = {"pandas", "matplotlib", "pillow", "fonttools", "kiwisolver", "contourpy"}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
# Parts of a wheel that nothing here imports.
UNUSED_PATHS = re.compile(
    r"(.*/)?(tests|include|includes|__pycache__)/.*|.*\.(pyi|pyx|pxd|pxi|h|hpp|hh|a|lib|c|cc|cpp|pyc)"
    r"|ray/(rllib|jars|dashboard/client)/.*"
    r"|pyarrow/(src/.*|lib(arrow_flight|arrow_s3|arrow_python_flight).*|libarrow_python\.so(\.\d+\.\d+\.\d+)?)"
    r"|pyarrow/_(flight|s3fs|gcsfs|azurefs|hdfs|orc|dataset_orc|substrait|pyarrow_cpp_tests)\..*"
    r"|[^/]+\.data/(scripts|headers|data)/.*"
)
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9}]


@dataclass
class Package:
    """A package of the bundle, or one that is expected on the other machine."""

    name: str
    version: str
    extras: set[str] = field(default_factory=set)
    requires: list[str] = field(default_factory=list)  # on the other machine


def marker_environment(python: str) -> dict[str, str]:
    """The values of a requirement's markers on a Linux machine with that version of CPython."""
    return {
        "python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0",
        "implementation_name": "cpython", "platform_python_implementation": "CPython", "os_name": "posix",
        "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
        "platform_release": "", "platform_version": "",
    }  # fmt: skip


def project_requirements() -> list[Requirement]:
    """What ``job`` and its tests require: the ranges of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dev = (Requirement(line) for line in project["optional-dependencies"]["dev"])
    tests = [requirement for requirement in dev if requirement.name in TEST_PACKAGES]
    return [Requirement(line) for line in project["dependencies"]] + tests + [Requirement("packaging")]


def find_distribution(name: str) -> Distribution:
    """The installed package. Ends the program if it is missing, because the environment is not that of constraints."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        sys.exit(f"error: {name} is not installed in this environment: run make setup")


def closure(requirements: list[Requirement], python: str) -> dict[str, Package]:
    """All packages that are needed, by name, but those of ``NOT_NEEDED``, in the versions of this environment."""
    packages: dict[str, Package] = {}
    environment, waiting = marker_environment(python), list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in NOT_NEEDED or (name in packages and requirement.extras <= packages[name].extras):
            continue
        installed = find_distribution(name)
        package = packages.setdefault(name, Package(name, installed.version))
        package.extras |= requirement.extras
        extras = {"", *package.extras}
        own = [Requirement(line) for line in installed.requires or []]
        own = [r for r in own if not r.marker or any(r.marker.evaluate({**environment, "extra": e}) for e in extras)]
        package.requires = [f"{r.name}{r.specifier}" for r in own if canonicalize_name(r.name) not in NOT_NEEDED]
        waiting += own
    return dict(sorted(packages.items()))


def download(packages: list[Package], python: str, folder: Path) -> dict[str, Path]:
    """Downloads wheels that are not in the folder yet; returns those of all packages by name."""
    wanted = [package for package in packages if not find_wheel(package, folder)]
    if wanted:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        command += ["--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder)]
        subprocess.run(command + [f"{package.name}=={package.version}" for package in wanted], check=True)
    wheels = {package.name: find_wheel(package, folder) for package in packages}
    if missing := [name for name, wheel in wheels.items() if wheel is None]:
        sys.exit(f"error: pip downloaded no wheel of {', '.join(missing)}")
    return {name: wheel for name, wheel in wheels.items() if wheel}


def find_wheel(package: Package, folder: Path) -> Path | None:
    """The package's wheel in the folder."""
    for path in folder.glob("*.whl"):
        name, version, *_ = path.name.split("-")
        if canonicalize_name(name) == package.name and version == package.version:
            return path
    return None


def packed_name(path: str) -> str | None:
    """Where a file of a wheel is put in the packages' folder. None if it is not needed."""
    if path.endswith("/") or UNUSED_PATHS.fullmatch(path):
        return None
    return re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", path)


def repack(wheel: Path) -> bytes:
    """The needed files of a wheel as a compressed tar file, the same for the same wheel."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(wheel) as source, tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry in sorted(source.infolist(), key=lambda entry: entry.filename):
            if name := packed_name(entry.filename):
                member = tarfile.TarInfo(name)
                member.size = entry.file_size
                member.mode = 0o755 if entry.external_attr >> 16 & 0o100 else 0o644
                archive.addfile(member, io.BytesIO(source.read(entry)))
    return lzma.compress(buffer.getbuffer(), filters=FILTERS)


def corpora() -> dict[str, bytes]:
    """The texts of ``../shared/corpora``, compressed, by file name; none if that folder is absent."""
    paths = sorted((ROOT.parent / "shared" / "corpora").glob("*.txt"))
    return {f"{path.name}.xz": lzma.compress(path.read_bytes()) for path in paths}


def pack(packages: dict[str, Package], python: str, folder: Path) -> dict[str, bytes]:
    """The files of the bundle by name, the manifest first."""
    packed = [package for package in packages.values() if package.name not in EXPECTED]
    wheels = download(packed, python, folder)
    with ThreadPoolExecutor(2) as pool:
        archives = dict(zip(wheels, pool.map(repack, wheels.values()), strict=True))
    files = {f"packages/{name}.tar.xz": archive for name, archive in archives.items()}
    files |= {f"corpora/{name}": text for name, text in corpora().items()}
    manifest = {
        "python": python,
        "requires": [f"{r.name}{r.specifier}" for r in project_requirements() if r.name not in NOT_NEEDED],
        "packages": {
            package.name: {
                "version": package.version,
                "requires": package.requires,
                "wheel": wheels[package.name].name,
                "wheel_sha256": sha256(wheels[package.name].read_bytes()).hexdigest(),
            }
            for package in packed
        },
        "expected": {name: packages[name].version for name in sorted(EXPECTED & packages.keys())},
        "sha256": {name: sha256(content).hexdigest() for name, content in files.items()},
    }
    return {MANIFEST: json.dumps(manifest, indent=1).encode(), **files}


def write(files: dict[str, bytes], output: Path) -> int:
    """Writes the bundle; returns its size in bytes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".part")
    with tarfile.open(partial, "w") as bundle:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            bundle.addfile(member, io.BytesIO(content))
    partial.replace(output)
    return output.stat().st_size


def unsatisfied(packages: dict[str, Package]) -> list[str]:
    """Requirements between the packages, and of the project, that the packed versions do not meet."""
    lines = [f"{r.name}{r.specifier}" for r in project_requirements()]
    requirements = {Requirement(line) for line in lines + [line for p in packages.values() for line in p.requires]}
    needed = {r: packages.get(canonicalize_name(r.name)) for r in requirements if r.name not in NOT_NEEDED}
    return sorted(
        str(r) for r, package in needed.items() if not package or not r.specifier.contains(package.version, True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=BUNDLE, metavar="FILE")
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the other machine")
    args = parser.parse_args()
    packages = closure(project_requirements(), args.python)
    if problems := unsatisfied(packages):
        sys.exit(f"error: this environment does not meet {', '.join(problems)}: run make setup")
    folder = ROOT / "build" / f"wheels-{args.python}"  # not next to the bundle, whose folder may be copied as it is
    folder.mkdir(parents=True, exist_ok=True)
    files = pack(packages, args.python, folder)
    size = write(files, args.output)
    for name, content in sorted(files.items(), key=lambda item: -len(item[1]))[:12]:
        print(f"  {name:<40}{len(content) / 2**20:8.2f} MiB")
    print(f"{args.output}: {len(files) - 1} files, {size / 2**20:.1f} MiB; at most {MAX_BYTES >> 20} MiB are allowed")
    print(f"expected on the other machine: torch, {', '.join(sorted(EXPECTED & packages.keys()))}")
    if size > MAX_BYTES:
        sys.exit(f"error: {args.output}: too large")


if __name__ == "__main__":
    main()
