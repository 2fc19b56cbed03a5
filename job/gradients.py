"""The gradient of the mean loss over the global window, whoever holds its lanes.

Each worker differentiates its lanes' summed loss divided by the global count of tokens, and the
workers' gradients are added: workers with fewer lanes weigh less by themselves. Beside the
gradients travels a tally of four numbers, as the gradient of a parameter that is always zero.

Axes: T steps, B lanes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.dropout import Dropout
from job.model import LanguageModel, State, detached, joined_states, lanes_of_state


class Signals(NamedTuple):
    """What a worker asks of all at this step; all see the sum, and so act at the same step."""

    checkpoint: bool = False
    stop: bool = False
    look: bool = False  # whether a node is about to be taken away


class Tally(NamedTuple):
    """What all workers together found at a step."""

    nats: float  # summed over the tokens
    signals: Signals


@dataclass(frozen=True)
class Window:
    """One worker's part of a global window."""

    inputs_TB: Tensor
    targets_TB: Tensor
    groups: Sequence[range]  # global lanes, successive
    global_tokens: int
    dropout: Callable[[range], Dropout] | None


class _Objective(nn.Module):
    """The number that is differentiated: a part's share of the global mean loss."""

    def __init__(self, model: LanguageModel, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        weight = model.linear.weight
        self.tally = nn.Parameter(torch.zeros(4, dtype=weight.dtype, device=weight.device))

    def forward(
        self,
        inputs_TB: Tensor,
        targets_TB: Tensor,
        state: State,
        dropout: Dropout | None,
        signals: Signals,
        tokens: int,
    ) -> tuple[Tensor, State]:
        device = inputs_TB.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            nats, state = self.model.nats(inputs_TB, targets_TB, state, dropout)
        facts = torch.cat([nats.detach().view(1), nats.new_tensor(signals)])
        return nats / tokens + torch.dot(self.tally, facts), state


class Summed:
    """Whole-batch gradients: DDP, with a sum in the place of its mean."""

    def __init__(self, model: LanguageModel, autocast: torch.dtype | None, workers: int) -> None:
        self.objective = _Objective(model, autocast)
        self.parameters = list(self.objective.parameters())
        self.module: nn.Module = self.objective
        if workers > 1:
            ddp = DistributedDataParallel(
                self.objective, gradient_as_bucket_view=True, find_unused_parameters=model.may_leave_weights_unused
            )
            ddp.register_comm_hook(None, _add_bucket)
            self.module = ddp

    def __call__(self, window: Window, state: State, signals: Signals) -> tuple[Tally, State]:
        """Leaves the global gradient in the model's parameters; gives the tally and the new state."""
        for parameter in self.parameters:
            parameter.grad = None
        lanes = range(window.groups[0].start, window.groups[-1].stop)
        dropout = window.dropout(lanes) if window.dropout else None
        loss, state = self.module(window.inputs_TB, window.targets_TB, state, dropout, signals, window.global_tokens)
        loss.backward()
        return _tally(self.objective.tally.grad), detached(state)


def _add_bucket(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP's exchange of one bucket, a sum over the workers."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Ordered:
    """Gradients of each lane group, added in one order whatever the number of workers.

    Floating-point addition is not associative, so bits depend on order. Here each group's
    gradient is computed by itself, in the same shapes everywhere, every worker gets all of
    them, and adds them as a binary tree over the groups' numbers (EasyScale, SC'23).
    """

    def __init__(self, model: LanguageModel, autocast: torch.dtype | None, workers: int) -> None:
        self.objective = _Objective(model, autocast)
        self.parameters = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.workers = workers

    def __call__(self, window: Window, state: State, signals: Signals) -> tuple[Tally, State]:
        """As ``Summed``."""
        flats, states = [], []
        first = window.groups[0].start
        for group in window.groups:
            begin, count = group.start - first, len(group)
            loss, after = self.objective(
                window.inputs_TB[:, begin : begin + count],
                window.targets_TB[:, begin : begin + count],
                lanes_of_state(state, begin, count),
                window.dropout(group) if window.dropout else None,
                signals if begin == 0 else Signals(),
                window.global_tokens,
            )
            grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            flats.append(_joined(grads, self.parameters))
            states.append(detached(after))
        total = _tree_sum(self._of_all_workers(flats))
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, grad, part in zip(self.parameters, grads, total.split(sizes), strict=True):
            parameter.grad = None if grad is None else part.view_as(parameter)
        return _tally(self.objective.tally.grad), joined_states(states)

    def _of_all_workers(self, flats: list[Tensor]) -> list[Tensor]:
        """The groups' gradients of all workers, in the order of the groups."""
        if self.workers == 1:
            return flats
        # Workers hold whole groups, whose number may differ by one: the shorter ones are padded.
        counts = [torch.zeros(1, dtype=torch.int64, device=flats[0].device) for _ in range(self.workers)]
        dist.all_gather(counts, counts[0].new_tensor([len(flats)]))
        held = [int(count) for count in counts]
        padded = flats + [torch.zeros_like(flats[0])] * (max(held) - len(flats))
        gathered = [
            torch.empty(max(held), flats[0].numel(), dtype=flats[0].dtype, device=flats[0].device) for _ in held
        ]
        dist.all_gather(gathered, torch.stack(padded))
        return [flat for flat_GN, count in zip(gathered, held, strict=True) for flat in flat_GN[:count]]


def _joined(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Gradients as one vector, zero where a parameter has none."""
    found = zip(grads, parameters, strict=True)
    return torch.cat([(torch.zeros_like(own) if grad is None else grad).flatten() for grad, own in found])


def _tree_sum(parts: list[Tensor]) -> Tensor:
    """The sum of neighbours, of those sums, and so on."""
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def _tally(found: Tensor | None) -> Tally:
    assert found is not None
    nats, *signals = found.tolist()
    return Tally(nats, Signals(*(signal > 0 for signal in signals)))


def tree_sum(values: Sequence[float]) -> float:
    """Numbers of the lane groups, added in the order in which their gradients are."""
    return float(_tree_sum([torch.tensor(value, dtype=torch.float64) for value in values]))
