"""Recurrent language models, trained on Ray."""

import contextlib
import os

from job.paths import cache_folder

# Both variables are read when torch is imported. By default idle OpenMP threads spin for some milliseconds, which
# is as long as a whole step of configs/seed.toml, on cores that other threads need. Two threads make that
# step 1.2 times as fast as one thread if idle threads sleep, and 0.7 times as fast if they spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
