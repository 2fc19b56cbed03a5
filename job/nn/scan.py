"""The linear recurrence h_t = a_t h_{t-1} + b_t of all steps of a window, by a parallel scan or a loop over the steps.

Axes: T steps, B lanes, H hidden units.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# On a CPU the loop is faster for few steps and for large ones (lanes times units); measured in benchmarks/README.md.
LOOP_STEPS = 40
LOOP_NUMBERS = 2048


def linear_scan(decay_TBH: Tensor, input_TBH: Tensor, h0_BH: Tensor) -> Tensor:
    """Returns all h_t = decay_t * h_{t-1} + input_t (T, B, H).

    A parallel scan takes 2 log2(T) operations instead of T, each of which reads and writes more memory.
    With decays from 0 to 1 every intermediate value is a product of decays or a part of some h_t: there is no logarithm
    and no quotient, so nothing overflows, and a decay of zero is exact. Its gradient is the same recurrence backwards.

    Args:
        decay_TBH: a_t, from 0 to 1; 0 resets
        input_TBH: b_t
        h0_BH: the state before the window

    Source: Blelloch, "Prefix sums and their applications", 1990; Martin and Cundy, "Parallelizing linear recurrent
    neural nets over sequence length", 2018.
    """
    if len(input_TBH) == 1:
        return torch.addcmul(input_TBH, decay_TBH, h0_BH)
    hidden: Tensor = _LinearScan.apply(decay_TBH, input_TBH, h0_BH)
    return hidden


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay_TBH: Tensor, input_TBH: Tensor, h0_BH: Tensor) -> Tensor:
        first_BH = torch.addcmul(input_TBH[0], decay_TBH[0], h0_BH)
        if _is_loop_faster(input_TBH):
            hidden_TBH = torch.empty_like(input_TBH)
            hidden_TBH[0] = first_BH
            _loop(decay_TBH[1:].unbind(), input_TBH[1:].unbind(), hidden_TBH.unbind())
        else:
            hidden_TBH = _scan(decay_TBH, torch.cat([first_BH[None], input_TBH[1:]]))
        ctx.save_for_backward(decay_TBH, hidden_TBH, h0_BH)
        return hidden_TBH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden_TBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay_TBH, hidden_TBH, h0_BH = ctx.saved_tensors
        # dh_t, which includes what comes from later steps, is d_t + a_{t+1} dh_{t+1}
        if _is_loop_faster(dhidden_TBH):
            dinput_TBH = torch.empty_like(dhidden_TBH)
            dinput_TBH[-1] = dhidden_TBH[-1]
            _loop(decay_TBH.unbind()[:0:-1], dhidden_TBH[:-1].unbind()[::-1], dinput_TBH.unbind()[::-1])
        else:
            later_TBH = torch.cat([decay_TBH[1:], decay_TBH[:1]]).flip(0)  # the first one is multiplied by nothing
            dinput_TBH = _scan(later_TBH, dhidden_TBH.flip(0)).flip(0)
        ddecay_TBH = dinput_TBH * torch.cat([h0_BH[None], hidden_TBH[:-1]])
        return ddecay_TBH, dinput_TBH, dinput_TBH[0] * decay_TBH[0]


def _is_loop_faster(input_TBH: Tensor) -> bool:
    return input_TBH.is_cpu and (len(input_TBH) <= LOOP_STEPS or input_TBH[0].numel() >= LOOP_NUMBERS)


def _loop(decays: Iterable[Tensor], inputs: Iterable[Tensor], hidden: Sequence[Tensor]) -> None:
    """Writes all hidden states but the first."""
    for decay_BH, input_BH, before_BH, hidden_BH in zip(decays, inputs, hidden[:-1], hidden[1:], strict=True):
        torch.addcmul(input_BH, decay_BH, before_BH, out=hidden_BH)


def _scan(decay_TBH: Tensor, input_TBH: Tensor) -> Tensor:
    """Returns the recurrence from a state of zero: scans pairs of steps, each combined into one step."""
    if len(input_TBH) == 1:
        return input_TBH
    steps = len(input_TBH) // 2 * 2
    even, odd, decay_odd = input_TBH[:steps:2], input_TBH[1::2], decay_TBH[1::2]
    hidden_odd = _scan(decay_odd * decay_TBH[:steps:2], torch.addcmul(odd, decay_odd, even))
    hidden_TBH = torch.empty_like(input_TBH)
    hidden_TBH[1::2], hidden_TBH[0] = hidden_odd, input_TBH[0]
    before = hidden_odd[: (len(input_TBH) - 1) // 2]
    torch.addcmul(input_TBH[2::2], decay_TBH[2::2], before, out=hidden_TBH[2::2])
    return hidden_TBH
