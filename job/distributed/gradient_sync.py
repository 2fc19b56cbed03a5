"""The gradient of the mean loss over the global window, for any assignment of lanes to workers.

Each worker back-propagates its lanes' summed loss, scaled by 1 / (number of targets in the global window), and the
workers' gradients are added. A worker with fewer lanes thereby contributes less, with no further weighting.

Axes: T steps, B lanes, S sites of dropout masks.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from job.config.model import ModelConfig
from job.data.lanes import lane_groups_of_worker, split_evenly
from job.distributed.shared_memory import SharedMemoryGroup
from job.distributed.tree_exchange import TreeExchange
from job.distributed.tree_reduce import PartialSum, reduce_adjacent
from job.nn.language_model import LanguageModel
from job.nn.regularization import Regularization
from job.nn.state import State, cat_states, detach_state, slice_state


class ControlFlags(NamedTuple):
    """Requests of a worker to all workers. They are reduced with the gradients, so all act on them at the same step."""

    checkpoint: bool = False
    stop: bool = False
    check_preemption: bool = False  # ask the cluster whether a node is about to be removed


class StepStats(NamedTuple):
    """The statistics of a step, reduced over all workers."""

    nats: float  # loss, summed over the targets of the global window
    flags: ControlFlags

    @classmethod
    def from_tensor(cls, stats: Tensor) -> "StepStats":
        """Reads the (4,) tensor that a gradient computation returns; waits for a GPU."""
        nats, *flags = stats.tolist()
        return cls(nats, ControlFlags(*(flag > 0 for flag in flags)))


class Batch(NamedTuple):
    """One worker's lanes of a global window, and its control flags."""

    inputs_TB: Tensor
    targets_TB: Tensor
    flags: Tensor  # ControlFlags as numbers (3,)
    mask_keys_SB: Tensor  # S = 0 without dropout

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on that device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> "Batch":
        """Returns the batch in pinned memory, from which a GPU copies while the CPU continues."""
        return Batch(*(tensor.pin_memory() if tensor.numel() else tensor for tensor in self))

    def lanes(self, start: int, count: int) -> "Batch":
        """Returns ``count`` lanes from index ``start`` of this batch. The flags go with the first lane only."""
        span = slice(start, start + count)
        flags = torch.zeros_like(self.flags) if start else self.flags
        return Batch(self.inputs_TB[:, span], self.targets_TB[:, span], flags, self.mask_keys_SB[:, span])


@dataclass(frozen=True)
class LaneAssignment:
    """The lanes of one worker, fixed as long as the number of workers is."""

    groups: list[range]  # global lane numbers of each of its lane groups, contiguous
    num_groups: int  # lane groups of all workers
    rank: int
    world_size: int

    @property
    def lanes(self) -> range:
        """The global numbers of this worker's lanes."""
        return range(self.groups[0].start, self.groups[-1].stop)


def assign_lanes(num_lanes: int, num_groups: int = 0, rank: int = 0, world_size: int = 1) -> LaneAssignment:
    """Returns the lanes of a worker; the arguments are those of ``lane_groups_of_worker``."""
    groups = lane_groups_of_worker(num_lanes, num_groups, rank, world_size)
    return LaneAssignment(groups, min(num_groups, num_lanes) or world_size, rank, world_size)


