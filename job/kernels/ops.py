"""The compiled kernels as autograd operations with their own backward passes.

Axes: T steps, B lanes, R rows (T times B), E input features, H hidden units, G gates times hidden units,
V tokens. E and H are multiples of VECTOR_WIDTH where nothing else is said: the caller pads.
"""

import functools
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Linear
from torch.nn import functional as F

from job.kernels.abi import FUNCTIONS, STRUCTS
from job.kernels.build import load_library, unavailable_reason
from job.kernels.memory import empty_weight

StateTensors = tuple[Tensor, ...]
Weights = list[Tensor]  # of one layer, in torch's order

VECTOR_WIDTH = 32
CELL_CODES = {"RNN_TANH": 0, "GRU": 1, "LSTM": 2}
INVALID_TOKEN = 2  # enum status of api.h
NO_COLUMNS = range(0)


def kernel_unavailable_reason(device: torch.device) -> str:
    """Returns why the kernels are unavailable on this device. Empty if they are available or it is not a CPU."""
    return (unavailable_reason() or "") if device.type == "cpu" else ""


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Returns the autocast dtype if autocast is enabled on the weight's device, else the weight's dtype."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def can_use_kernel(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can compute in ``dtype`` with this weight, which must be float32 on the CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and supports_dtype(dtype)


def can_use_dropout_kernel(x: Tensor) -> bool:
    """Whether the dropout kernel can read this tensor."""
    return x.device.type == "cpu" and supports_dtype(x.dtype)


@functools.cache
def supports_dtype(dtype: torch.dtype) -> bool:
    """Whether the kernels are available and compute in this dtype on this processor."""
    library = load_library()
    return library is not None and (dtype == torch.float32 or (dtype == torch.bfloat16 and library.supports_bf16()))


@functools.cache
def uses_amx() -> bool:
    """Whether the kernels multiply bf16 with AMX, which gives other bits than AVX-512 does."""
    library = load_library()
    return library is not None and bool(library.uses_amx())


