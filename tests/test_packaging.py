"""What is packed for other machines: the wheel, and the working directory of ``ray job submit``."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from job.kernels.build import load_library
from scripts.generate_notices import dependencies, license_of

pytestmark = pytest.mark.slow
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# What a wheel must contain besides metadata, and a submitted job must be sent.
PACKAGE_FILES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "job").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def run(*command: object, **options: Any) -> str:
    """The output of a command that must succeed."""
    finished = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the source distribution of a copy of the tree: no build folder of the checkout takes part."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "job", folder / "tree" / "job", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md"):
        shutil.copy(ROOT / name, folder / "tree")
    # What pip does to build a source distribution, which it has no command for.
    build = "import sys, setuptools.build_meta; setuptools.build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=folder / "tree")
    (source,) = folder.glob("*.tar.gz")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


def test_wheel_contains_all_files_of_package(wheel: Path) -> None:
    """The marker of a typed package and the C sources, too. Its metadata are those of pyproject.toml."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (folder,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
        metadata = archive.read(f"{folder}/METADATA").decode()
    assert {name for name in names if ".dist-info/" not in name} == PACKAGE_FILES
    assert "job/py.typed" in PACKAGE_FILES
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/THIRD_PARTY_NOTICES.md"} <= names
    assert "lanes = job.__main__:run_and_exit" in entry_points
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\nVersion: {project['version']}\n" in metadata


@pytest.mark.skipif(load_library() is None, reason="no kernel on this machine")
def test_installed_wheel_trains_with_compiled_kernel(wheel: Path, prose: Path, tmp_path: Path) -> None:
    """In a virtual environment of its own, which finds only the dependencies in that of the tests."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # With the checkout on its path, pip would find the package there and install nothing.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path, env=env)
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    location = run(python, "-c", "import job; print(job.__file__)", cwd=tmp_path, env=env)
    assert Path(location.strip()).is_relative_to(environment)
    script = environment / "bin" / "lanes"
    arguments = ["--corpus.source", prose, "--corpus.max_tokens", 3000, "--train.epochs", 1, "--scale.workers", 0]
    out = run(script, "train", *arguments, "--generate.prefix", "the", cwd=tmp_path, env=env)
    assert "1 worker on cpu" in out
    assert "without the compiled kernel" not in out
    assert "environment/bin/lanes generate runs/run-1" in " ".join(out.split())
    assert run(script, "--help", cwd=tmp_path, env=env).startswith("usage: lanes VERB ")
    assert run(python, "-m", "job", "--help", cwd=tmp_path, env=env).startswith("usage: python -m job VERB ")
    failed = subprocess.run([script, "evaluate", "runs/run-2"], capture_output=True, text=True, env=env, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)


def test_image_tags_have_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [ROOT / "cluster.yaml", *(ROOT / "clusters").iterdir(), *(ROOT / "docker").iterdir()]
    files += (ROOT / "docs").rglob("*.md")
    tags = [tag for file in files for tag in re.findall(r"lanes:(\d\S*)-[cg]pu", file.read_text())]
    assert len(tags) > 5
    assert set(tags) == {version}


def test_oldest_constraints_are_the_lower_bounds_of_the_dependencies() -> None:
    """The job of CI that installs them tests what pyproject.toml promises."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = map(
        Requirement,
        [
            *project["dependencies"],
            *(
                line
                for name in ("bpe", "export", "hf", "optuna", "serve")
                for line in project["optional-dependencies"][name]
            ),
        ],
    )
    promised = {
        (requirement.name, Version(bound.version))
        for requirement in requirements
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    assert {(name, Version(version)) for name, version in pinned} == promised


def test_third_party_notices_list_the_licence_of_each_dependency() -> None:
    """``make reference`` writes them. The text of a licence's name is that of the installed version."""
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    listed = dict(re.findall(r"^\| \[(\S+)\]\(https://\S+\) \| (.+) \|$", notices, re.MULTILINE))
    assert list(listed) == dependencies()
    assert all(license_of(name) for name in listed)


# --- ray job submit -------------------------------------------------------------------------------------------------


def uploaded(folder: Path, archive: Path) -> set[str]:
    """The files that ``ray job submit --working-dir FOLDER`` uploads, as Ray packs them."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), archive, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(archive) as packed:
        return {name for name in packed.namelist() if not name.endswith("/")}


@pytest.mark.parametrize("has_ignore_files", [True, False])
def test_working_dir_uploads_only_package_code_and_configurations(tmp_path: Path, has_ignore_files: bool) -> None:
    folder = tmp_path / "project"
    needed = {"job/__main__.py", "job/kernels/a.c", "job/kernels/a.h", "job/run/report.html", "job/run/a.json",
              "configs/seed.toml", "my_cells.py", "cells/gated.py"}  # fmt: skip
    others = {".venv/lib/torch.so", ".git/objects/ab", "runs/a/checkpoints/b/manifest.json", "my-text.txt",
              "corpora/book", "model.safetensors", ".mypy_cache/x.py", "tests/test_x.py", "secret.pem", ".env",
              "elsewhere/a/metrics.jsonl", "job/__pycache__/x.pyc", "build/lib/job/x.py", "book.txt.gz"}  # fmt: skip
    for name in needed | others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    if has_ignore_files:
        for name in (".gitignore", ".rayignore"):
            shutil.copy(ROOT / name, folder)
    names = uploaded(folder, tmp_path / "upload.zip")
    assert names == needed if has_ignore_files else names > needed


def test_working_dir_of_this_project_is_complete_and_small(tmp_path: Path) -> None:
    names = uploaded(ROOT, tmp_path / "upload.zip")
    assert PACKAGE_FILES | {"configs/seed.toml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/", "runs/", "."))]
    assert (tmp_path / "upload.zip").stat().st_size < 2**21
