"""The recurrence of a tanh layer as one operation with its own backward, for processors.

Autograd would record two operations a step and add up the recurrent weight's gradient step by
step; with the backward pass written out, that gradient is one product over all steps.

Axes: T steps, B lanes, H hidden units.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_TBH: Tensor, h0_BH: Tensor, weight_HH: Tensor) -> Tensor:
        h_TBH = torch.empty_like(gates_TBH)
        weight_t = weight_HH.t()
        previous = h0_BH
        for gate, h in zip(gates_TBH.unbind(), h_TBH.unbind(), strict=True):
            torch.addmm(gate, previous, weight_t, out=h)
            previous = h.tanh_()
        ctx.save_for_backward(h_TBH, h0_BH, weight_HH)
        return h_TBH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h_TBH, h0_BH, weight_HH = ctx.saved_tensors
        slopes = (1 - h_TBH * h_TBH).unbind()
        dgates_TBH = torch.empty_like(h_TBH)
        dgates, dhs = dgates_TBH.unbind(), dh_TBH.unbind()
        dh = dhs[-1]
        for t in range(len(dgates) - 1, 0, -1):
            torch.mul(dh, slopes[t], out=dgates[t])
            dh = torch.addmm(dhs[t - 1], dgates[t], weight_HH)
        torch.mul(dh, slopes[0], out=dgates[0])
        previous_TBH = torch.cat([h0_BH[None], h_TBH[:-1]])
        dweight_HH = dgates_TBH.flatten(0, 1).t() @ previous_TBH.flatten(0, 1)
        return dgates_TBH, dgates[0] @ weight_HH, dweight_HH


def tanh_layer(gates_TBH: Tensor, h0_BH: Tensor, weight_HH: Tensor) -> Tensor:
    """Hidden states ``h_t = tanh(gates_t + W h_{t-1})`` of all steps: (T, B, H).

    ``gates`` is what input and biases give each step; all three are of one floating type.
    """
    return _Tanh.apply(gates_TBH, h0_BH, weight_HH)
