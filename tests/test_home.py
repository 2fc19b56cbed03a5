"""Caches and libraries without a home folder that can be written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from job.paths import cache_folder, cache_notice

pytestmark = pytest.mark.slow

WITHOUT_PASSWD_ENTRY = """
import pwd, runpy, sys
def getpwuid(uid): raise KeyError(uid)
pwd.getpwuid = getpwuid
import job.cluster.launcher
runpy.run_module("job", run_name="__main__")
"""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that takes the place of the home folder's cache."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"lanes-{os.geteuid()}"


def train(tmp_path: Path, home: str | None) -> subprocess.CompletedProcess[str]:
    corpus = tmp_path / "text.txt"
    corpus.write_text("a rose is a rose is a rose " * 40)
    environment = {name: text for name, text in os.environ.items() if name not in ("HOME", "LOGNAME", "USER")}
    environment |= {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": "", "PYTHONPATH": str(ROOT), "LANES_KERNEL": "off"}
    environment |= {} if home is None else {"HOME": home}
    flags = {
        "corpus.source": str(corpus), "run.storage": str(tmp_path / "runs"), "scale.workers": "0",
        "stream.batch_size": "4", "stream.num_steps": "8", "model.hidden_size": "8", "train.epochs": "1",
        "optimizer.name": "adamw",
    }  # fmt: skip
    command = [
        sys.executable,
        "-c",
        WITHOUT_PASSWD_ENTRY,
        "train",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("home", [None, "/dev/null", "/dev/null/home"])
def test_train_without_writable_home_finishes_with_a_notice(tmp_path: Path, home: str | None) -> None:
    done = train(tmp_path, home)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"caches are in {tmp_path}/lanes-{os.geteuid()}") == 1
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(("name", "notices"), [(".config", 0), (".cache", 1)])
def test_train_without_writable_folder_in_home_prints_no_other_warning(tmp_path: Path, name: str, notices: int) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / name).touch()  # instead of a folder of another user, which root could write
    done = train(tmp_path, str(home))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("caches are in") == notices


def test_cache_folder_prefers_xdg_then_home(monkeypatch: pytest.MonkeyPatch, temporary: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_folder() == tmp_path / "me" / ".cache" / "lanes"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lanes"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert cache_folder() == tmp_path / "me" / ".cache" / "lanes"
    assert cache_notice() == ""


def test_cache_folder_without_home_is_private(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    assert cache_folder() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert str(temporary) in cache_notice()


@pytest.mark.parametrize("prepare", [lambda path: path.mkdir() or path.chmod(0o777), lambda path: path.symlink_to("/")])
def test_cache_folder_that_others_control_is_refused(
    monkeypatch: pytest.MonkeyPatch, temporary: Path, prepare: Callable[..., Any]
) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    prepare(temporary)
    with pytest.raises(PermissionError, match="others may write it"):
        cache_folder()
