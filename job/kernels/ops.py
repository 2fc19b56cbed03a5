"""The compiled kernels as operations of autograd, with their own backward.

Axes: T steps, B lanes, R rows (T times B), E input features, H hidden units, G gates times hidden units,
V tokens. E, H and what G is made of are multiples of WIDTH: the caller pads.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from job.kernels.build import load_library, unavailable_reason

VECTOR_WIDTH = 32
GREEDY_CHUNK = 1000  # tokens between two moments in which Python hears a signal
CELL_CODES = {"RNN_TANH": 0, "GRU": 1, "LSTM": 2}
NO_COLUMNS = range(0)
_SIZES = ("steps", "lanes", "units", "threads", "rows")
_ARRAYS = ("inputs", "tokens", "weight", "bias", "hidden", "carry", "gates")
_GRADIENTS = ("dhidden", "dcarry_end", "dgates", "dh0", "dcarry", "packed")


_Weights = list[Tensor]  # a layer's, in torch's order


class _Window(ctypes.Structure):
    """``window`` of recurrence.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in (*_ARRAYS, *_GRADIENTS)),
    )

    def __init__(self, steps: int, lanes: int, units: int, rows: int = 0, **arrays: Tensor | None) -> None:
        super().__init__(steps, lanes, units, torch.get_num_threads(), rows)
        for name, array in arrays.items():
            if array is not None:
                setattr(self, name, array.data_ptr())


class _DecoderLayer(ctypes.Structure):
    """``storey`` of recurrence.c: a layer that takes one step at a time."""

    _fields_ = (
        ("recurrence", _Window),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
    )


def _call(function: str, *arguments: Any) -> None:
    """Calls a function of recurrence.c; integers are passed as ``long``, tensors by their address."""
    failed = getattr(load_library(), function)(*map(_argument, arguments))
    if failed == 2:
        raise IndexError("a token is not in the vocabulary")
    if failed:
        raise MemoryError(f"{function}: no memory is left")


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else value


def kernel_unavailable_reason(device: torch.device) -> str:
    """Why a processor does without the kernels; empty where it has them, or is none."""
    return (unavailable_reason() or "") if device.type == "cpu" else ""


@functools.cache
def supports_dtype(dtype: torch.dtype) -> bool:
    """Whether the kernels are there and compute with numbers of that type on this processor."""
    library = load_library()
    return library is not None and (dtype == torch.float32 or (dtype == torch.bfloat16 and library.multiplies_bf16()))


def _linear(left: Tensor, weight: Tensor, bias: Tensor | None, columns: int, to: Tensor, scale: float = 1.0) -> Tensor:
    """``to`` = scale × left × weight + bias, the weight (columns, K), or (K, columns) where there is no bias."""
    inner = left.shape[-1]
    _call(
        "linear", _is_bf16(left), _is_bf16(to), bias is not None, left.numel() // inner, inner, columns, len(weight),
        left, weight, bias, ctypes.c_float(scale), to, None, None, torch.get_num_threads(),
    )  # fmt: skip
    return to


def _weight_gradient(left: Tensor, columns: int, right: Tensor, scale: float = 1.0) -> Tensor:
    """``scale`` × the left factor's first columns, transposed, × the right one, or its first rows: in float32."""
    width, wide = left.shape[-1], right.shape[-1]
    found = torch.empty(columns, wide)
    _call(
        "weight_gradient", _is_bf16(left), left.numel() // width, columns, width, left, wide, right,
        ctypes.c_float(scale), found, torch.get_num_threads(),
    )  # fmt: skip
    return found


