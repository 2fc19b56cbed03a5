"""The model that config.json describes, in plain PyTorch: it imports nothing else and is copied as it is.

Axes: B sequences, E input features, H hidden units, V tokens of the vocabulary.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid, one_hot

Weights = dict[str, Tensor]
LayerState = tuple[Tensor, Tensor]  # h and c (B, H); cells without c leave it as it is

# --- one step of a layer of each cell, from its weights, its input (B, E) and its state to its new state ---


def _rnn(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> LayerState:
    return torch.rnn_tanh_cell(x, h, w["weight_ih"], w["weight_hh"], w["bias_ih"], w["bias_hh"]), c


def _gru(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> LayerState:
    return torch.gru_cell(x, h, w["weight_ih"], w["weight_hh"], w["bias_ih"], w["bias_hh"]), c


def _lstm(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> LayerState:
    return torch.lstm_cell(x, (h, c), w["weight_ih"], w["weight_hh"], w["bias_ih"], w["bias_hh"])


def _mingru(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> LayerState:
    gate, candidate = linear(x, w["linear.weight"], w["linear.bias"]).chunk(2, 1)
    return torch.lerp(h, candidate, gate.sigmoid()), c


def _minlstm(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> LayerState:
    forget, new, candidate = linear(x, w["linear.weight"], w["linear.bias"]).chunk(3, 1)
    return torch.lerp(h, candidate, (logsigmoid(new) - logsigmoid(forget)).sigmoid()), c


def _mlstm(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> LayerState:
    sizes = [h.shape[1], 4 * h.shape[1]]
    (factor_x, gates_x), (factor_h, gates_h) = w["weight_ih"].split(sizes), w["weight_hh"].split(sizes)
    m = linear(x, factor_x) * linear(h, factor_h)
    return _lstm_gates(linear(x, gates_x, w["bias"]) + linear(m, gates_h), c)


def _mogrifier(w: Weights, x: Tensor, h: Tensor, c: Tensor) -> LayerState:
    for index in range(sum(name.startswith("rounds.") for name in w)):
        if index % 2 == 0:
            x = 2 * linear(h, w[f"rounds.{index}"]).sigmoid() * x
        else:
            h = 2 * linear(x, w[f"rounds.{index}"]).sigmoid() * h
    return _lstm_gates(linear(x, w["weight_ih"], w["bias"]) + linear(h, w["weight_hh"]), c)


def _lstm_gates(gates: Tensor, c: Tensor) -> LayerState:
    new, forget, candidate, output = gates.chunk(4, 1)
    c = forget.sigmoid() * c + new.sigmoid() * candidate.tanh()
    return output.sigmoid() * c.tanh(), c


_CELLS: dict[str, Callable[[Weights, Tensor, Tensor, Tensor], LayerState]] = {
    "rnn": _rnn,
    "gru": _gru,
    "lstm": _lstm,
    "mingru": _mingru,
    "minlstm": _minlstm,
    "mlstm": _mlstm,
    "mogrifier": _mogrifier,
}

# --- the model ---


class LanguageModel:
    """A recurrent language model, whose state belongs to the caller.

    Args:
        config: content of config.json
        weights: content of model.safetensors
    """

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.config, self.weights, self.cell = config, weights, _CELLS[config["cell"]]
        self.layers = [self._layer_weights(layer) for layer in range(len(config["hidden_size"]))]

    def _layer_weights(self, layer: int) -> Weights:
        matches = {name: re.fullmatch(rf"rnn\.(?:layers\.{layer}\.(.+)|(.+)_l{layer})", name) for name in self.weights}
        return {match[1] or match[2]: self.weights[name] for name, match in matches.items() if match}

    def __call__(
        self, tokens_B: Tensor, state: Sequence[LayerState] | None = None
    ) -> tuple[Tensor, Sequence[LayerState]]:
        """Returns the logits (B, V) after a token of each sequence, and the new state of each layer.

        Args:
            tokens_B: token ids, int64
            state: what the step before returned; None: zeros
        """
        features = self._features(tokens_B)
        if state is None:
            state = [(features.new_zeros(len(tokens_B), size),) * 2 for size in self.config["hidden_size"]]
        if self.config["reset_token"] is not None:
            keep_B1 = (tokens_B != self.config["reset_token"])[:, None]
            state = [(h * keep_B1, c * keep_B1) for h, c in state]
        new_state = []
        for weights, layer_state in zip(self.layers, state, strict=True):
            new_state.append(self.cell(weights, features, *layer_state))
            features = new_state[-1][0]
        return self._logits(features), new_state

    def _features(self, tokens_B: Tensor) -> Tensor:
        if "embedding.weight" in self.weights:
            return self.weights["embedding.weight"][tokens_B]
        return one_hot(tokens_B, self.config["vocabulary_size"]).to(self.weights["linear.weight"].dtype)

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        """Returns logits; of an adaptive softmax, log-probabilities: of frequent tokens, then cluster by cluster."""
        head, cutoffs = self._linear("linear", hidden_BH), self.config["adaptive_cutoffs"]
        if not cutoffs:
            return head
        frequent, clusters = head.log_softmax(1).split([cutoffs[0], len(cutoffs)], 1)
        projected = [linear(hidden_BH, self.weights[f"tails.{tail}.projection.weight"]) for tail in range(len(cutoffs))]
        tails = [self._linear(f"tails.{tail}.linear", features) for tail, features in enumerate(projected)]
        rare = [tail.log_softmax(1) + cluster for tail, cluster in zip(tails, clusters.split(1, 1), strict=True)]
        return torch.cat([frequent, *rare], 1)

    def _linear(self, name: str, features: Tensor) -> Tensor:
        return linear(features, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    @torch.no_grad()
    def generate(self, ids: Sequence[int], length: int) -> list[int]:
        """Returns token ids, at least one, followed by ``length`` more, each of which is the most likely one."""
        ids, state = list(ids), None
        for index in range(len(ids) + length - 1):
            logits_1V, state = self(torch.tensor([ids[index]]), state)
            logits_1V[:, self.config["suppress_tokens"]] = -torch.inf
            if index == len(ids) - 1:
                ids.append(int(logits_1V.argmax()))
        return ids