def _call(function: str, **fields: Any) -> None:
    """Calls a function of api.h that computes; the fields are those of its struct."""
    struct = FUNCTIONS[function][0]._type_
    status = getattr(load_library(), function)(struct(**fields))
    if status == INVALID_TOKEN:
        raise IndexError("a token is not in the vocabulary")
    if status:
        raise MemoryError(f"{function}: out of memory")


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _empty_packed(dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Returns memory for a weight in the dtype of a product, aligned to 64 bytes; rows and columns are padded."""
    return empty_weight(rows, columns // 2 if dtype == torch.bfloat16 else columns)


def _linear(left: Tensor, weight: Tensor, out: Tensor, gates: int, bias: Tensor | None = None) -> Tensor:
    """Writes ``left @ weight.T + bias`` to ``out``, or ``left @ weight`` if there is no bias.

    The weight may have fewer columns than ``left`` in the first case, and than ``out`` in the second, and fewer rows in
    each of its gates; the missing ones count as zeros.
    """
    inner = left.shape[-1]
    _call(
        "linear", is_bf16=_is_bf16(left), out_is_bf16=_is_bf16(out), transposed=bias is not None, gates=gates,
        rows=left.numel() // inner, inner=inner, columns=out.shape[-1], weight_rows=len(weight),
        weight_columns=weight.shape[1], num_threads=torch.get_num_threads(), left=left, weight=weight,
        bias=bias, packed=_empty_packed(left.dtype, inner, out.shape[-1]), out=out,
    )  # fmt: skip
    return out


def _weight_gradient(left: Tensor, right: Tensor, columns: int, weight: Tensor, gates: int) -> Tensor:
    """Returns ``left[:, :columns].T @ right`` in float32, in the weight's shape; more rows of ``right`` are ignored.

    The weight may have fewer columns than ``right``, and fewer rows in each of its gates.
    """
    out, stride = empty_weight(*weight.shape), left.shape[-1]
    _call(
        "weight_gradient", is_bf16=_is_bf16(left), gates=gates, rows=left.numel() // stride, left_columns=columns,
        left_stride=stride, columns=right.shape[-1], out_rows=len(weight), out_columns=weight.shape[1],
        num_threads=torch.get_num_threads(), left=left, right=right, out=out,
    )  # fmt: skip
    return out


def _segment_sum(
    source: Tensor, columns: int, skip: range, segments: Tensor | None = None, num_segments: int = 1
) -> Tensor:
    """Returns the sums of the rows of each segment in float32: (num_segments, columns).

    The columns ``skip`` of ``source`` are left out. Without ``segments`` all rows are in one segment.
    """
    out, stride = empty_weight(num_segments, columns), source.shape[-1]
    _call(
        "segment_sum", is_bf16=_is_bf16(source), rows=source.numel() // stride, columns=columns, stride=stride,
        num_segments=num_segments, num_threads=torch.get_num_threads(), skip_start=skip.start, skip_count=len(skip),
        source=source, segments=segments, out=out,
    )  # fmt: skip
    return out


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TB: Tensor, weight_VE: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_TB)
        ctx.shape = weight_VE.shape
        return F.embedding(tokens_TB, weight_VE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfeatures_TBE: Tensor) -> tuple[None, Tensor]:
        (tokens_TB,) = ctx.saved_tensors
        if supports_dtype(torch.float32):
            num_tokens, units = ctx.shape
            sums = _segment_sum(dfeatures_TBE.contiguous(), units, NO_COLUMNS, tokens_TB.contiguous(), num_tokens)
            return None, sums
        dweight_VE = empty_weight(*ctx.shape).zero_()
        return None, dweight_VE.index_add_(0, tokens_TB.flatten(), dfeatures_TBE.flatten(0, 1))


def embedding(tokens_TB: Tensor, weight_VE: Tensor) -> Tensor:
    """Returns the features (T, B, E) of tokens; on the CPU in float32 the gradient gets the memory of the last one."""
    if weight_VE.device.type == "cpu" and weight_VE.dtype == torch.float32:
        return _Embedding.apply(tokens_TB, weight_VE)
    return F.embedding(tokens_TB, weight_VE)


def pad_vectors(x: Tensor) -> Tensor:
    """Pads the last axis with zeros to a multiple of VECTOR_WIDTH."""
    padding = -x.shape[-1] % VECTOR_WIDTH
    return F.pad(x, (0, padding)) if padding else x


def combine_biases(cell: str, bias_ih_G: Tensor, bias_hh_G: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the bias of the input projection and, for a GRU, the bias (H) that its reset gate scales."""
    if cell != "GRU":
        return bias_ih_G + bias_hh_G, None
    candidate = len(bias_hh_G) // 3 * 2
    return torch.cat([bias_ih_G[:candidate] + bias_hh_G[:candidate], bias_ih_G[candidate:]]), bias_hh_G[candidate:]


def _token_projection(weight_GE: Tensor, embedding_VE: Tensor | None, bias_G: Tensor) -> Tensor:
    """Returns the input projection of each token, (V, G). That of a one-hot vector is a column of the weight."""
    if embedding_VE is None:
        return torch.add(weight_GE.t(), bias_G, out=torch.empty(weight_GE.shape[1], len(bias_G)))
    with torch.autocast("cpu", enabled=False):
        return F.linear(embedding_VE, weight_GE, bias_G)


def empty_states(initial_BH: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Returns memory for the states of all steps, (T + 1, B, H), of which the first is the initial state."""
    states = torch.empty(steps + 1, *initial_BH.shape, dtype=dtype)
    states[0] = initial_BH
    return states


class _FusedRnn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        dtype: torch.dtype,
        needs_grad: bool,
        inputs: Tensor,
        embedding_VE: Tensor | None,
        h0_BH: Tensor,
        c0_BH: Tensor | None,
        starts_TB: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        weight_GE, weight_GH, bias_ih_G, bias_hh_G = weights
        (steps, lanes), width, units = inputs.shape[:2], len(bias_hh_G), h0_BH.shape[1]
        bias_G, bias_H = combine_biases(cell, bias_ih_G, bias_hh_G)
        tokens_TB = None if inputs.is_floating_point() else inputs
        if tokens_TB is None:
            inputs = inputs.to(dtype).contiguous()
            out = torch.empty(steps * lanes, width)
            input_projection = _linear(inputs, weight_GE, out, width // units, bias_G)
        else:
            weight_GE = pad_gates(weight_GE, weight_GH.shape[1])
            input_projection = _token_projection(weight_GE, embedding_VE, bias_G)
        hidden, carry, gates = empty_states(h0_BH, steps, dtype), None, None
        if cell != "RNN_TANH":
            shared = cell == "GRU" and dtype == torch.float32
            carry = hidden if shared else empty_states(h0_BH if c0_BH is None else c0_BH, steps, torch.float32)
            gates = torch.empty(steps, lanes, 4 * units, dtype=dtype) if needs_grad else None
        _call(
            "rnn_forward", cell=CELL_CODES[cell], is_bf16=_is_bf16(hidden), steps=steps, lanes=lanes, units=units,
            weight_units=weight_GH.shape[1], table_rows=len(input_projection), num_threads=torch.get_num_threads(),
            inputs=input_projection, tokens=tokens_TB, weight=weight_GH, bias=bias_H, starts=starts_TB, hidden=hidden,
            carry=carry, gates=gates, packed=_empty_packed(dtype, width, units),
        )  # fmt: skip
        ctx.cell, ctx.gates, ctx.starts_TB = cell, gates, starts_TB
        if needs_grad:
            ctx.save_for_backward(inputs, embedding_VE, weight_GE, weight_GH, hidden, carry)
        ctx.set_materialize_grads(False)
        return hidden[1:], None if carry is None else carry[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor | None, dcarry: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, embedding_VE, weight_GE, weight_GH, hidden, carry = ctx.saved_tensors
        cell, (steps, lanes), units, weight_units = ctx.cell, inputs.shape[:2], hidden.shape[2], weight_GH.shape[1]
        gates = len(weight_GH) // weight_units
        width = gates * units
        dhidden = hidden.new_zeros(steps, lanes, units) if dhidden is None else dhidden.contiguous()
        dgates, ctx.gates = ctx.gates, None  # the gradients overwrite the saved gates
        if cell == "RNN_TANH":
            dgates = torch.empty_like(dhidden)
        else:
            assert dgates is not None, "the kernel's backward pass can run once only"
            dcarry = torch.zeros(lanes, units) if dcarry is None else torch.empty(lanes, units).copy_(dcarry)
        dh0 = torch.empty(lanes, units) if ctx.needs_input_grad[5] else None
        _call(
            "rnn_backward", cell=CELL_CODES[cell], is_bf16=_is_bf16(hidden), steps=steps, lanes=lanes, units=units,
            weight_units=weight_units, num_threads=torch.get_num_threads(), weight=weight_GH, starts=ctx.starts_TB,
            hidden=hidden, carry=carry, gates=dgates, packed=_empty_packed(hidden.dtype, width, units), dhidden=dhidden,
            dgates=dgates, dh0=dh0, dcarry=dcarry,
        )  # fmt: skip
        if ctx.starts_TB is not None:
            hidden = hidden.clone()
            hidden.view(-1, units).index_fill_(0, ctx.starts_TB.flatten().nonzero()[:, 0], 0)
        dweight_GH = _weight_gradient(dgates, hidden, width, weight_GH, gates)
        # A GRU's candidate has two gradients: the third block is its hidden part's, the fourth its input part's.
        hidden_part = range(2 * units, 3 * units) if cell == "GRU" else NO_COLUMNS
        dbias_candidate = _segment_sum(dgates, units, range(hidden_part.start))[0] if hidden_part else None
        dinputs = dembedding_VE = None
        if inputs.is_floating_point():
            if hidden_part:
                dgates = torch.cat([dgates[..., : hidden_part.start], dgates[..., hidden_part.stop :]], 2)
            if ctx.needs_input_grad[3]:
                dinputs = _linear(dgates, weight_GE, torch.empty_like(inputs), gates)
            dweight_GE = _weight_gradient(dgates, inputs, width, weight_GE, gates)
            dbias_G = _segment_sum(dgates, width, NO_COLUMNS)[0]
        else:
            num_tokens = weight_GE.shape[1] if embedding_VE is None else len(embedding_VE)
            dprojection_VG = _segment_sum(dgates, width, hidden_part, inputs, num_tokens)
            dbias_G = dprojection_VG.sum(0)
            dweight_GE = dprojection_VG.t() if embedding_VE is None else dprojection_VG.t() @ embedding_VE
            dweight_GE = dweight_GE.unflatten(0, (gates, units))[:, :weight_units].flatten(0, 1)
            dembedding_VE = None if embedding_VE is None else dprojection_VG @ weight_GE
        dbias_hh_G = dbias_G if dbias_candidate is None else torch.cat([dbias_G[: 2 * units], dbias_candidate])
        dc0 = dcarry if cell == "LSTM" else None
        return None, None, None, dinputs, dembedding_VE, dh0, dc0, None, dweight_GE, dweight_GH, dbias_G, dbias_hh_G


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the sum, so that none of all logits is kept, for the upstream gradient scale."""

    @staticmethod
    def forward(
        ctx: Any, needs_grad: bool, scale: float, hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor,
        targets_TB: Tensor,
    ) -> Tensor:  # fmt: skip
        (vocabulary_size, units), rows = weight_VH.shape, targets_TB.numel()
        columns = vocabulary_size + -vocabulary_size % VECTOR_WIDTH
        padded_TBH, nats_R = pad_vectors(hidden_TBH).contiguous(), torch.empty(rows)
        dhidden_TBH = dweight_VH = dbias = token_packed = None
        packed_shape = hidden_TBH.dtype, columns, padded_TBH.shape[2]
        if needs_grad:
            dhidden_TBH, dweight_VH = torch.empty(padded_TBH.shape), empty_weight(vocabulary_size, units)
            dbias, token_packed = torch.empty(columns), _empty_packed(*packed_shape)
            ctx.gradients, ctx.units, ctx.scale = (dhidden_TBH, dweight_VH, dbias[:vocabulary_size]), units, scale
        _call(
            "linear_cross_entropy", is_bf16=_is_bf16(hidden_TBH), rows=rows, units=units,
            padded_units=padded_TBH.shape[2], columns=columns, vocabulary_size=vocabulary_size,
            num_threads=torch.get_num_threads(), scale=scale, hidden=padded_TBH, weight=weight_VH, bias=bias_V,
            targets=targets_TB, packed=_empty_packed(*packed_shape), nats=nats_R, dhidden=dhidden_TBH,
            dweight=dweight_VH, dbias=dbias, token_packed=token_packed,
        )  # fmt: skip
        ctx.dtype = hidden_TBH.dtype
        return nats_R.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnats: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaling overwrites them
        assert gradients is not None, "the kernel's backward pass can run once only"
        if (factor := float(dnats) / ctx.scale) != 1:
            scale_gradients(gradients, factor)
        dhidden_TBH, dweight_VH, dbias_V = gradients
        return None, None, dhidden_TBH[..., : ctx.units].to(ctx.dtype), dweight_VH, dbias_V, None


def fused_rnn(
    cell: str,
    dtype: torch.dtype,
    inputs: Tensor,
    embedding_VE: Tensor | None,
    state: StateTensors,
    weights: Weights,
    starts_TB: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One recurrent layer over all steps of a window, forward and backward in one kernel call each.

    Args:
        cell: ``RNN_TANH``, ``GRU`` or ``LSTM``
        dtype: float32 or bfloat16, of the matrix products and of the hidden states
        inputs: features (T, B, E), or tokens (T, B)
        embedding_VE: the tokens' features; None: one-hot
        state: h and, for an LSTM, c, each (B, H)
        weights: torch's, in float32: of the input (G, E), whose E may be less than that of ``inputs``, and of the
            hidden state (G, H), each before H is padded, and two biases (G), whose gates are padded
        starts_TB: bool, whether the state before the step is taken to be zero; None: it never is

    Returns:
        The hidden states (T, B, H) in ``dtype``, and the last carry (B, H) in float32: an LSTM's c, a GRU's h,
        or None.

    Raises:
        IndexError: if a token is not in the vocabulary
    """
    needs_grad, c0 = torch.is_grad_enabled(), state[1] if cell == "LSTM" else None
    starts_TB = None if starts_TB is None else starts_TB.contiguous()
    inputs = inputs.contiguous()
    return _FusedRnn.apply(cell, dtype, needs_grad, inputs, embedding_VE, state[0], c0, starts_TB, *weights)


def fused_linear_cross_entropy(
    hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor, upstream: float = 1.0
) -> Tensor:
    """The summed cross-entropy of an output layer, of which neither all logits nor their gradients exist at once.

    Products are in the dtype of ``hidden_TBH`` (float32 or bfloat16), all else is in float32. The gradients are
    computed for the upstream gradient ``upstream``; for another one they are scaled, in one more pass over the memory.

    Raises:
        ValueError: if the shapes of the hidden states and the targets do not match
        IndexError: if a target is not in the vocabulary
    """
    if hidden_TBH.shape != (*targets_TB.shape, weight_VH.shape[1]):
        raise ValueError(f"hidden states {tuple(hidden_TBH.shape)} do not match targets {tuple(targets_TB.shape)}")
    needs_grad = torch.is_grad_enabled()
    return _FusedLinearCrossEntropy.apply(needs_grad, upstream, hidden_TBH, weight_VH, bias_V, targets_TB.contiguous())


def write_dropout_keys(seed: int, step: int, layer: int, first_lane: int, keys_B: Tensor) -> bool:
    """Writes the hash keys of successive lanes' dropout masks, int32, unless the kernels are unavailable.

    Returns:
        Whether the keys were written.
    """
    if load_library() is None:
        return False
    fields = {"seed": seed, "step": step, "layer": layer, "first_lane": first_lane}
    _call("dropout_keys", **fields, lanes=len(keys_B), keys=keys_B)
    return True


def can_update(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can write these tensors: contiguous, in float32, on the CPU."""
    is_float = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() for x in tensors)
    return is_float and supports_dtype(torch.float32)


def scale_gradients(
    gradients: Sequence[Tensor], scale: float, weights: Sequence[Tensor] = (), learning_rate: float = 0.0
) -> None:
    """Scales gradients and, if there are weights, subtracts the gradients times the learning rate from them.

    Args:
        gradients: tensors for which ``can_update`` is true
        scale: their factor
        weights: that of each gradient, for which ``can_update`` is true, too; none: nothing is updated
        learning_rate: of plain SGD
    """
    _call(
        "update", count=len(gradients), num_threads=torch.get_num_threads(), scale=scale, learning_rate=learning_rate,
        parameters=_parameters(gradients, weights),
    )  # fmt: skip


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all gradients together, for which ``can_update`` is true, in float64.

    It does not depend on the number of threads.
    """
    squares, threads = torch.empty((), dtype=torch.float64), torch.get_num_threads()
    _call(
        "sum_squares", count=len(gradients), num_threads=threads, parameters=_parameters(gradients), sum=squares
    )  # fmt: skip
    return squares.sqrt()


def _parameters(gradients: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Any:
    """Returns an array of the kernels' Parameter."""
    pairs = zip_longest(gradients, weights)
    parameters = [
        STRUCTS["Parameter"](size=gradient.numel(), gradient=gradient, weight=weight) for gradient, weight in pairs
    ]
    return (STRUCTS["Parameter"] * len(parameters))(*parameters)


class _FusedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TBH: Tensor, probability: float, keys_B: Tensor, is_locked: bool) -> Tensor:
        ctx.probability, ctx.is_locked = probability, is_locked
        ctx.save_for_backward(keys_B)
        return _drop(x_TBH, probability, keys_B, is_locked)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TBH: Tensor) -> tuple[Tensor | None, ...]:
        (keys_B,) = ctx.saved_tensors
        return _drop(dout_TBH, ctx.probability, keys_B, ctx.is_locked), None, None, None


