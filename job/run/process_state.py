"""What a run in a caller's own process changes there, and restores: the environment and torch's settings."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def process_state_restored() -> Iterator[None]:
    """Gives the block torch's default settings. Restores the environment and torch's settings after it."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if "job.cluster.ray_extensions" in sys.modules:
            sys.modules["job.cluster.ray_extensions"].reset_authentication()
