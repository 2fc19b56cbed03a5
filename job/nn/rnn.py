"""A recurrent layer, by the fastest way at hand: always the same function of torch's own weights.

On a processor that is the compiled kernel, else torch's operators; on a GPU it is cuDNN, through torch.

Axes: T steps, B lanes, E input features, H hidden units, G gates times hidden units, V tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from job.kernels.ops import VECTOR_WIDTH, combine_biases, fused_rnn, supports_dtype
from job.nn.rnn_fallback import gru_layer, tanh_layer

NUM_GATES = {"RNN_TANH": 1, "GRU": 3, "LSTM": 4}
State = tuple[Tensor, ...]


def rnn_layer(
    cell: str, inputs: Tensor, embedding_VE: Tensor | None, state: State, weights: list[Tensor]
) -> tuple[Tensor, State]:
    """Hidden states (T, B, H), and the last state: tensors (B, H) as ``state``, which is h and an LSTM's c.

    ``inputs`` are features (T, B, E), or tokens (T, B) whose features ``vectors_VE`` has; they are one-hot
    where it is None. ``weights`` are torch's: (G, E) of the input, (G, H) of the hidden state, two biases (G).
    """
    kind, own = inputs.device.type, weights[0].dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
    if embedding_VE is not None and len(embedding_VE) > inputs.numel():  # a table of all tokens would be the larger
        inputs, embedding_VE = F.embedding(inputs, embedding_VE), None
    if kind == "cpu" and own == torch.float32 and supports_dtype(dtype):
        return _rnn_layer_kernel(cell, dtype, inputs, embedding_VE, state, weights)
    if kind == "cpu" and (cell == "RNN_TANH" or (cell == "GRU" and dtype != torch.float64)):
        return _rnn_layer_fallback(cell, dtype, inputs, embedding_VE, state, weights)
    return _rnn_layer_torch(cell, inputs, embedding_VE, state, weights)


def _rnn_layer_kernel(
    cell: str, dtype: torch.dtype, inputs: Tensor, embedding_VE: Tensor | None, state: State, weights: list[Tensor]
) -> tuple[Tensor, State]:
    units = weights[1].shape[1]
    missing = -units % VECTOR_WIDTH
    if missing:  # the kernel works on whole vectors: beside them stand units that stay zero
        weights = [_pad_gates(weight, NUM_GATES[cell], missing) for weight in weights]
        weights[1] = F.pad(weights[1], (0, missing))
        state = tuple(F.pad(part, (0, missing)) for part in state)
    if inputs.is_floating_point() and inputs.shape[2] % VECTOR_WIDTH:
        filling = (0, -inputs.shape[2] % VECTOR_WIDTH)
        inputs, weights = F.pad(inputs, filling), [F.pad(weights[0], filling), *weights[1:]]
    hidden, carry = fused_rnn(cell, dtype, inputs, embedding_VE, state, weights)
    last = hidden[-1] if carry is None or cell == "LSTM" else carry
    after: State = (last, carry) if carry is not None and cell == "LSTM" else (last,)
    if missing:
        hidden, after = hidden[..., :units], tuple(part[:, :units] for part in after)
    return hidden, after


def _rnn_layer_fallback(
    cell: str, dtype: torch.dtype, inputs: Tensor, embedding_VE: Tensor | None, state: State, weights: list[Tensor]
) -> tuple[Tensor, State]:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    bias_G, bias_new_H = combine_biases(cell, bias_ih, bias_hh)
    if inputs.is_floating_point():
        gates_TBG = F.linear(inputs, weight_ih, bias_G).to(dtype)
    else:
        table_VG = weight_ih.t() + bias_G if embedding_VE is None else F.linear(embedding_VE, weight_ih, bias_G)
        gates_TBG = F.embedding(inputs, table_VG.to(dtype).contiguous())  # which a sum with a transposed one is not
    h0, weight = state[0].to(dtype), weight_hh.to(dtype)
    if bias_new_H is None:
        hidden = tanh_layer(gates_TBG, h0, weight)
    else:
        hidden = gru_layer(gates_TBG, h0, weight, bias_new_H.to(dtype))
    return hidden, (hidden[-1],)


def _rnn_layer_torch(
    cell: str, inputs: Tensor, embedding_VE: Tensor | None, state: State, weights: list[Tensor]
) -> tuple[Tensor, State]:
    if embedding_VE is not None:
        inputs = F.embedding(inputs, embedding_VE)
    elif not inputs.is_floating_point():
        inputs = F.one_hot(inputs, weights[0].shape[1]).to(weights[0].dtype)
    if torch.is_autocast_enabled("cuda") and inputs.is_cuda:
        return _rnn_layer_cudnn_autocast(torch.get_autocast_dtype("cuda"), cell, inputs, state, weights)
    options = (True, 1, 0.0, torch.is_grad_enabled(), False, False)
    if cell == "LSTM":
        hidden, *after = torch.lstm(inputs, [part[None] for part in state], weights, *options)
    else:
        run = torch.gru if cell == "GRU" else torch.rnn_tanh
        hidden, *after = run(inputs, state[0][None], weights, *options)
    return hidden, tuple(part[0] for part in after)


def _rnn_layer_cudnn_autocast(
    dtype: torch.dtype, cell: str, inputs: Tensor, state: State, weights: list[Tensor]
) -> tuple[Tensor, State]:
    """In the type that is wanted: autocast itself gives cuDNN's recurrences float16, whatever it was told."""
    low = tuple(part.to(dtype) for part in state)
    with torch.autocast("cuda", enabled=False):
        hidden, after = _rnn_layer_torch(cell, inputs.to(dtype), None, low, _flatten_weights(weights, dtype))
    return hidden, tuple(part.to(before.dtype) for part, before in zip(after, state, strict=True))


def _flatten_weights(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights of another type, side by side as cuDNN has them, which else copies them at each call."""
    flat = torch.cat([weight.flatten() for weight in weights]).to(dtype)
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def _pad_gates(weight: Tensor, gates: int, missing: int) -> Tensor:
    """A weight or bias (G, …) with zeros for more units in each gate."""
    widening = (0, 0) * (weight.dim() - 1) + (0, missing)
    return F.pad(weight.unflatten(0, (gates, -1)), widening).flatten(0, 1)