def _drop(x_TBH: Tensor, probability: float, keys_B: Tensor, is_locked: bool) -> Tensor:
    (steps, lanes, units), x_TBH = x_TBH.shape, x_TBH.contiguous()
    out = torch.empty_like(x_TBH)
    _call(
        "dropout", is_bf16=_is_bf16(x_TBH), steps=steps, lanes=lanes, units=units, num_threads=torch.get_num_threads(),
        is_locked=is_locked, threshold=dropout_threshold(probability), keep=1 - probability,
        source=x_TBH, keys=keys_B, out=out,
    )  # fmt: skip
    return out


def dropout_threshold(probability: float) -> int:
    """Returns the number below which a uniform 16-bit integer, signed, is with this probability."""
    return round(probability * 65536) - 32768


def fused_dropout(x_TBH: Tensor, probability: float, keys_B: Tensor, is_locked: bool) -> Tensor:
    """``job.nn.dropout.drop`` on the CPU in float32 or bfloat16, in one pass over the memory."""
    return _FusedDropout.apply(x_TBH, probability, keys_B.contiguous(), is_locked)


def pad_gates(weight: Tensor, hidden_size: int) -> Tensor:
    """Pads each gate of a weight or bias (G, …) with zeros to a multiple of VECTOR_WIDTH units."""
    padding = -hidden_size % VECTOR_WIDTH
    if not padding:
        return weight
    widths = (0, 0) * (weight.dim() - 1) + (0, padding)
    return F.pad(weight.unflatten(0, (-1, hidden_size)), widths).flatten(0, 1)


