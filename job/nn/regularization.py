"""What regularizes a training step: the sites of its dropout masks, and what is dropped there.

The techniques are those of AWD-LSTM (Merity et al., "Regularizing and optimizing LSTM language models", 2017).

Each site has a number, which with the seed, the step and the lane makes the hash key of its mask: 0 is before the
output layer, the number of a layer is below that layer, L is the inputs, L + 1 the words of the embedding, and
L + 2 + the number of a layer is its hidden weight. The first layer is 0.

Axes: T steps, B lanes, E input features, H hidden units, G gates times hidden units, V tokens of the vocabulary,
L layers, S sites.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from job.config.model import ModelConfig
from job.nn.dropout import drop, dropout_keys


def dropout_rates(model_config: ModelConfig) -> list[float]:
    """Returns the probability of dropout at each site."""
    between = [model_config.dropout] * (model_config.num_layers - 1)
    shared = [model_config.embedding_dropout, *[model_config.weight_drop] * model_config.num_layers]
    return [model_config.output_rate, *between, model_config.input_dropout, *shared]


def mask_keys(model_config: ModelConfig, seed: int, step: int, lanes: range) -> Tensor:
    """Returns the hash keys of one step's masks, a function of seed, step and lane only.

    Args:
        model_config: where there is dropout
        seed: ``run.seed``
        step: number of the step
        lanes: global lane numbers

    Returns:
        Keys (S, B), int32; S is 0 without dropout. Sites whose masks all lanes share have the key of lane 0 in each
        column, so that any part of the lanes has them.
    """
    rates = dropout_rates(model_config)
    keys_SB = torch.zeros(len(rates) if any(rates) else 0, len(lanes), dtype=torch.int32)
    for site, rate in enumerate(rates):
        if rate:
            is_shared = site > model_config.num_layers
            keys_SB[site] = dropout_keys(seed, step, site, range(1) if is_shared else lanes)
    return keys_SB


@dataclass(frozen=True)
class Regularization:
    """The regularization of one step, for the lanes of ``keys_SB``.

    Args:
        config: where there is dropout, and how much
        keys_SB: from ``mask_keys``
    """

    config: ModelConfig
    keys_SB: Tensor

    @property
    def needs_features(self) -> bool:
        """Whether masks are applied to features of the inputs: tokens are not enough for the first layer."""
        return bool(self.config.input_dropout or self.config.embedding_dropout)

    def drop_inputs(self, features_TBE: Tensor, tokens_TB: Tensor, vocabulary_size: int) -> Tensor:
        """Drops whole words and then elements of the embedded tokens.

        A word is dropped for all lanes and steps, as if its row of the embedding was (Gal and Ghahramani, "A
        theoretically grounded application of dropout in recurrent neural networks", 2016).
        """
        if self.config.embedding_dropout:
            site = self.config.num_layers + 1
            ones_11V = features_TBE.new_ones(1, 1, vocabulary_size)
            scales_V = drop(ones_11V, self.config.embedding_dropout, self.keys_SB[site, :1]).flatten()
            features_TBE = features_TBE * scales_V[tokens_TB][..., None]
        return self._drop(features_TBE, self.config.input_dropout, self.config.num_layers)

    def drop_between_layers(self, hidden_TBH: Tensor, layer: int) -> Tensor:
        """Drops elements of what ``layer``, from 1, reads of the layer below it."""
        return self._drop(hidden_TBH, self.config.dropout, layer)

    def drop_weight(self, weight_GH: Tensor, layer: int) -> Tensor:
        """Drops elements of a layer's hidden weight, the same ones at all steps (Wan et al., "Regularization of neural
        networks using DropConnect", 2013)."""
        if not self.config.weight_drop:
            return weight_GH
        key_1 = self.keys_SB[self.config.num_layers + 2 + layer, :1]
        return drop(weight_GH.view(1, 1, -1), self.config.weight_drop, key_1).view_as(weight_GH)

    def drop_outputs(self, hidden_TBH: Tensor) -> Tensor:
        """Drops elements of what the output layer reads."""
        return self._drop(hidden_TBH, self.config.output_rate, 0)

    def add_penalty(
        self, nats: Tensor, hidden_TBH: Tensor, dropped_TBH: Tensor, starts_TB: Tensor | None = None
    ) -> Tensor:
        """Adds the gradient of activation regularization (AR) and temporal activation regularization (TAR).

        Each is a mean over the window, lanes and units (Merity, McCann and Socher, "Revisiting activation
        regularization for language RNNs", 2017). The gradient of ``nats`` is divided by the number of targets of all
        workers, so the penalty is the mean times the number of targets of these lanes.

        Args:
            nats: the summed cross-entropy
            hidden_TBH: outputs of the last layer
            dropped_TBH: the same after dropout
            starts_TB: bool, whether a document starts, so that the outputs before it do not count; None: none does

        Returns:
            The value of ``nats``, with the gradient of its sum with the penalty.
        """
        means = []
        if self.config.activation_regularization:
            means.append(self.config.activation_regularization * dropped_TBH.to(nats.dtype).square().mean())
        if self.config.temporal_regularization and len(hidden_TBH) > 1:
            differences = hidden_TBH.to(nats.dtype).diff(dim=0)
            if starts_TB is not None:
                differences = differences.masked_fill(starts_TB[1:, :, None], 0)
            means.append(self.config.temporal_regularization * differences.square().mean())
        if not means:
            return nats
        penalty = hidden_TBH.shape[0] * hidden_TBH.shape[1] * torch.stack(means).sum()
        return nats + (penalty - penalty.detach())

    def _drop(self, x_TBH: Tensor, probability: float, site: int) -> Tensor:
        return drop(x_TBH, probability, self.keys_SB[site], self.config.dropout_locked) if probability else x_TBH
