"""Tanh and GRU layers from torch operators, for CPUs without the compiled kernel.

On the CPU these layers spend most of their time launching small operations. A hand-written backward pass needs few per
step, allocates no memory in the loop, and computes the weight gradient in a single product. LSTM layers use torch's
own operator (oneDNN).

Axes: T steps, B lanes, H hidden units, G gates times hidden units.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from job.kernels.ops import empty_states

# Gradients of the pre-activation, from the gradient of the activation and the activation itself.
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def _weight_gradient(dpreacts_TBG: Tensor, hidden: Tensor) -> Tensor:
    return dpreacts_TBG.flatten(0, 1).t() @ hidden[:-1].flatten(0, 1)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, preacts_TBH: Tensor, h0_BH: Tensor, weight_HH: Tensor) -> Tensor:
        hidden, weight_t = empty_states(h0_BH, len(preacts_TBH), h0_BH.dtype), weight_HH.t()
        h = hidden.unbind()
        for t, preact in enumerate(preacts_TBH.unbind()):
            torch.addmm(preact, h[t], weight_t, out=h[t + 1]).tanh_()
        ctx.save_for_backward(hidden, weight_HH)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden_TBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight_HH = ctx.saved_tensors
        dpreacts_TBH, dh = torch.empty_like(dhidden_TBH), torch.empty_like(dhidden_TBH[0])
        h, dpreacts, dhidden = hidden.unbind(), dpreacts_TBH.unbind(), dhidden_TBH.unbind()
        dh.copy_(dhidden[-1])
        for t in reversed(range(len(dpreacts))):
            _tanh_backward(dh, h[t + 1], grad_input=dpreacts[t])
            if t:
                torch.addmm(dhidden[t - 1], dpreacts[t], weight_HH, out=dh)
        return dpreacts_TBH, dpreacts[0] @ weight_HH, _weight_gradient(dpreacts_TBH, hidden)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_preacts_TBG: Tensor, h0_BH: Tensor, weight_GH: Tensor, bias_new_H: Tensor) -> Tensor:
        hidden = empty_states(h0_BH, len(input_preacts_TBG), h0_BH.dtype)
        weight_t, units = weight_GH.t(), h0_BH.shape[1]
        # Reset and update gate: input plus hidden part. New state: the hidden part alone, which the reset gate scales.
        preacts_TBG = input_preacts_TBG.clone()
        preacts_TBG[..., 2 * units :] = bias_new_H
        gates_TBG, new_TBH = torch.empty_like(preacts_TBG[..., : 2 * units]), torch.empty_like(hidden[1:])
        h, preacts, gates, new = (x.unbind() for x in (hidden, preacts_TBG, gates_TBG, new_TBH))
        reset, update = (x.unbind() for x in gates_TBG.chunk(2, 2))
        gate_preacts, hidden_candidate = (x.unbind() for x in preacts_TBG.split([2 * units, units], 2))
        input_candidate = input_preacts_TBG[..., 2 * units :].unbind()
        for t in range(len(gates)):
            torch.addmm(preacts[t], h[t], weight_t, out=preacts[t])
            torch.sigmoid(gate_preacts[t], out=gates[t])
            torch.addcmul(input_candidate[t], reset[t], hidden_candidate[t], out=new[t]).tanh_()
            torch.lerp(new[t], h[t], update[t], out=h[t + 1])
        ctx.save_for_backward(hidden, weight_GH, preacts_TBG, gates_TBG, new_TBH)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden_TBH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, weight_GH, preacts_TBG, gates_TBG, new_TBH = ctx.saved_tensors
        units = hidden.shape[2]
        reset_TBH, update_TBH = gates_TBG.chunk(2, 2)
        dpreacts_TBG, dinput_preacts_TBG = torch.empty_like(preacts_TBG), torch.empty_like(preacts_TBG)
        dpreacts, dhidden, reset, update, new = (
            x.unbind() for x in (dpreacts_TBG, dhidden_TBH, reset_TBH, update_TBH, new_TBH)
        )
        dreset, dupdate, dhidden_candidate = (x.unbind() for x in dpreacts_TBG.chunk(3, 2))
        dnew, hidden_candidate = (x[..., 2 * units :].unbind() for x in (dinput_preacts_TBG, preacts_TBG))
        one_minus_update, h_minus_new = (1 - update_TBH).unbind(), (hidden[:-1] - new_TBH).unbind()
        dh, buffer = dhidden[-1].clone(), torch.empty_like(dhidden[-1])
        for t in reversed(range(len(dpreacts))):
            _tanh_backward(torch.mul(dh, one_minus_update[t], out=buffer), new[t], grad_input=dnew[t])
            torch.mul(dnew[t], reset[t], out=dhidden_candidate[t])
            _sigmoid_backward(torch.mul(dnew[t], hidden_candidate[t], out=buffer), reset[t], grad_input=dreset[t])
            _sigmoid_backward(torch.mul(dh, h_minus_new[t], out=buffer), update[t], grad_input=dupdate[t])
            dh.mul_(update[t])
            if t:
                dh.add_(dhidden[t - 1])
            torch.addmm(dh, dpreacts[t], weight_GH, out=dh)
        dinput_preacts_TBG[..., : 2 * units] = dpreacts_TBG[..., : 2 * units]
        dbias_new_H = dpreacts_TBG[..., 2 * units :].sum((0, 1))
        return dinput_preacts_TBG, dh, _weight_gradient(dpreacts_TBG, hidden), dbias_new_H


def tanh_layer(preacts_TBH: Tensor, h0_BH: Tensor, weight_HH: Tensor) -> Tensor:
    """Returns the hidden states (T, B, H) of ``h_t = tanh(preacts_t + W h_{t-1})``.

    Args:
        preacts_TBH: the input's part of the pre-activations, biases included
        h0_BH: hidden state before the first step
        weight_HH: hidden weight W; all tensors have the same floating-point dtype
    """
    return _Tanh.apply(preacts_TBH, h0_BH, weight_HH)


def gru_layer(input_preacts_TBG: Tensor, h0_BH: Tensor, weight_GH: Tensor, bias_new_H: Tensor) -> Tensor:
    """Returns the hidden states (T, B, H) of a GRU as defined by ``torch.nn.GRU``.

    Args:
        input_preacts_TBG: the input's part of the pre-activations, in torch's order (reset, update, new), with all
            biases but ``bias_new_H``
        h0_BH: hidden state before the first step
        weight_GH: hidden weight
        bias_new_H: hidden bias of the new state, which the reset gate scales
    """
    return _GRU.apply(input_preacts_TBG, h0_BH, weight_GH, bias_new_H)
