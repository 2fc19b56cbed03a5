"""Recurrent layers from torch's operators, for where there is no compiled kernel.

A processor spends a tanh layer's and a GRU's time on many small operations. With the backward pass
written out, a step has few of them, none takes memory of its own, and the weight's gradient is one
product. For an LSTM torch has a good operation of its own (oneDNN), and on a GPU it has one for all
three (cuDNN).

Axes: T steps, B lanes, H hidden units, G gates times hidden units.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Gradients through a function, from what it gave.
_through_tanh = torch.ops.aten.tanh_backward.grad_input
_through_sigmoid = torch.ops.aten.sigmoid_backward.grad_input


def _states(h0_BH: Tensor, steps: int) -> Tensor:
    """Room for the hidden states of all steps behind the first one: (T + 1, B, H)."""
    hidden = h0_BH.new_empty(steps + 1, *h0_BH.shape)
    hidden[0] = h0_BH
    return hidden


def _weight_gradient(dgates_TBG: Tensor, hidden: Tensor) -> Tensor:
    return dgates_TBG.flatten(0, 1).t() @ hidden[:-1].flatten(0, 1)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_TBH: Tensor, h0_BH: Tensor, weight_HH: Tensor) -> Tensor:
        hidden, weight_t = _states(h0_BH, len(gates_TBH)), weight_HH.t()
        h = hidden.unbind()
        for t, gate in enumerate(gates_TBH.unbind()):
            torch.addmm(gate, h[t], weight_t, out=h[t + 1]).tanh_()
        ctx.save_for_backward(hidden, weight_HH)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight_HH = ctx.saved_tensors
        dgates_TBH, dh = torch.empty_like(dh_TBH), torch.empty_like(dh_TBH[0])
        h, dgates, dhs = hidden.unbind(), dgates_TBH.unbind(), dh_TBH.unbind()
        dh.copy_(dhs[-1])
        for t in reversed(range(len(dgates))):
            _through_tanh(dh, h[t + 1], grad_input=dgates[t])
            if t:
                torch.addmm(dhs[t - 1], dgates[t], weight_HH, out=dh)
        return dgates_TBH, dgates[0] @ weight_HH, _weight_gradient(dgates_TBH, hidden)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_TBG: Tensor, h0_BH: Tensor, weight_GH: Tensor, bias_H: Tensor) -> Tensor:
        hidden, weight_t, units = _states(h0_BH, len(gates_TBG)), weight_GH.t(), h0_BH.shape[1]
        given_TBH = gates_TBG[..., 2 * units :]
        sums_TBG = gates_TBG.clone()  # of reset and update with the input's part, of the new state without
        sums_TBG[..., 2 * units :] = bias_H
        sluices_TBG, new_TBH = torch.empty_like(sums_TBG[..., : 2 * units]), torch.empty_like(hidden[1:])
        h, sums, sluices, new = (x.unbind() for x in (hidden, sums_TBG, sluices_TBG, new_TBH))
        reset, update = (half.unbind() for half in sluices_TBG.chunk(2, 2))
        sluice_sums, own, given = (
            sums_TBG[..., : 2 * units].unbind(),
            sums_TBG[..., 2 * units :].unbind(),
            given_TBH.unbind(),
        )
        for t in range(len(gates_TBG)):
            torch.addmm(sums[t], h[t], weight_t, out=sums[t])
            torch.sigmoid(sluice_sums[t], out=sluices[t])
            torch.addcmul(given[t], reset[t], own[t], out=new[t]).tanh_()
            torch.lerp(new[t], h[t], update[t], out=h[t + 1])
        ctx.save_for_backward(hidden, weight_GH, sums_TBG, sluices_TBG, new_TBH)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TBH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, weight_GH, sums_TBG, sluices_TBG, new_TBH = ctx.saved_tensors
        units = hidden.shape[2]
        reset_TBH, update_TBH = sluices_TBG.chunk(2, 2)
        dgates_TBG, dinputs_TBG = torch.empty_like(sums_TBG), torch.empty_like(sums_TBG)
        dgates, dhs, reset, update, new = (x.unbind() for x in (dgates_TBG, dh_TBH, reset_TBH, update_TBH, new_TBH))
        dreset, dupdate, down = (part.unbind() for part in dgates_TBG.chunk(3, 2))
        dnew, own = dinputs_TBG[..., 2 * units :].unbind(), sums_TBG[..., 2 * units :].unbind()
        renewed, replaced = (1 - update_TBH).unbind(), (hidden[:-1] - new_TBH).unbind()
        dh, some = dhs[-1].clone(), torch.empty_like(dhs[-1])
        for t in reversed(range(len(dgates))):
            _through_tanh(torch.mul(dh, renewed[t], out=some), new[t], grad_input=dnew[t])
            torch.mul(dnew[t], reset[t], out=down[t])
            _through_sigmoid(torch.mul(dnew[t], own[t], out=some), reset[t], grad_input=dreset[t])
            _through_sigmoid(torch.mul(dh, replaced[t], out=some), update[t], grad_input=dupdate[t])
            dh.mul_(update[t])
            if t:
                dh.add_(dhs[t - 1])
            torch.addmm(dh, dgates[t], weight_GH, out=dh)
        dinputs_TBG[..., : 2 * units] = dgates_TBG[..., : 2 * units]
        dbias_H = dgates_TBG[..., 2 * units :].sum((0, 1))
        return dinputs_TBG, dh, _weight_gradient(dgates_TBG, hidden), dbias_H


def tanh_layer(gates_TBH: Tensor, h0_BH: Tensor, weight_HH: Tensor) -> Tensor:
    """Hidden states ``h_t = tanh(gates_t + W h_{t-1})`` of all steps: (T, B, H).

    ``gates`` is what input and biases give each step; all are of one floating type.
    """
    return _Tanh.apply(gates_TBH, h0_BH, weight_HH)


def gru_layer(gates_TBG: Tensor, h0_BH: Tensor, weight_GH: Tensor, bias_H: Tensor) -> Tensor:
    """Hidden states (T, B, H) of a GRU: gates in torch's order; ``bias_H`` is the one that the reset gate scales."""
    return _GRU.apply(gates_TBG, h0_BH, weight_GH, bias_H)
