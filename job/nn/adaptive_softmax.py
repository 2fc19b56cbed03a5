"""Adaptive softmax: an output layer that computes rare tokens only where the target is one of them.

Token ids are in the order of falling frequency. The head has a logit for each of the most frequent tokens, and one for
each cluster of the others, whose probability its tail distributes among the tokens of the cluster. The rarer they are,
the fewer features of the hidden state a tail reads.

Source: Grave et al., "Efficient softmax approximation for GPUs", 2017; torch's ``AdaptiveLogSoftmaxWithLoss`` with
``head_bias``, whose tails have no bias

Axes: T steps, B lanes, H hidden units, F features of a tail, R rows whose target is in a cluster, V tokens of the
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from job.config.field import format_value
from job.config.model import ModelConfig
from job.errors import UserError

FEATURES_DIVISOR = 4  # by which each tail reads fewer features than the one before it
CrossEntropy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of hidden states, weight, bias and targets


def resolve_cutoffs(model_config: ModelConfig, vocabulary_size: int) -> list[int]:
    """Returns the id of the first token of each cluster; none if the softmax is full.

    Raises:
        UserError: one is not below the size of the vocabulary
    """
    if model_config.softmax == "full":
        return []
    if model_config.adaptive_cutoffs == "auto":
        return sorted({cutoff for share in (20, 4) if (cutoff := vocabulary_size // share)})
    cutoffs = list(cast(Sequence[int], model_config.adaptive_cutoffs))
    if cutoffs[-1] >= vocabulary_size:
        problem = f"model.adaptive_cutoffs = {format_value(cutoffs)}: the vocabulary has {vocabulary_size:,} tokens"
        raise UserError(problem, "give smaller ones, or leave it out")
    return cutoffs


def head_size(cutoffs: Sequence[int], vocabulary_size: int) -> int:
    """Returns the number of logits of the head: of all tokens if there are no clusters."""
    return cutoffs[0] + len(cutoffs) if cutoffs else vocabulary_size


def tail_sizes(cutoffs: Sequence[int], vocabulary_size: int, hidden_size: int) -> list[tuple[range, int]]:
    """Returns the token ids of each cluster, and the number of features that its tail reads."""
    clusters = [range(*bounds) for bounds in pairwise([*cutoffs, vocabulary_size])]
    return [
        (cluster, max(1, hidden_size // FEATURES_DIVISOR**number)) for number, cluster in enumerate(clusters, start=1)
    ]


class Tail(nn.Module):
    """The output layer of a cluster: a projection of the hidden state, and the logits of the cluster's tokens."""

    def __init__(self, cluster: range, num_features: int, hidden_size: int) -> None:
        super().__init__()
        self.cluster = cluster
        self.projection = nn.Linear(hidden_size, num_features, bias=False)
        self.linear = nn.Linear(num_features, len(cluster))

    def forward(self, hidden_TBH: Tensor) -> Tensor:
        """Returns the logits of the cluster's tokens."""
        logits: Tensor = self.linear(self.projection(hidden_TBH))
        return logits

    def cross_entropy_sum(self, hidden_TBH: Tensor, targets_TB: Tensor, cross_entropy: CrossEntropy) -> Tensor:
        """Returns the summed cross-entropy of the targets that are in the cluster, in it. There may be none."""
        rows_R = self.contains(targets_TB).flatten().nonzero()[:, 0]
        features_RF = self.projection(hidden_TBH.flatten(0, 1).index_select(0, rows_R))
        targets_R = targets_TB.flatten().index_select(0, rows_R) - self.cluster.start
        return cross_entropy(features_RF[:, None], self.linear.weight, self.linear.bias, targets_R[:, None])

    def contains(self, targets_TB: Tensor) -> Tensor:
        """Returns whether each target is in the cluster (T, B)."""
        return (targets_TB >= self.cluster.start) & (targets_TB < self.cluster.stop)


class Tails(nn.ModuleList):
    """The tails of all clusters; none if the softmax is full.

    Args:
        cutoffs: the id of the first token of each cluster
        vocabulary_size: number of tokens V
        hidden_size: number of hidden units H
    """

    def __init__(self, cutoffs: Sequence[int], vocabulary_size: int, hidden_size: int) -> None:
        super().__init__(Tail(*sizes, hidden_size) for sizes in tail_sizes(cutoffs, vocabulary_size, hidden_size))

    def __iter__(self) -> Iterator[Tail]:
        return cast(Iterator[Tail], super().__iter__())

    def cross_entropy_sum(
        self, head: nn.Linear, hidden_TBH: Tensor, targets_TB: Tensor, cross_entropy: CrossEntropy
    ) -> Tensor:
        """Returns the summed cross-entropy of targets.

        Args:
            head: the logits of frequent tokens and clusters
            hidden_TBH: hidden states
            targets_TB: token ids, int64
            cross_entropy: that of a linear layer
        """
        head_targets_TB, nats = targets_TB, []
        for number, tail in enumerate(self, start=head.out_features - len(self)):
            head_targets_TB = head_targets_TB.masked_fill(tail.contains(targets_TB), number)
            nats.append(tail.cross_entropy_sum(hidden_TBH, targets_TB, cross_entropy))
        return sum(nats, cross_entropy(hidden_TBH, head.weight, head.bias, head_targets_TB))

    def log_probabilities(self, head: nn.Linear, hidden_TBH: Tensor) -> Tensor:
        """Returns the log-probabilities (T, B, V) of all tokens, or their logits if there are no clusters.

        The arguments are those of ``cross_entropy_sum``.
        """
        logits_TBK: Tensor = head(hidden_TBH)
        if not self:
            return logits_TBK
        first, dtype = head.out_features - len(self), head.weight.dtype
        log_TBK = logits_TBK.log_softmax(2, dtype)
        rare = (
            tail(hidden_TBH).log_softmax(2, dtype) + log_TBK[..., number, None]
            for number, tail in enumerate(self, first)
        )
        return torch.cat([log_TBK[..., :first], *rare], 2)
