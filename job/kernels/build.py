"""Compiles the C kernels once per machine with its own compiler, and loads them.

If there is no compiler, or if anything else fails, ``load_library()`` returns None and ``unavailable_reason()``
the reason; torch's operators are used instead.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from job.kernels.abi import declare_functions, mismatched_struct
from job.paths import cache_folder, is_private

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread")
WITHOUT_AMX = ("-mno-amx-bf16", "-mno-amx-tile")
KERNEL_ENV_VAR = "LANES_KERNEL"  # "off": nothing is compiled or loaded; "no-amx": AMX is not used
BUILD_TIMEOUT_S = 60.0


class KernelUnavailable(Exception):
    """The reason why the kernels cannot be used."""


def load_library() -> ctypes.CDLL | None:
    """Returns the kernels, or None if they are unavailable. The first call compiles them, which takes seconds."""
    return _load_or_explain()[0]


def unavailable_reason() -> str | None:
    """Returns why ``load_library()`` returns None, or None if it does not."""
    return _load_or_explain()[1]


@functools.cache
def _load_or_explain() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return _load(), None
    except (OSError, subprocess.SubprocessError, KernelUnavailable) as error:
        return None, str(error)


def _load() -> ctypes.CDLL:
    """Loads the library for what the processor and the system permit. Raises if it is unavailable."""
    mode = os.environ.get(KERNEL_ENV_VAR, "")
    if mode == "off":
        raise KernelUnavailable(f"{KERNEL_ENV_VAR} is off")
    if mode not in ("", "no-amx"):
        raise KernelUnavailable(f"{KERNEL_ENV_VAR} is {mode!r}, which is neither off nor no-amx")
    if mode != "no-amx":
        library = _load_compiled(FLAGS)
        if library.request_amx():
            return library
    without_amx = WITHOUT_AMX if platform.machine() in ("x86_64", "AMD64") else ()
    return _load_compiled(FLAGS + without_amx)


def _load_compiled(flags: tuple[str, ...]) -> ctypes.CDLL:
    """Loads the library compiled with these flags; compiles it first if it is not cached."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise KernelUnavailable("there is no C compiler")
    # A private folder: the downloaded texts are cached in its parent, which others may be allowed to write.
    folder = cache_folder() / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_owner(folder)
    path = folder / f"kernels-{_cache_key(compiler, flags)}.so"
    if not path.exists():
        _build(compiler, flags, path)
    _check_owner(path)
    library = ctypes.CDLL(str(path))
    declare_functions(library)
    if struct := mismatched_struct(library):
        raise KernelUnavailable(f"{path}: {struct} has another size than in api.h")
    return library


def _check_owner(path: Path) -> None:
    """Raises KernelUnavailable if another user could have written the code."""
    if not is_private(path):
        raise KernelUnavailable(f"{path} belongs to another user, or others may write it")


def _cache_key(compiler: str, flags: tuple[str, ...]) -> str:
    """Returns a hash of everything that the compiled file depends on."""
    executable = Path(compiler).resolve()
    status = executable.stat()
    metadata = [str(executable), status.st_size, status.st_mtime_ns, flags, platform.machine(), _cpu_features()]
    texts = b"".join(source.read_bytes() for source in SOURCES)
    return hashlib.sha256(texts + repr(metadata).encode()).hexdigest()[:24]


def _cpu_features() -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU"))})


def _build(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compiles to a temporary name and renames the file, so that concurrent workers never load an incomplete one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / path.name
        command = [compiler, *flags, *(str(path) for path in SOURCES if path.suffix == ".c"), "-lm", "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)  # noqa: S603
        if done.returncode:
            raise KernelUnavailable(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        output.chmod(0o700)
        output.rename(path)