def _segment_sum(
    rows: Tensor, columns: int, skip: range, tokens: Tensor | None = None, places: int = 1, scale: float = 1.0
) -> Tensor:
    """``scale`` × the rows' sums by their tokens, or of all, without some columns: (places, columns) in float32."""
    found, width = torch.empty(places, columns), rows.shape[-1]
    _call(
        "sums", _is_bf16(rows), rows.numel() // width, columns, width, skip.start, len(skip), rows, tokens, places,
        ctypes.c_float(scale), found,
    )  # fmt: skip
    return found


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def combine_biases(cell: str, bias_ih_G: Tensor, bias_hh_G: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is added to the gates, and the part of a GRU's that its reset gate scales."""
    if cell != "GRU":
        return bias_ih_G + bias_hh_G, None
    new = len(bias_hh_G) // 3 * 2
    return torch.cat([bias_ih_G[:new] + bias_hh_G[:new], bias_ih_G[new:]]), bias_hh_G[new:]


def _token_projection(weight_GE: Tensor, embedding_VE: Tensor | None, bias_G: Tensor) -> Tensor:
    """What each token gives the gates: (V, G); a product with a one-hot vector is a column of the weight."""
    if embedding_VE is None:
        return torch.add(weight_GE.t(), bias_G, out=torch.empty(weight_GE.shape[1], len(bias_G)))
    with torch.autocast("cpu", enabled=False):
        return F.linear(embedding_VE, weight_GE, bias_G)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        dtype: torch.dtype,
        keep: bool,
        inputs: Tensor,
        embedding_VE: Tensor | None,
        h0_BH: Tensor,
        c0_BH: Tensor | None,
        weight_GE: Tensor,
        weight_GH: Tensor,
        bias_ih_G: Tensor,
        bias_hh_G: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        (steps, lanes), (width, units) = inputs.shape[:2], weight_GH.shape
        bias_G, bias_H = combine_biases(cell, bias_ih_G, bias_hh_G)
        tokens_TB = None if inputs.is_floating_point() else inputs
        if tokens_TB is None:
            inputs = inputs.to(dtype).contiguous()
            given = _linear(inputs, weight_GE, bias_G, width, torch.empty(steps * lanes, width))
        else:
            given = _token_projection(weight_GE, embedding_VE, bias_G)
        hidden = torch.empty(steps + 1, lanes, units, dtype=dtype)
        hidden[0] = h0_BH
        carry = None
        if cell == "GRU" and dtype == torch.float32:
            carry = hidden
        elif cell != "RNN_TANH":
            carry = torch.empty(steps + 1, lanes, units)
            carry[0] = h0_BH if c0_BH is None else c0_BH
        gates = torch.empty(steps, lanes, 4 * units, dtype=dtype) if keep and cell != "RNN_TANH" else None
        window = _Window(
            steps, lanes, units, len(given), inputs=given, tokens=tokens_TB, weight=weight_GH, bias=bias_H,
            hidden=hidden, carry=carry, gates=gates,
        )  # fmt: skip
        _call("forward", CELL_CODES[cell], dtype == torch.bfloat16, ctypes.byref(window))
        ctx.cell, ctx.gates = cell, gates
        if keep:
            ctx.save_for_backward(inputs, embedding_VE, weight_GE, weight_GH, hidden, carry)
        ctx.set_materialize_grads(False)
        return hidden[1:], None if carry is None else carry[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor | None, dcarry: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, embedding_VE, weight_GE, weight_GH, hidden, carry = ctx.saved_tensors
        cell, (width, units) = ctx.cell, weight_GH.shape
        steps, lanes = inputs.shape[:2]
        dhidden = hidden.new_zeros(steps, lanes, units) if dhidden is None else dhidden.contiguous()
        dgates, ctx.gates = ctx.gates, None  # what was kept makes room for its gradient
        if cell == "RNN_TANH":
            dgates = torch.empty_like(dhidden)
        else:
            assert dgates is not None, "the kernel's backward runs once"
            dcarry = (
                torch.zeros(lanes, units) if dcarry is None else dcarry.clone(memory_format=torch.contiguous_format)
            )
        dh0 = torch.empty(lanes, units) if ctx.needs_input_grad[5] else None
        window = _Window(
            steps, lanes, units, weight=weight_GH, hidden=hidden, carry=carry, gates=dgates,
            dhidden=dhidden, dgates=dgates, dh0=dh0, dcarry=dcarry,
        )  # fmt: skip
        _call("backward", CELL_CODES[cell], _is_bf16(hidden), ctypes.byref(window))
        dweight_GH = _weight_gradient(dgates, width, hidden)
        # A GRU's new state has two gradients: the third block is the hidden state's, the fourth the input's.
        third = range(2 * units, 3 * units) if cell == "GRU" else NO_COLUMNS
        dnew_H = _segment_sum(dgates, units, range(third.start))[0] if third else None
        dinputs = dvectors_VE = None
        if inputs.is_floating_point():
            if third:
                dgates = torch.cat([dgates[..., : third.start], dgates[..., third.stop :]], 2)
            if ctx.needs_input_grad[3]:
                dinputs = _linear(dgates, weight_GE, None, inputs.shape[2], torch.empty_like(inputs))
            dweight_GE = _weight_gradient(dgates, width, inputs)
            dbias_G = _segment_sum(dgates, width, NO_COLUMNS)[0]
        else:
            tokens = weight_GE.shape[1] if embedding_VE is None else len(embedding_VE)
            dgiven_VG = _segment_sum(dgates, width, third, inputs, tokens)
            dbias_G = dgiven_VG.sum(0)
            dweight_GE = dgiven_VG.t() if embedding_VE is None else dgiven_VG.t() @ embedding_VE
            dvectors_VE = None if embedding_VE is None else dgiven_VG @ weight_GE
        dbias_hh_G = dbias_G if dnew_H is None else torch.cat([dbias_G[: third.start], dnew_H])
        dc0 = dcarry if cell == "LSTM" else None
        return None, None, None, dinputs, dvectors_VE, dh0, dc0, dweight_GE, dweight_GH, dbias_G, dbias_hh_G


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keep: bool, hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor
    ) -> Tensor:
        (tokens, units), rows = weight_VH.shape, targets_TB.numel()
        columns = tokens + -tokens % VECTOR_WIDTH
        nats_R = torch.empty(rows)
        dlogits = hidden_TBH.new_empty(rows, columns) if keep else None
        _call(
            "linear", _is_bf16(hidden_TBH), False, True, rows, units, columns, tokens, hidden_TBH, weight_VH, bias_V,
            ctypes.c_float(1), dlogits, targets_TB, nats_R, torch.get_num_threads(),
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(hidden_TBH, weight_VH, dlogits)
        return nats_R.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnats: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TBH, weight_VH, dlogits = ctx.saved_tensors
        (tokens, units), scale = weight_VH.shape, float(dnats)
        dhidden = _linear(dlogits, weight_VH, None, units, torch.empty_like(hidden_TBH), scale)
        dweight = _weight_gradient(dlogits, dlogits.shape[1], hidden_TBH, scale)[:tokens]
        dbias = _segment_sum(dlogits, dlogits.shape[1], NO_COLUMNS, scale=scale)[0, :tokens]
        return None, dhidden, dweight, dbias, None


def fused_rnn(
    cell: str,
    dtype: torch.dtype,
    inputs: Tensor,
    embedding_VE: Tensor | None,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (T, B, H) of ``dtype`` and, but for a tanh cell, the last carry (B, H) in float32.

    The carry is an LSTM's cell or a GRU's hidden state. Inputs, state and weights are as
    ``rnn.rnn_layer`` has them, the weights in float32.
    """
    keep, c0 = torch.is_grad_enabled(), state[1] if cell == "LSTM" else None
    return _Recurrence.apply(cell, dtype, keep, inputs.contiguous(), embedding_VE, state[0], c0, *weights)


def fused_linear_cross_entropy(hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor) -> Tensor:
    """The cross-entropy of an output layer, summed: products in ``hidden``'s type, all else in float32."""
    if hidden_TBH.shape != (*targets_TB.shape, weight_VH.shape[1]):
        raise ValueError(f"hidden states {tuple(hidden_TBH.shape)} do not fit targets {tuple(targets_TB.shape)}")
    keep = torch.is_grad_enabled()
    return _FusedLinearCrossEntropy.apply(keep, hidden_TBH.contiguous(), weight_VH, bias_V, targets_TB.contiguous())


@torch.no_grad()
def generate_greedy(
    cell: str,
    layers: list[_Weights],
    embedding_VE: Tensor | None,
    weight_VH: Tensor,
    bias_V: Tensor,
    state: tuple[Tensor, ...],
    first_B: Tensor,
    length: int,
) -> Tensor:
    """The most likely tokens, each the next one's input: (length, B), after ``first_B`` and the state (L, B, H)."""
    lanes, tokens, units = len(first_B), len(weight_VH), weight_VH.shape[1]
    spoken = torch.empty(length + 1, lanes, dtype=torch.int64)
    spoken[0] = first_B
    bias_V = F.pad(bias_V, (0, -tokens % VECTOR_WIDTH))
    alive: list[Tensor | None] = []  # what the storeys point to
    storeys = (_DecoderLayer * len(layers))()
    for number, (storey, (weight_GE, weight_GH, *pair)) in enumerate(zip(storeys, layers, strict=True)):
        bias_G, bias_H = combine_biases(cell, *pair)
        inputs = torch.empty(lanes, len(bias_G)) if number else _token_projection(weight_GE, embedding_VE, bias_G)
        hidden, carry = (torch.stack([part[number]] * 2).contiguous() for part in (state[0], state[-1]))
        storey.recurrence = _Window(
            1, lanes, units, len(inputs), inputs=inputs, weight=weight_GH, bias=bias_H,
            hidden=hidden, carry=carry if cell == "LSTM" else hidden,
        )  # fmt: skip
        storey.weight, storey.bias = weight_GE.data_ptr(), bias_G.data_ptr()
        alive += [inputs, bias_G, bias_H, hidden, carry]
    for start in range(0, length, GREEDY_CHUNK):
        count = min(GREEDY_CHUNK, length - start)
        _call("speak", CELL_CODES[cell], len(layers), storeys, weight_VH, bias_V, tokens, count, spoken[start:])
    return spoken[1:]
