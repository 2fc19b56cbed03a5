"""Which dtype an operation computes in, and whether the compiled kernels implement it."""

import torch
from torch import Tensor

from job.kernels.ops import supports_dtype


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Returns the autocast dtype if autocast is enabled on the weight's device, else the weight's dtype."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def can_use_kernel(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a compiled kernel can compute in ``dtype`` with this weight, which must be float32 on the CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and supports_dtype(dtype)