class LossModule(nn.Module):
    """The scaled loss of a batch, with the statistics of the step reduced as part of the gradient.

    All workers need the summed loss and the control flags of every step. To save a second all-reduce for these four
    numbers, they are reduced as the gradient of a parameter, ``stats``, which is always zero and which no optimizer
    holds. ``forward`` returns it as a second output, and the gradient of a parameter that is itself an output is the
    ``grad_output`` for that output. ``grad_outputs`` passes this worker's numbers there, the gradient reduction adds
    those of all workers, and ``reduced_stats`` is the sum.

    Args:
        model: the model
        num_targets: number of targets in a global window
        model_config: what regularizes the training; None: nothing
        autocast: dtype of matrix products, None if it is that of the weights
    """

    def __init__(
        self,
        model: LanguageModel,
        num_targets: int,
        model_config: ModelConfig | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.model_config = model_config
        self.autocast = autocast
        weight = model.linear.weight
        self.stats = nn.Parameter(weight.new_zeros(4))
        self.loss_scale = weight.new_tensor(1 / num_targets)
        self.upstream = float(self.loss_scale)

    def forward(self, batch: Batch, state: State) -> tuple[tuple[Tensor, Tensor], State]:
        """Returns (the summed cross-entropy, the ``stats`` parameter) and the state after the window."""
        regularization = Regularization(self.model_config, batch.mask_keys_SB) if self.model_config else None
        with torch.autocast(batch.inputs_TB.device.type, self.autocast, enabled=self.autocast is not None):
            nats, state = self.model.cross_entropy_sum(
                batch.inputs_TB, batch.targets_TB, state, regularization, self.upstream
            )
        return (nats, self.stats.view(4)), state  # a view, because DDP needs a grad_fn

    def grad_outputs(self, nats: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of the mean loss with respect to both outputs of ``forward``."""
        return self.loss_scale, torch.cat([nats.detach().view(1), flags.to(nats)])

    @property
    def reduced_stats(self) -> Tensor:
        """The summed loss and flags of all workers (4,), after the gradient reduction."""
        assert self.stats.grad is not None
        return self.stats.grad


class AllReduceGradients:
    """Gradients of a worker's whole batch, added over the workers by DDP (which by itself would average them).

    Args:
        loss_module: computes the loss
        assignment: the worker's lanes
        shared_memory: of all workers, if they run on CPUs of one machine
        in_one_call: add them after the backward pass, all at once; unlike DDP, a CUDA graph can contain that
        num_groups: groups of lanes whose gradients are computed one after the other, to save memory, and accumulated
    """

    def __init__(
        self,
        loss_module: LossModule,
        assignment: LaneAssignment,
        shared_memory: SharedMemoryGroup | None = None,
        in_one_call: bool = False,
        num_groups: int = 1,
    ) -> None:
        self.loss_module = loss_module
        self.spans = [(group.start, len(group)) for group in split_evenly(len(assignment.lanes), num_groups) if group]
        self.parameters = list(loss_module.parameters())
        self.forward: nn.Module = loss_module
        self.in_one_call = in_one_call and assignment.world_size > 1
        if assignment.world_size > 1 and not in_one_call:
            ddp = DistributedDataParallel(
                loss_module,
                gradient_as_bucket_view=True,
                find_unused_parameters=loss_module.model.has_custom_cell,
            )
            ddp.register_comm_hook(shared_memory, _all_reduce_bucket)
            self.forward = ddp

    def __call__(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """Computes the global gradient into ``grad`` of the model's parameters.

        Args:
            batch: this worker's lanes
            state: their state before the window

        Returns:
            the reduced statistics for ``StepStats.from_tensor``, and the detached state after the window
        """
        for parameter in self.parameters:
            parameter.grad = None
        *first, last = [(batch, state)]
        if len(self.spans) > 1:
            *first, last = [(batch.lanes(*span), slice_state(state, *span)) for span in self.spans]
        with self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) else nullcontext():
            states = [self._add_gradient(*group) for group in first]
        states.append(self._add_gradient(*last))
        if self.in_one_call:
            self._all_reduce()
        return self.loss_module.reduced_stats, cat_states(states) if first else states[0]

    def _add_gradient(self, batch: Batch, state: State) -> State:
        """Adds the gradient of some lanes to ``grad`` of the parameters; returns their state after the window."""
        outputs, state = self.forward(batch, state)
        torch.autograd.backward(outputs, self.loss_module.grad_outputs(outputs[0], batch.flags))
        return detach_state(state)

    def _all_reduce(self) -> None:
        """Sums all gradients over the workers; each must have one."""
        flat = torch.cat([cast(Tensor, parameter.grad).flatten() for parameter in self.parameters])
        dist.all_reduce(flat)
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, flat.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)


def _all_reduce_bucket(
    shared_memory: SharedMemoryGroup | None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Sums a DDP bucket over the workers."""
    buffer = bucket.buffer()
    is_shared_gpu = buffer.is_cuda and dist.get_backend() == "gloo"
    if not shared_memory and not is_shared_gpu:
        work = dist.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])
    if shared_memory:
        shared_memory.all_reduce_(buffer)
    else:  # the future of gloo's work does not wait for the copy to the GPU
        dist.all_reduce(buffer)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


