"""Recurrent layers from torch's operators, for where there is no compiled kernel.

A processor spends a tanh layer's and a GRU's time on many small operations. With the backward pass
written out, a step has few of them: what each gate's slope is comes for all steps at once, and the
weight's gradient is one product. For an LSTM torch has a good operation of its own (oneDNN), and on a
GPU it has one for all three (cuDNN).

Axes: T steps, B lanes, H hidden units, G gates times hidden units.
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
        return dgates_TBH, dgates[0] @ weight_HH, _weight_gradient(dgates_TBH, h0_BH, h_TBH)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_TBG: Tensor, h0_BH: Tensor, weight_GH: Tensor, bias_H: Tensor) -> Tensor:
        (steps, lanes), units = gates_TBG.shape[:2], weight_GH.shape[1]
        sums_TBG, weight_t = torch.empty_like(gates_TBG), weight_GH.t()
        bias_G = torch.cat([bias_H.new_zeros(2 * units), bias_H])
        h_TBH, new_TBH = (gates_TBG.new_empty(steps, lanes, units) for _ in range(2))
        sluices_TBG = gates_TBG.new_empty(steps, lanes, 2 * units)  # reset and update
        h = h0_BH
        for t in range(steps):
            sums, sluices, new = torch.addmm(bias_G, h, weight_t, out=sums_TBG[t]), sluices_TBG[t], new_TBH[t]
            torch.add(gates_TBG[t, :, : 2 * units], sums[:, : 2 * units], out=sluices).sigmoid_()
            reset, update = sluices.chunk(2, 1)
            torch.addcmul(gates_TBG[t, :, 2 * units :], reset, sums[:, 2 * units :], out=new).tanh_()
            h = torch.lerp(new, h, update, out=h_TBH[t])
        ctx.save_for_backward(h_TBH, h0_BH, weight_GH, sums_TBG[..., 2 * units :], sluices_TBG, new_TBH)
        return h_TBH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TBH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h_TBH, h0_BH, weight_GH, sums_TBH, sluices_TBG, new_TBH = ctx.saved_tensors
        reset, update = sluices_TBG.chunk(2, 2)
        previous = torch.cat([h0_BH[None], h_TBH[:-1]])
        new_slope = (1 - update) * (1 - new_TBH * new_TBH)
        slopes_TB3H = torch.stack(
            [
                new_slope * sums_TBH * reset * (1 - reset),
                (previous - new_TBH) * update * (1 - update),
                new_slope * reset,
            ],
            2,
        )
        dgates_TB3H, all_dh_TBH = torch.empty_like(slopes_TB3H), torch.empty_like(h_TBH)
        dh = dh_TBH[-1]
        for t in range(len(h_TBH) - 1, -1, -1):
            all_dh_TBH[t] = dh
            dgates = torch.mul(dh[:, None], slopes_TB3H[t], out=dgates_TB3H[t]).flatten(1)
            dh = torch.addmm(dh * update[t] + dh_TBH[t - 1] if t else dh * update[t], dgates, weight_GH)
        dgates_TBG = dgates_TB3H.flatten(2)
        units = h_TBH.shape[2]
        dinputs_TBG = torch.cat([dgates_TBG[..., : 2 * units], all_dh_TBH * new_slope], 2)
        dbias_H = dgates_TB3H[:, :, 2].sum((0, 1))
        return dinputs_TBG, dh, _weight_gradient(dgates_TBG, h0_BH, h_TBH), dbias_H


def _weight_gradient(dgates_TBG: Tensor, h0_BH: Tensor, h_TBH: Tensor) -> Tensor:
    previous_TBH = torch.cat([h0_BH[None], h_TBH[:-1]])
    return dgates_TBG.flatten(0, 1).t() @ previous_TBH.flatten(0, 1)


def tanh_layer(gates_TBH: Tensor, h0_BH: Tensor, weight_HH: Tensor) -> Tensor:
    """Hidden states ``h_t = tanh(gates_t + W h_{t-1})`` of all steps: (T, B, H).

    ``gates`` is what input and biases give each step; all are of one floating type.
    """
    return _Tanh.apply(gates_TBH, h0_BH, weight_HH)


def gru_layer(gates_TBG: Tensor, h0_BH: Tensor, weight_GH: Tensor, bias_H: Tensor) -> Tensor:
    """Hidden states (T, B, H) of a GRU: gates in torch's order; ``bias_H`` is the one that the reset gate scales."""
    return _GRU.apply(gates_TBG, h0_BH, weight_GH, bias_H)