def _pack(weight: Tensor, depth: int) -> Tensor:
    """Returns a copy of a weight (columns, inner) as ``decode`` reads it, padded with zeros."""
    (columns, inner), weight = weight.shape, weight.contiguous()
    packed = torch.zeros(columns + -columns % VECTOR_WIDTH, depth)
    num_threads = torch.get_num_threads()
    _call("pack", columns=columns, inner=inner, depth=depth, num_threads=num_threads, weight=weight, packed=packed)
    return packed


def _pack_layer(cell: str, weights: Sequence[Tensor], inputs: int) -> Any:
    """Returns a DecoderLayer with the weights of a layer of ``inputs`` input features; 0: one-hot."""
    units = weights[1].shape[1]
    weight_GE, weight_GH, *biases = (pad_gates(weight, units) for weight in weights)
    bias_G, bias_H = combine_biases(cell, *biases)
    padded = units + -units % VECTOR_WIDTH
    fields = {"units": padded, "state_units": units, "hidden_weight": _pack(weight_GH, padded), "hidden_bias": bias_H}
    if not inputs:
        return STRUCTS["DecoderLayer"](table=_token_projection(weight_GE, None, bias_G), **fields)
    return STRUCTS["DecoderLayer"](input_weight=_pack(weight_GE, inputs), input_bias=bias_G, **fields)