class DeterministicGradients:
    """Gradients that are the same bits for any number of workers.

    The gradient of each lane group is computed separately, in the same shapes everywhere. Each worker sums its groups
    into the largest subtrees of the tree over all groups, which ``TreeExchange`` sums over the workers.
    """

    def __init__(
        self, loss_module: LossModule, assignment: LaneAssignment, shared_memory: SharedMemoryGroup | None = None
    ) -> None:
        self.loss_module = loss_module
        self.parameters = [parameter for parameter in loss_module.parameters() if parameter.requires_grad]
        self.num_used_flags = len(self.parameters) if loss_module.model.has_custom_cell else 0
        self.assignment = assignment
        numbers = split_evenly(assignment.num_groups, assignment.world_size)
        self.group_numbers = numbers[assignment.rank]
        self.exchange = TreeExchange(numbers, assignment.rank, shared_memory)

    def __call__(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """Like ``AllReduceGradients``."""
        for parameter in self.parameters:
            parameter.grad = None
        partial_sums, state = self._sum_own_groups(batch, state)
        self._assign_gradients(self.exchange.sum(partial_sums))
        return self.loss_module.reduced_stats, state

    def _sum_own_groups(self, batch: Batch, state: State) -> tuple[list[PartialSum[Tensor]], State]:
        """Returns the subtrees of this worker's lane groups, and the state of all its lanes after the window."""
        partial_sums: list[PartialSum[Tensor]] = []
        states = []
        first_lane, num_groups = self.assignment.lanes.start, self.assignment.num_groups
        for number, group in zip(self.group_numbers, self.assignment.groups, strict=True):
            span = group.start - first_lane, len(group)
            gradient, group_state = self._group_gradient(batch.lanes(*span), slice_state(state, *span))
            partial_sums = reduce_adjacent([*partial_sums, (range(number, number + 1), gradient)], num_groups)
            states.append(group_state)
        return partial_sums, cat_states(states)

    def _group_gradient(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """Returns a lane group's gradient as one vector, and its state after the window.

        Parameters without a gradient contribute zeros. For custom cells, which may leave parameters unused, a 0/1 flag
        per parameter is appended.
        """
        outputs, state = self.loss_module(batch, state)
        grad_outputs = self.loss_module.grad_outputs(outputs[0], batch.flags)
        allow_unused = self.num_used_flags > 0
        gradients = torch.autograd.grad(outputs, self.parameters, grad_outputs, allow_unused=allow_unused)
        vectors = [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
            for parameter, gradient in zip(self.parameters, gradients, strict=True)
        ]
        if self.num_used_flags:
            vectors.append(vectors[0].new_tensor([gradient is not None for gradient in gradients]))
        return torch.cat(vectors), detach_state(state)

    def _assign_gradients(self, gradient: Tensor) -> None:
        """Splits a gradient vector into ``grad`` of the parameters, None for those that no lane group used."""
        *gradients, flags = gradient.split([*(parameter.numel() for parameter in self.parameters), self.num_used_flags])
        is_used = flags.tolist() if self.num_used_flags else [1] * len(gradients)
        for parameter, values, used in zip(self.parameters, gradients, is_used, strict=True):
            parameter.grad = values.view_as(parameter) if used else None
