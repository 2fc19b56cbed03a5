"""The gradient of the mean loss over the global window, whoever holds its lanes.

Each worker differentiates its lanes' summed loss, each nat of which counts as one over the global
number of tokens, and the workers' gradients are added: workers with fewer lanes weigh less by themselves.
Beside the gradients travels a tally of four numbers, as the gradient of a parameter that is always zero.

Axes: T steps, B lanes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.distributed.shared_memory import SharedMemoryGroup
from job.distributed.tree_reduce import PartialSum, owned_subtrees, reduce_adjacent
from job.nn.dropout import Dropout
from job.nn.language_model import LanguageModel
from job.nn.state import State, cat_states, detach_state, slice_state


class ControlFlags(NamedTuple):
    """What a worker asks of all at this step; all see the sum, and so act at the same step."""

    checkpoint: bool = False
    stop: bool = False
    look: bool = False  # whether a node is about to be taken away


class StepStats(NamedTuple):
    """What all workers together found at a step."""

    nats: float  # summed over the tokens
    signals: ControlFlags

    @classmethod
    def of(cls, found: Tensor) -> "StepStats":
        """From the tally's gradient, (4); waits for a GPU."""
        nats, *signals = found.tolist()
        return cls(nats, ControlFlags(*(signal > 0 for signal in signals)))


class Batch(NamedTuple):
    """What a worker brings to a step: its part of a global window, and its word to all."""

    inputs_TB: Tensor
    targets_TB: Tensor
    signals: Tensor  # (3): ``Signals`` as numbers
    dropout_keys_LB: Tensor  # of dropout's masks; without rows where there is none

    def on(self, device: torch.device) -> "Batch":
        """All of it on that device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))

    def of(self, first: int, count: int) -> "Batch":
        """Some lanes of it, by their place; the word goes with the first."""
        lanes = slice(first, first + count)
        signals = torch.zeros_like(self.signals) if first else self.signals
        return Batch(self.inputs_TB[:, lanes], self.targets_TB[:, lanes], signals, self.dropout_keys_LB[:, lanes])


@dataclass(frozen=True)
class LaneAssignment:
    """What stays of a worker's part throughout a run."""

    groups: Sequence[range]  # its global lanes, successive
    workers: int  # of the run
    global_tokens: int  # targets in a window of all lanes
    autocast: torch.dtype | None = None
    dropout: float = 0.0
    near: SharedMemoryGroup | None = None  # all of the run's workers, where they share a memory

    @property
    def lanes(self) -> range:
        """The global lanes that this worker holds."""
        return range(self.groups[0].start, self.groups[-1].stop)


class LossModule(nn.Module):
    """What a part of the global window brings to the gradient of the mean loss.

    ``nats`` and ``tally`` are differentiated together, each from the slope that ``slopes`` gives it.
    """

    def __init__(self, model: LanguageModel, share: LaneAssignment) -> None:
        super().__init__()
        self.model = model
        self.share = share
        weight = model.linear.weight
        self.tally = nn.Parameter(torch.zeros(4, dtype=weight.dtype, device=weight.device))
        self.of_mean = weight.new_tensor(1 / share.global_tokens)

    def forward(self, window: Batch, state: State) -> tuple[tuple[Tensor, Tensor], State]:
        """The summed cross-entropy and the step's statistics, and the new state."""
        autocast, dropout = self.share.autocast, None
        if self.share.dropout:
            dropout = Dropout(self.share.dropout, window.dropout_keys_LB)
        with torch.autocast(window.inputs_TB.device.type, autocast, enabled=autocast is not None):
            nats, state = self.model.cross_entropy_sum(window.inputs_TB, window.targets_TB, state, dropout)
        return (nats, self.tally.view(4)), state  # DDP looks for what each parameter leads to

    def slopes(self, nats: Tensor, signals: Tensor) -> tuple[Tensor, Tensor]:
        """The loss counts by its tokens; the tally's gradient is what it carries."""
        return self.of_mean, torch.cat([nats.detach().view(1), signals.to(nats)])

    def found(self) -> Tensor:
        """After a backward pass: the sum of all workers' facts, (4)."""
        assert self.tally.grad is not None
        return self.tally.grad


