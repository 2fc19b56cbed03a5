"""The compiled recurrence as one operation of autograd, with its own backward.

Axes: T steps, B lanes, H hidden units (a multiple of WIDTH), G gates times hidden units, V rows of a table.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from job import compiled

WIDTH = 32  # the kernel works on so many hidden units at a time
CELLS = {"RNN_TANH": 0, "GRU": 1, "LSTM": 2}
_SIZES = ("steps", "lanes", "units", "threads", "rows")
_ARRAYS = ("inputs", "tokens", "weight", "bias", "hidden", "carry", "gates")
_GRADIENTS = ("dhidden", "dcarry_end", "dgates", "dh0", "dcarry", "packed")


class _Window(ctypes.Structure):
    """``window`` of recurrence.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in (*_ARRAYS, *_GRADIENTS)),
    )

    def __init__(self, steps: int, lanes: int, units: int, rows: int, **arrays: Tensor | None) -> None:
        super().__init__(steps, lanes, units, torch.get_num_threads(), rows)
        for name, array in arrays.items():
            if array is not None:
                assert array.is_contiguous()
                setattr(self, name, array.data_ptr())


def _call(function: str, *arguments: Any) -> None:
    failed = getattr(compiled.library(), function)(*arguments)
    if failed == 2:
        raise IndexError("a token is not in the vocabulary")
    if failed:
        raise MemoryError(f"{function}: no memory is left")


def works_in(dtype: torch.dtype) -> bool:
    """Whether the kernel is there and computes with numbers of that type on this processor."""
    library = compiled.library()
    return library is not None and (dtype == torch.float32 or (dtype == torch.bfloat16 and library.multiplies_bf16()))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        dtype: torch.dtype,
        keep: bool,
        inputs: Tensor,
        tokens_TB: Tensor | None,
        h0_BH: Tensor,
        c0_BH: Tensor | None,
        weight_GH: Tensor,
        bias_H: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        (steps, lanes), units = (inputs if tokens_TB is None else tokens_TB).shape[:2], weight_GH.shape[1]
        hidden = inputs.new_empty(steps + 1, lanes, units, dtype=dtype)
        hidden[0] = h0_BH
        carry = None
        if cell == "LSTM" or (cell == "GRU" and dtype != torch.float32):
            carry = inputs.new_empty(steps + 1, lanes, units)
            carry[0] = h0_BH if c0_BH is None else c0_BH
        elif cell == "GRU":
            carry = hidden
        gates = inputs.new_empty(steps, lanes, 4 * units, dtype=dtype) if keep and cell != "RNN_TANH" else None
        window = _Window(
            steps, lanes, units, len(inputs), inputs=inputs, tokens=tokens_TB,
            weight=weight_GH, bias=bias_H, hidden=hidden, carry=carry, gates=gates,
        )  # fmt: skip
        _call("forward", CELLS[cell], dtype == torch.bfloat16, ctypes.byref(window))
        ctx.cell, ctx.inputs_shape = cell, inputs.shape
        ctx.save_for_backward(tokens_TB, weight_GH, hidden, carry, gates)
        ctx.set_materialize_grads(False)
        return hidden[1:], None if carry is None else carry[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor | None, dcarry_end: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens_TB, weight_GH, hidden, carry, gates = ctx.saved_tensors
        cell, dtype = ctx.cell, hidden.dtype
        low, units, columns = dtype == torch.bfloat16, hidden.shape[2], weight_GH.shape[0]
        steps, lanes = hidden.shape[0] - 1, hidden.shape[1]
        dhidden = hidden.new_zeros(steps, lanes, units) if dhidden is None else dhidden.contiguous()
        dgates = hidden.new_empty(steps, lanes, units if cell == "RNN_TANH" else 4 * units)
        dcarry = None
        if cell != "RNN_TANH":
            dcarry = weight_GH.new_zeros(lanes, units) if dcarry_end is None else dcarry_end.contiguous().clone()
        dh0 = weight_GH.new_empty(lanes, units) if ctx.needs_input_grad[5] else None
        window = _Window(
            steps, lanes, units, 0, weight=weight_GH, hidden=hidden, carry=carry, gates=gates,
            dhidden=dhidden, dgates=dgates, dh0=dh0, dcarry=dcarry,
        )  # fmt: skip
        _call("backward", CELLS[cell], low, ctypes.byref(window))
        dweight = torch.empty_like(weight_GH)
        _call(
            "weight_gradient", low, *map(ctypes.c_long, (steps * lanes, columns, dgates.shape[2])),
            ctypes.c_void_p(dgates.data_ptr()), ctypes.c_long(units), ctypes.c_void_p(hidden.data_ptr()),
            ctypes.c_void_p(dweight.data_ptr()), ctypes.c_long(torch.get_num_threads()),
        )  # fmt: skip
        dbias = dgates[..., 2 * units : 3 * units].sum((0, 1), dtype=torch.float32) if cell == "GRU" else None
        dinputs = _inputs_gradient(cell, dgates, tokens_TB, ctx.inputs_shape)
        return None, None, None, dinputs, None, dh0, dcarry if cell == "LSTM" else None, dweight, dbias


def _inputs_gradient(cell: str, dgates: Tensor, tokens_TB: Tensor | None, shape: torch.Size) -> Tensor:
    """The gradient of a table's rows, summed over their uses, or of each step's inputs."""
    units = dgates.shape[2] // (1 if cell == "RNN_TANH" else 4)
    # A GRU's dgates are four: the new state's is one as the hidden state sees it, and one as the input does.
    blocks = [(0, 0, 2 * units), (2 * units, 3 * units, units)] if cell == "GRU" else [(0, 0, dgates.shape[2])]
    if tokens_TB is None:
        return torch.cat([dgates[..., at : at + width] for _, at, width in blocks], -1).float()
    found = torch.zeros(shape)
    for to, at, width in blocks:
        _call(
            "scatter", dgates.dtype == torch.bfloat16, *map(ctypes.c_long, (tokens_TB.numel(), width, dgates.shape[2])),
            ctypes.c_void_p(dgates[..., at:].data_ptr()), ctypes.c_void_p(tokens_TB.data_ptr()),
            ctypes.c_void_p(found[:, to:].data_ptr()), ctypes.c_long(shape[1]),
        )  # fmt: skip
    return found


def recurrence(
    cell: str,
    dtype: torch.dtype,
    inputs: Tensor,
    tokens_TB: Tensor | None,
    state: tuple[Tensor, ...],
    weight_GH: Tensor,
    bias_H: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (T, B, H) of ``dtype`` and, but for a tanh cell, the last carry (B, H) in float32.

    ``inputs`` is what input and biases give the gates: (T, B, G), or a table (V, G) of which ``tokens_TB``
    choose. The carry is an LSTM's cell, a GRU's hidden state; ``bias_H`` is the GRU's that its reset
    gate scales.
    """
    tokens_TB = None if tokens_TB is None else tokens_TB.contiguous()
    h0, c0 = state[0], state[1] if cell == "LSTM" else None
    keep = torch.is_grad_enabled()
    return _Recurrence.apply(cell, dtype, keep, inputs.float().contiguous(), tokens_TB, h0, c0, weight_GH, bias_H)
