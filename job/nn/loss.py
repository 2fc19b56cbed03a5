"""The output layer's cross-entropy, by the fastest way at hand.

Axes: T steps, B lanes, H hidden units, V tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from job.kernels.ops import VECTOR_WIDTH, fused_linear_cross_entropy, supports_dtype


def linear_cross_entropy(hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor) -> Tensor:
    """The cross-entropy of all targets, summed, in the weight's type; autocast rules the product alone."""
    kind, own = hidden_TBH.device.type, weight_VH.dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
    whole = hidden_TBH.shape[2] % VECTOR_WIDTH == 0
    if kind == "cpu" and whole and own == torch.float32 and supports_dtype(dtype):
        return fused_linear_cross_entropy(hidden_TBH.to(dtype), weight_VH, bias_V, targets_TB)
    logits_TBV = F.linear(hidden_TBH, weight_VH, bias_V).to(own)
    return F.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten(), reduction="sum")
