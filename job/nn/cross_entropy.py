"""The summed cross-entropy of a linear output layer, without all logits at once.

Axes: T steps, B lanes, H hidden units, V tokens of the vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from job.kernels.ops import can_use_kernel, compute_dtype, fused_linear_cross_entropy

CHUNK_LOGITS = 1 << 24  # 64 MiB of float32


def linear_cross_entropy(
    hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor, upstream: float = 1.0
) -> Tensor:
    """Returns the summed cross-entropy, in nats, of targets under a linear output layer.

    The compiled kernel holds the logits and gradients of some rows at a time. Without it there are at most CHUNK_LOGITS
    logits at a time; if that takes several chunks, the forward pass computes the gradient of each chunk, too.

    Args:
        hidden_TBH: hidden states
        weight_VH: weight of the output layer
        bias_V: bias of the output layer
        targets_TB: token ids, int64; there may be none
        upstream: the gradient with respect to the result that the backward pass will most likely be given; it does not
            change the result

    Returns:
        A scalar of the weight's dtype. Autocast affects only the matrix product.

    Raises:
        IndexError: a target is not in the vocabulary (compiled kernel only)
    """
    dtype = compute_dtype(weight_VH)
    if targets_TB.numel() and can_use_kernel(weight_VH, dtype):
        return fused_linear_cross_entropy(hidden_TBH.to(dtype), weight_VH, bias_V, targets_TB, upstream)
    return chunked_cross_entropy(hidden_TBH, weight_VH, bias_V, targets_TB)


def chunked_cross_entropy(hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor) -> Tensor:
    """Returns the summed cross-entropy by torch operators, where targets of -1 count nothing."""
    rows = max(1, CHUNK_LOGITS // len(weight_VH))
    if targets_TB.numel() <= rows:
        return _cross_entropy_torch(hidden_TBH, weight_VH, bias_V, targets_TB)
    hidden_RH, targets_R = hidden_TBH.flatten(0, 1), targets_TB.flatten()
    if torch.is_grad_enabled():
        return cast(Tensor, _ChunkedCrossEntropy.apply(rows, hidden_RH, weight_VH, bias_V, targets_R))  # type: ignore[no-untyped-call]
    chunks = zip(hidden_RH.split(rows), targets_R.split(rows), strict=True)
    return torch.stack([_cross_entropy_torch(hidden, weight_VH, bias_V, targets) for hidden, targets in chunks]).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient of each chunk right after its loss, so that nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, rows: int, hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_R: Tensor) -> Tensor:
        dtype, inputs = compute_dtype(weight_VH), (hidden_RH, weight_VH, bias_V)
        hidden_RH, weight, bias = (tensor.to(dtype) for tensor in inputs)
        ctx.gradients = dhidden_RH, *dweights = [torch.zeros_like(tensor) for tensor in inputs]
        chunks = zip(*(tensor.split(rows) for tensor in (hidden_RH, targets_R, dhidden_RH)), strict=True)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.stack([_add_gradients(weight, bias, *dweights, *chunk) for chunk in chunks]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnats: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the backward pass can run once only"
        return None, *(gradient.mul_(dnats) for gradient in gradients), None


def _add_gradients(
    weight_VH: Tensor, bias_V: Tensor, dweight_VH: Tensor, dbias_V: Tensor, hidden: Tensor, targets: Tensor,
    dhidden: Tensor,
) -> Tensor:  # fmt: skip
    """Returns the loss of a chunk of rows; writes or adds its gradients to the tensors whose names begin with d."""
    log_probabilities = F.linear(hidden, weight_VH, bias_V).to(dweight_VH.dtype).log_softmax(1)
    nats = F.nll_loss(log_probabilities, targets, ignore_index=-1, reduction="sum")
    dlogits = log_probabilities.exp_()
    dlogits[torch.arange(len(targets), device=targets.device), targets] -= 1
    dlogits = dlogits.masked_fill_((targets < 0)[:, None], 0).to(hidden.dtype)
    dhidden.copy_(dlogits @ weight_VH)
    dbias_V.add_(dlogits.sum(0, dtype=dbias_V.dtype))
    if hidden.dtype == dweight_VH.dtype:
        dweight_VH.addmm_(dlogits.t(), hidden)
    else:
        dweight_VH.add_(dlogits.t() @ hidden)
    return nats


def _cross_entropy_torch(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight_VH, bias_V).to(weight_VH.dtype)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="sum")