class PackedModel:
    """The weights of a model of recurrent layers, packed once for steps of one token in float32.

    Args:
        cell: ``RNN_TANH``, ``GRU`` or ``LSTM``
        vocabulary_size: number of tokens V
        embedding_VE: the tokens' features; None: one-hot
        layers: the weights of each layer
        output: the output layer (V, H); None: ``decode`` computes states only
        reset_token: the token before which the state is taken to be zero, if there is one
    """

    @torch.no_grad()
    def __init__(
        self,
        cell: str,
        vocabulary_size: int,
        embedding_VE: Tensor | None,
        layers: Sequence[Sequence[Tensor]],
        output: Linear | None,
        reset_token: int | None,
    ) -> None:
        embedding_size = 0 if embedding_VE is None else embedding_VE.shape[1]
        self._layers, inputs = [], embedding_size
        for weights in layers:
            self._layers.append(_pack_layer(cell, weights, inputs))
            inputs = self._layers[-1].units
        self._fields: dict[str, Any] = {
            "cell": CELL_CODES[cell], "num_layers": len(layers), "embedding_size": embedding_size,
            "vocabulary_size": vocabulary_size, "columns": 0, "reset_token": -1 if reset_token is None else reset_token,
            "layers": (STRUCTS["DecoderLayer"] * len(layers))(*self._layers),
            "embedding": None if embedding_VE is None else embedding_VE.contiguous(),
        }  # fmt: skip
        if output is not None:
            bias_V = pad_vectors(output.bias)
            self._fields |= {"columns": len(bias_V), "weight": _pack(output.weight, inputs), "bias": bias_V}

    def decode(self, tokens_TB: Tensor, states: Sequence[StateTensors]) -> Tensor:
        """Decodes greedily, each lane by itself: the bits of its results do not depend on the others.

        Args:
            tokens_TB: the first are the input, and the later ones are written
            states: h and, for an LSTM, c of each layer, each (B, H) in float32; replaced by those after the last step

        Returns:
            The logits (B, V) of the last step.

        Raises:
            IndexError: if one of the first tokens is not in the vocabulary
        """
        length, lanes = tokens_TB.shape
        layer_states = [
            STRUCTS["DecoderState"](**dict(zip(("hidden", "carry"), state, strict=False))) for state in states
        ]
        logits = torch.empty(lanes, self._fields["columns"])
        _call(
            "decode", **self._fields, lanes=lanes, length=length, tokens=tokens_TB, logits=logits,
            states=(STRUCTS["DecoderState"] * len(states))(*layer_states), num_threads=torch.get_num_threads(),
        )  # fmt: skip
        return logits[:, : self._fields["vocabulary_size"]]
