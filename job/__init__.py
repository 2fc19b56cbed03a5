"""Recurrent language models, trained on Ray."""

import os

# Read when torch is loaded. Threads of OpenMP that wait would spin for some milliseconds, as long as the
# seed's whole step, on cores that others need; asleep, two of them make that step 1.2 times as fast, and
# spinning 0.7 times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What cuBLAS needs to be reproducible.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
