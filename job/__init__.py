"""Recurrent language models, trained on Ray: ``job.train`` and ``job.load`` in Python, ``python -m job`` in a shell.

Importing it sets environment variables that torch and other libraries read, and loads nothing else.
"""

import contextlib
import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from job.paths import cache_folder

if TYPE_CHECKING:
    from job.api import Run, load, train
    from job.config.schema import Config
    from job.errors import RunFailed, UserError

__all__ = ["Config", "Run", "RunFailed", "UserError", "load", "train"]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # without it, warnings would appear on standard error

# Both variables are read when torch is imported. By default idle OpenMP threads spin for some milliseconds, which
# is as long as a whole step of configs/seed.toml, on cores that other threads need. Two threads make that
# step 1.2 times as fast as one thread if idle threads sleep, and 0.7 times as fast if they spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Workers of the same machine encode at the same time. Threads would also make the tokenizers library write a warning
# into the output of each process that is forked later.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# cuBLAS is deterministic only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Without a home folder that can be written, matplotlib warns, and torch (for a user without a name) and Ray fail.
# Matplotlib also warns if only the folder of configurations or caches belongs to another user.
_home = os.path.expanduser("~")
_folders = [folder for folder in (f"{_home}/.config", f"{_home}/.cache") if os.path.lexists(folder)]
if not all(os.access(folder, os.W_OK | os.X_OK) for folder in (_home, *_folders)):
    with contextlib.suppress(OSError):
        for _name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ.setdefault(_name, str(cache_folder() / _name.lower()))
        if _home == "~":
            os.environ["HOME"] = str(cache_folder())

_MODULES = {"Config": "job.config.schema", "RunFailed": "job.errors", "UserError": "job.errors"}


def _version() -> str:
    """Returns the version of the installed package. If it is not installed, as in the image, that of pyproject.toml."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version("lanes"))
    except metadata.PackageNotFoundError:
        with open(os.path.join(os.path.dirname(__path__[0]), "pyproject.toml"), "rb") as file:
            return str(importlib.import_module("tomllib").load(file)["project"]["version"])


def __getattr__(name: str) -> Any:
    """Imports a name of the API when it is first used (PEP 562)."""
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "job.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
