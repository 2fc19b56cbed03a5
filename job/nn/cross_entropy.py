"""The summed cross-entropy of a linear output layer, without all logits at once.

Axes: T steps, B lanes, H hidden units, V tokens of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from job.kernels.ops import can_use_kernel, compute_dtype, fused_linear_cross_entropy

CHUNK_LOGITS = 1 << 27  # 512 MiB of float32


def linear_cross_entropy(hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor) -> Tensor:
    """Returns the summed cross-entropy, in nats, of targets under a linear output layer.

    The compiled kernel holds the logits and gradients of some rows at a time. Without it there are at most CHUNK_LOGITS
    logits at a time; if that takes several chunks, the backward pass recomputes each.

    Args:
        hidden_TBH: hidden states
        weight_VH: weight of the output layer
        bias_V: bias of the output layer
        targets_TB: token ids, int64; there may be none

    Returns:
        A scalar of the weight's dtype. Autocast affects only the matrix product.

    Raises:
        IndexError: a target is not in the vocabulary (compiled kernel only)
    """
    dtype = compute_dtype(weight_VH)
    if targets_TB.numel() and can_use_kernel(weight_VH, dtype):
        return fused_linear_cross_entropy(hidden_TBH.to(dtype), weight_VH, bias_V, targets_TB)
    return chunked_cross_entropy(hidden_TBH, weight_VH, bias_V, targets_TB)


def chunked_cross_entropy(hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor) -> Tensor:
    """Returns the summed cross-entropy by torch operators, where targets of -1 count nothing."""
    rows = max(1, CHUNK_LOGITS // len(weight_VH))
    if targets_TB.numel() <= rows:
        return _cross_entropy_torch(hidden_TBH, weight_VH, bias_V, targets_TB)
    chunks = zip(hidden_TBH.flatten(0, 1).split(rows), targets_TB.flatten().split(rows), strict=True)
    flags: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    nats = [checkpoint(_cross_entropy_torch, hidden, weight_VH, bias_V, targets, **flags) for hidden, targets in chunks]
    return torch.stack(nats).sum()


def _cross_entropy_torch(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight_VH, bias_V).to(weight_VH.dtype)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="sum")
