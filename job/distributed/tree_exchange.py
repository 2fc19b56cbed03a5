"""The sum over the lane groups of all workers, in the order of the tree.

Over a network, partial sums travel along the tree: in each round the worker that holds a right sibling sends it to the
one that holds the left sibling. Rank 0 ends with the sum and broadcasts it. So each worker's memory and traffic do not
grow with the number of workers. In shared memory all workers read the partial sums of all, a slot's size at a time.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from job.distributed.shared_memory import SLOT_BYTES, SharedMemoryGroup
from job.distributed.tree_reduce import PartialSum, owned_subtrees, reduce_adjacent, transfers


class TreeExchange:
    """The exchange of one worker with the others; all must call it together.

    Args:
        groups: the lane groups of each worker, by their numbers
        rank: of this worker
        shared_memory: of all workers, if they share one; else torch's default process group is used
    """

    def __init__(self, groups: Sequence[range], rank: int, shared_memory: SharedMemoryGroup | None) -> None:
        self.num_groups = groups[-1].stop
        self.rank = rank
        self.shared_memory = shared_memory
        self.rounds = transfers(groups)
        self.subtrees = [owned_subtrees(numbers, self.num_groups) for numbers in groups]

    def sum(self, partial_sums: list[PartialSum[Tensor]]) -> Tensor:
        """Returns the sum of all workers' partial sums, the same bits for any number of workers.

        Args:
            partial_sums: the subtrees that this worker holds, each with a vector of the same length; overwritten
        """
        if len(self.subtrees) == 1:
            return partial_sums[0][1]
        vectors = [vector for _, vector in partial_sums]
        if self.shared_memory is None:
            device = vectors[0].device
            if dist.get_backend() == "gloo":  # of workers that share a GPU; it sends between CPUs only
                partial_sums = [(span, vector.cpu()) for span, vector in partial_sums]
            return self._sum_pairwise(partial_sums, partial_sums[-1][1]).to(device)
        chunk_size = SLOT_BYTES // vectors[0].element_size() // max(map(len, self.subtrees))
        for chunks in zip(*(vector.split(chunk_size) for vector in vectors), strict=True):
            chunks[0].copy_(self._sum_chunks(self.shared_memory, list(chunks)))
        return vectors[0]

    def _sum_pairwise(self, partial_sums: list[PartialSum[Tensor]], result: Tensor) -> Tensor:
        for messages in self.rounds:
            operations = []
            for span, source, target in messages:
                if source == self.rank:
                    _, result = partial_sums.pop(0)
                    operations.append(dist.P2POp(dist.isend, result, target))
                elif target == self.rank:
                    partial_sums.append((span, torch.empty_like(result)))
                    operations.append(dist.P2POp(dist.irecv, partial_sums[-1][1], source))
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
            partial_sums = reduce_adjacent(partial_sums, self.num_groups)
        if self.rank == 0:
            [(_, result)] = partial_sums
        dist.broadcast(result, 0)
        return result

    def _sum_chunks(self, shared_memory: SharedMemoryGroup, chunks: list[Tensor]) -> Tensor:
        padding = [torch.zeros_like(chunks[0])] * (max(map(len, self.subtrees)) - len(chunks))
        rows = torch.stack(chunks + padding)
        gathered = [torch.empty_like(rows) for _ in self.subtrees]
        shared_memory.all_gather(rows, gathered)
        workers = zip(self.subtrees, gathered, strict=True)
        nodes = [node for spans, values in workers for node in zip(spans, values, strict=False)]
        return reduce_adjacent(nodes, self.num_groups)[0][1]
