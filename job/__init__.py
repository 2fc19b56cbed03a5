"""Recurrent language models, trained on Ray."""

import os

# Both variables are read when torch is imported. By default idle OpenMP threads spin for some milliseconds, which
# is as long as a whole step of configs/seed.toml, on cores that other threads need. Two threads make that
# step 1.2 times as fast as one thread if idle threads sleep, and 0.7 times as fast if they spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# cuBLAS is deterministic only with a fixed workspace.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
