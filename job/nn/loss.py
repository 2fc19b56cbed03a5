"""The output layer and its cross-entropy, by the fastest implementation available.

Axes: T steps, B lanes, H hidden units, V tokens of the vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

from job.kernels.ops import VECTOR_WIDTH, fused_linear_cross_entropy
from job.nn.dispatch import can_use_kernel, compute_dtype


def linear_cross_entropy(hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor) -> Tensor:
    """Returns the summed cross-entropy, in nats, of targets under a linear output layer.

    Args:
        hidden_TBH: hidden states
        weight_VH: weight of the output layer
        bias_V: bias of the output layer
        targets_TB: token ids, int64

    Returns:
        A scalar of the weight's dtype. Autocast affects only the matrix product.

    Raises:
        IndexError: a target is not in the vocabulary (compiled kernel only)
    """
    dtype = compute_dtype(weight_VH)
    if hidden_TBH.shape[2] % VECTOR_WIDTH == 0 and can_use_kernel(weight_VH, dtype):
        return fused_linear_cross_entropy(hidden_TBH.to(dtype), weight_VH, bias_V, targets_TB)
    logits_TBV = F.linear(hidden_TBH, weight_VH, bias_V).to(weight_VH.dtype)
    return F.cross_entropy(logits_TBV.flatten(0, 1), targets_TB.flatten(), reduction="sum")
