"""What a run in a caller's own process changes there, and restores: the environment and torch's settings."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn, mkldnn

_FLOAT32_OPERATORS: Any = cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def process_state_restored() -> Iterator[None]:
    """Gives the block torch's default settings. Restores the environment and torch's settings after it."""
    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    precisions = [operators.fp32_precision for operators in _FLOAT32_OPERATORS]
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    try:
        with _default_contexts():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _restore_precisions(precisions)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if "job.cluster.ray_extensions" in sys.modules:  # Ray's core keeps what it has read of the environment
            sys.modules["job.cluster.ray_extensions"].reset_authentication()


@contextmanager
def _default_contexts() -> Iterator[None]:
    """Gives the block the defaults of what the caller may have set for blocks of its own, such as a device."""
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":  # each operation takes longer in such a context
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _restore_precisions(precisions: list[str]) -> None:
    """Restores the settings of products in float32, which torch stores twice: by operator, and as older flags."""
    convolution, rnn, cuda_matmul, cpu_matmul = precisions
    cudnn.allow_tf32 = "tf32" in (convolution, rnn)
    lower = "medium" if cpu_matmul == "bf16" else "high"
    torch.set_float32_matmul_precision(lower if cuda_matmul == "tf32" else "highest")
    for operators, precision in zip(_FLOAT32_OPERATORS, precisions, strict=True):
        operators.fp32_precision = precision
