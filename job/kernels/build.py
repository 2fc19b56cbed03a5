"""The kernels in C, built once a machine by its own compiler and loaded by ctypes; or done without.

Without a compiler, or where anything at all goes wrong, ``library()`` is None and ``why_not()`` tells.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread")
KERNEL_ENV_VAR = "LANES_KERNEL"  # set to "off", nothing is built or loaded
BUILD_TIMEOUT_S = 60.0


class KernelUnavailable(Exception):
    """Why the kernels are done without."""


def load_library() -> ctypes.CDLL | None:
    """The kernels, None where they cannot be had; the first call of a machine builds them in seconds."""
    return _found()[0]


def unavailable_reason() -> str | None:
    """Why ``library()`` is None; None where it is not."""
    return _found()[1]


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return _loaded(), None
    except (OSError, subprocess.SubprocessError, KernelUnavailable) as error:
        return None, str(error)


def _loaded() -> ctypes.CDLL:
    if os.environ.get(KERNEL_ENV_VAR) == "off":
        raise KernelUnavailable(f"{KERNEL_ENV_VAR} is off")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise KernelUnavailable("there is no C compiler")
    # A folder of its own: texts are cached beside it, in one that others may be allowed to write.
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lanes" / "kernels"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_owner(folder)
    path = folder / f"kernels-{_cache_key(compiler)}.so"
    if not path.exists():
        _build(compiler, path)
    _check_owner(path)
    return ctypes.CDLL(str(path))


def _check_owner(path: Path) -> None:
    """Code that others could have written is not run."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise KernelUnavailable(f"{path} is another user's, or others may write it")


def _cache_key(compiler: str) -> str:
    """All that the compiled file depends on."""
    real = Path(compiler).resolve()
    found = real.stat()
    metadata = [str(real), found.st_size, found.st_mtime_ns, FLAGS, platform.machine(), _processor()]
    texts = b"".join(source.read_bytes() for source in SOURCES)
    return hashlib.sha256(texts + repr(metadata).encode()).hexdigest()[:24]


def _processor() -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))})


def _build(compiler: str, path: Path) -> None:
    """Makes the file under another name and renames it: workers may race, and each finds it whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, *map(str, SOURCES), "-lm", "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)  # noqa: S603
        if done.returncode:
            raise KernelUnavailable(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        made.chmod(0o700)
        made.rename(path)
