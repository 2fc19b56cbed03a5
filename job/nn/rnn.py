"""Recurrent layers, by the fastest implementation available; each computes the same function of torch's weights.

On the CPU that is the compiled kernel, or torch operators without it. On a GPU it is cuDNN, through torch.

Axes: T steps, B lanes, E input features, H hidden units, G gates times hidden units, V tokens of the vocabulary,
L layers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from job.kernels.ops import (
    VECTOR_WIDTH,
    can_use_kernel,
    combine_biases,
    compute_dtype,
    embedding,
    fused_rnn,
    pad_gates,
    pad_vectors,
)
from job.nn.regularization import Regularization
from job.nn.rnn_fallback import gru_layer, tanh_layer
from job.nn.state import LayerState, State, run_documents, state_tensors


class RecurrentLayers(nn.RNNBase):
    """A stack of recurrent layers with the parameters of ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, and dropout by lane.

    If all layers have one size, the state has the tensors of those modules: h and, for an LSTM, c, each (L, B, H). Else
    it is a tuple with a tensor (1, B, H) of each layer, first all h, then all c.
    """

    MODES: ClassVar = {"rnn": "RNN_TANH", "gru": "GRU", "lstm": "LSTM"}

    def __init__(self, cell: str, input_size: int, layer_sizes: Sequence[int]) -> None:
        self.layer_sizes = tuple(layer_sizes)
        self.is_uniform = len(set(layer_sizes)) == 1  # which torch's initialization needs, as it flattens parameters
        super().__init__(self.MODES[cell], input_size, layer_sizes[0], len(layer_sizes))
        for layer, (inputs, units) in enumerate(pairwise(() if self.is_uniform else layer_sizes), 1):
            for name, weight in nn.RNNBase(self.mode, inputs, units).named_parameters():
                setattr(self, f"{name.removesuffix('0')}{layer}", weight)

    def flatten_parameters(self) -> None:
        """Does nothing for layers of different sizes: torch's function takes one size."""
        if self.is_uniform:
            super().flatten_parameters()

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        state: State = None,
        regularization: Regularization | None = None,
        embedding_VE: Tensor | None = None,
        starts_TB: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Runs all layers over a window.

        Args:
            inputs: features (T, B, E), or token ids (T, B)
            state: tensors as the class describes them; None: zeros
            regularization: this step's; None: none
            embedding_VE: the features of each token; None: one-hot. Unused if ``inputs`` are features.
            starts_TB: bool, whether the state before the step is taken to be zero; None: it never is

        Returns:
            The last layer's hidden states (T, B, H) and the state after the window.
        """
        layer_states = self.split_state(self.state_tensors(state, inputs.shape[1]))
        outputs, last_states = inputs, []
        for layer, (weight_GE, weight_GH, *biases) in enumerate(self.all_weights):
            hidden_weight_GH: Tensor = weight_GH
            if regularization is not None:
                outputs = regularization.drop_between_layers(outputs, layer) if layer else outputs
                hidden_weight_GH = regularization.drop_weight(weight_GH, layer)
            weights = [weight_GE, hidden_weight_GH, *biases]
            table_VE = None if layer else embedding_VE
            outputs, last_state = rnn_layer(self.mode, outputs, table_VE, layer_states[layer], weights, starts_TB)
            last_states.append(last_state)
        return outputs, self._join_states(last_states)

    def state_tensors(self, state: State, num_lanes: int) -> tuple[Tensor, ...]:
        """Returns the state as a tuple of tensors; raises UserError if it has other sizes."""
        units = [(self.num_layers, self.hidden_size)] if self.is_uniform else [(1, size) for size in self.layer_sizes]
        shapes = [(layers, num_lanes, size) for layers, size in units] * (2 if self.mode == "LSTM" else 1)
        return state_tensors(state, shapes, cast(Tensor, self.weight_hh_l0))

    def split_state(self, tensors: tuple[Tensor, ...]) -> list[LayerState]:
        """Returns the state of each layer, views of the ``state_tensors``."""
        if self.is_uniform:
            return [tuple(tensor[layer] for tensor in tensors) for layer in range(self.num_layers)]
        return [tuple(tensor[0] for tensor in tensors[layer :: self.num_layers]) for layer in range(self.num_layers)]

    def _join_states(self, layer_states: list[LayerState]) -> State:
        """Returns the state of all layers."""
        parts = list(zip(*layer_states, strict=True))
        if not self.is_uniform:
            return tuple(tensor[None] for part in parts for tensor in part)
        return self.as_state(tuple(map(torch.stack, parts)))

    @staticmethod
    def as_state(tensors: tuple[Tensor, ...]) -> State:
        """Returns ``state_tensors`` as the state of which they are."""
        return tensors if len(tensors) > 1 else tensors[0]


def rnn_layer(
    cell: str,
    inputs: Tensor,
    embedding_VE: Tensor | None,
    state: LayerState,
    weights: list[Tensor],
    starts_TB: Tensor | None = None,
) -> tuple[Tensor, LayerState]:
    """Runs one layer over a window.

    Args:
        cell: RNN_TANH, GRU or LSTM
        inputs: features (T, B, E), or token ids (T, B)
        embedding_VE: the features of each token; None: one-hot. Unused if ``inputs`` are features.
        state: the layer's state before the window
        weights: as torch orders them: input weight (G, E), hidden weight (G, H), two biases (G)
        starts_TB: bool, whether the state before the step is taken to be zero; None: it never is

    Returns:
        Hidden states (T, B, H) in the compute dtype and the layer's state after the window.

    Raises:
        IndexError: a token is not in the vocabulary
    """
    dtype = compute_dtype(weights[0])
    if inputs.is_floating_point():
        embedding_VE = None
    # Projecting the embeddings of all tokens pays only if there are fewer of them than inputs.
    if embedding_VE is not None and len(embedding_VE) > inputs.numel():
        inputs, embedding_VE = embedding(inputs, embedding_VE), None
    if can_use_kernel(weights[0], dtype):
        return _rnn_layer_kernel(cell, dtype, inputs, embedding_VE, state, weights, starts_TB)
    if inputs.device.type == "cpu" and (cell == "RNN_TANH" or (cell == "GRU" and dtype != torch.float64)):
        return _rnn_layer_fallback(cell, dtype, inputs, embedding_VE, state, weights, starts_TB)
    if embedding_VE is not None:
        inputs = F.embedding(inputs, embedding_VE)
    elif not inputs.is_floating_point():
        inputs = F.one_hot(inputs, weights[0].shape[1]).to(weights[0].dtype)
    if inputs.is_cuda:
        return _rnn_layer_cudnn(cell, dtype, inputs, state, weights, starts_TB)
    return _rnn_layer_torch(cell, inputs, state, weights, starts_TB)


def _rnn_layer_kernel(
    cell: str,
    dtype: torch.dtype,
    inputs: Tensor,
    embedding_VE: Tensor | None,
    state: LayerState,
    weights: list[Tensor],
    starts_TB: Tensor | None,
) -> tuple[Tensor, LayerState]:
    hidden_size = weights[1].shape[1]
    padding = -hidden_size % VECTOR_WIDTH
    if padding:  # the kernel works on whole vectors; the padded units stay zero
        weights = [*weights[:2], *(pad_gates(bias, hidden_size) for bias in weights[2:])]
        state = tuple(F.pad(tensor, (0, padding)) for tensor in state)
    if inputs.is_floating_point():
        inputs = pad_vectors(inputs)
    hidden_TBH, carry_BH = fused_rnn(cell, dtype, inputs, embedding_VE, state, weights, starts_TB)
    carry_BH = hidden_TBH[-1] if carry_BH is None else carry_BH
    last_state: LayerState = (hidden_TBH[-1], carry_BH) if cell == "LSTM" else (carry_BH,)
    if padding:
        hidden_TBH, last_state = hidden_TBH[..., :hidden_size], tuple(tensor[:, :hidden_size] for tensor in last_state)
    return hidden_TBH, last_state


def _rnn_layer_fallback(
    cell: str,
    dtype: torch.dtype,
    inputs: Tensor,
    embedding_VE: Tensor | None,
    state: LayerState,
    weights: list[Tensor],
    starts_TB: Tensor | None,
) -> tuple[Tensor, LayerState]:
    weight_GE, weight_GH, bias_ih_G, bias_hh_G = weights
    bias_G, bias_new_H = combine_biases(cell, bias_ih_G, bias_hh_G)
    if inputs.is_floating_point():
        preacts_TBG = F.linear(inputs, weight_GE, bias_G).to(dtype)
    elif embedding_VE is None and inputs.numel() < weight_GE.shape[1]:
        preacts_TBG = (weight_GE.t()[inputs] + bias_G).to(dtype)
    else:
        table_VG = weight_GE.t() + bias_G if embedding_VE is None else F.linear(embedding_VE, weight_GE, bias_G)
        # The sum with a transposed weight is not contiguous, and a lookup in it would be slow.
        preacts_TBG = F.embedding(inputs, table_VG.to(dtype).contiguous())
    weight_GH = weight_GH.to(dtype)

    def run(preacts_TBG: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        if bias_new_H is None:
            hidden_TBH = tanh_layer(preacts_TBG, state[0][0], weight_GH)
        else:
            hidden_TBH = gru_layer(preacts_TBG, state[0][0], weight_GH, bias_new_H.to(dtype))
        return hidden_TBH, (hidden_TBH[-1:],)

    hidden_TBH, (last_1BH,) = run_documents(run, preacts_TBG, (state[0].to(dtype)[None],), starts_TB)
    return hidden_TBH, (last_1BH[0],)


def _rnn_layer_torch(
    cell: str, inputs_TBE: Tensor, state: LayerState, weights: list[Tensor], starts_TB: Tensor | None = None
) -> tuple[Tensor, LayerState]:
    layer: Any = {"RNN_TANH": torch.rnn_tanh, "GRU": torch.gru, "LSTM": torch.lstm}[cell]
    flags: dict[str, Any] = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "bidirectional": False}
    flags |= {"train": torch.is_grad_enabled(), "batch_first": False}

    def run(inputs_TBE: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        hidden_TBH, *last_state = layer(inputs_TBE, state if cell == "LSTM" else state[0], weights, **flags)
        return hidden_TBH, tuple(last_state)

    hidden_TBH, last_state = run_documents(run, inputs_TBE, tuple(tensor[None] for tensor in state), starts_TB)
    return hidden_TBH, tuple(tensor[0] for tensor in last_state)


def _rnn_layer_cudnn(
    cell: str,
    dtype: torch.dtype,
    inputs_TBE: Tensor,
    state: LayerState,
    weights: list[Tensor],
    starts_TB: Tensor | None = None,
) -> tuple[Tensor, LayerState]:
    """Runs cuDNN in ``dtype``, whatever autocast's is; torch's own autocast always runs cuDNN layers in float16."""
    cast_state = tuple(tensor.to(dtype) for tensor in state)
    with torch.autocast("cuda", enabled=False):
        hidden_TBH, last_state = _rnn_layer_torch(
            cell, inputs_TBE.to(dtype), cast_state, _flatten_weights(weights, dtype), starts_TB
        )
    return hidden_TBH, tuple(last.to(first.dtype) for last, first in zip(last_state, state, strict=True))


def _flatten_weights(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Converts weights into views of one contiguous tensor; cuDNN would otherwise copy them at each call.

    ``nn.LSTM`` does not do so in bfloat16: ``flatten_parameters`` takes only the dtypes that cuDNN had before that one.
    """
    return list(_FlattenWeights.apply(dtype, *weights))


class _FlattenWeights(torch.autograd.Function):
    """Converts all weights in one kernel, and all their gradients in another one."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        return _copy_to_flat(weights, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copy_to_flat(gradients, ctx.dtype)


def _copy_to_flat(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns copies that are successive in the memory of one tensor."""
    sizes = [tensor.numel() for tensor in tensors]
    chunks = tensors[0].new_empty(sum(sizes), dtype=dtype).split(sizes)
    copies = tuple(chunk.view_as(tensor) for chunk, tensor in zip(chunks, tensors, strict=True))
    torch._foreach_copy_(copies, tensors)
    return copies