class AllReduceGradients:
    """Whole-batch gradients: DDP, with a sum in the place of its mean."""

    def __init__(self, model: LanguageModel, share: LaneAssignment) -> None:
        self.objective = LossModule(model, share)
        self.parameters = list(self.objective.parameters())
        self.module: nn.Module = self.objective
        if share.workers > 1:
            ddp = DistributedDataParallel(
                self.objective, gradient_as_bucket_view=True, find_unused_parameters=model.has_custom_cell
            )
            ddp.register_comm_hook(share.near, _all_reduce_bucket)
            self.module = ddp

    def __call__(self, window: Batch, state: State) -> tuple[Tensor, State]:
        """Leaves the global gradient in the model's parameters; gives what ``Tally.of`` reads, and the new state."""
        for parameter in self.parameters:
            parameter.grad = None
        outputs, state = self.module(window, state)
        torch.autograd.backward(outputs, self.objective.slopes(outputs[0], window.signals))
        return self.objective.found(), detach_state(state)


def _all_reduce_bucket(near: SharedMemoryGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP's exchange of one bucket, a sum over the workers."""
    if near:
        near.all_reduce_(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class DeterministicGradients:
    """Gradients of each lane group, added in one order whatever the number of workers.

    Each group's gradient is computed by itself, in the same shapes everywhere. A worker adds those of its groups
    as far as they are nodes of the tree over all groups; all workers get all their nodes, and add up the rest.
    """

    def __init__(self, model: LanguageModel, share: LaneAssignment) -> None:
        self.objective = LossModule(model, share)
        self.parameters = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.share = share
        self.num_uses = len(self.parameters) if model.has_custom_cell else 0
        lease = _groups_of_workers(share, self.objective.tally.device)
        self.first, self.total = lease[dist.get_rank() if share.workers > 1 else 0].start, lease[-1].stop
        self.nodes_of_workers = [owned_subtrees(groups, self.total) for groups in lease]

    def __call__(self, window: Batch, state: State) -> tuple[Tensor, State]:
        """As ``Summed``."""
        nodes: list[PartialSum[Tensor]] = []
        states = []
        for number, group in enumerate(self.share.groups, self.first):
            place = group.start - self.share.lanes.start, len(group)
            flat, after = self._of_group(window.of(*place), slice_state(state, *place))
            nodes = reduce_adjacent([*nodes, (range(number, number + 1), flat)], self.total)
            states.append(after)
        [(_, flat)] = reduce_adjacent(self._of_all_workers(nodes), self.total)
        *slopes, uses = flat.split([*(parameter.numel() for parameter in self.parameters), self.num_uses])
        used = uses.tolist() if self.num_uses else [1] * len(slopes)
        for parameter, slope, times in zip(self.parameters, slopes, used, strict=True):
            parameter.grad = slope.view_as(parameter) if times else None
        return self.objective.found(), cat_states(states)

    def _of_group(self, window: Batch, state: State) -> tuple[Tensor, State]:
        """A group's gradients as one vector, and the state after.

        Zeros stand where a parameter has none, which a user's cell may leave unused; then there is behind
        them a one for each that it did use.
        """
        outputs, state = self.objective(window, state)
        slopes = self.objective.slopes(outputs[0], window.signals)
        found = torch.autograd.grad(outputs, self.parameters, slopes, allow_unused=self.num_uses > 0)
        pairs = zip(found, self.parameters, strict=True)
        flat = [(torch.zeros_like(own) if slope is None else slope).flatten() for slope, own in pairs]
        if self.num_uses:
            flat.append(flat[0].new_tensor([slope is not None for slope in found]))
        return torch.cat(flat), detach_state(state)

    def _of_all_workers(self, nodes: list[PartialSum[Tensor]]) -> list[PartialSum[Tensor]]:
        """The nodes of all workers, in the order of their groups."""
        if self.share.workers == 1:
            return nodes
        like, most = nodes[0][1], max(map(len, self.nodes_of_workers))  # to which the shorter lists are padded
        rows = torch.stack([value for _, value in nodes] + [torch.zeros_like(like)] * (most - len(nodes)))
        gathered = [torch.empty_like(rows) for _ in self.nodes_of_workers]
        if self.share.near:
            self.share.near.all_gather(rows, gathered)
        else:
            dist.all_gather(gathered, rows)
        pairs = zip(self.nodes_of_workers, gathered, strict=True)
        return [node for groups, values in pairs for node in zip(groups, values, strict=False)]


def _groups_of_workers(share: LaneAssignment, device: torch.device) -> list[range]:
    """The numbers of the lane groups that each worker holds."""
    mine = torch.tensor([len(share.groups)], device=device)
    counts = [torch.zeros_like(mine) for _ in range(share.workers)] if share.workers > 1 else [mine]
    if share.workers > 1:
        dist.all_gather(counts, mine)
    return [range(*ends) for ends in pairwise(accumulate(map(int, counts), initial=0))]
