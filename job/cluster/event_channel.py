"""The actor through which a run's workers send events to its driver, and the driver sends requests to rank 0.

It carries pickled payloads without unpickling them. So its process does not import torch, starts seconds
earlier and takes a quarter of the memory.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

import ray

BATCH_DELAY_S = 0.1
MAX_SENDERS = 1 << 16  # more than the workers of a run; each restart of the workers adds new ones


@dataclass
class _Sender:
    next_number: int = 0
    waiting: dict[int, bytes] = field(default_factory=dict)  # later events: Ray may reorder the calls of one sender


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=-1)  # calls are retried if the network fails
class EventChannel:
    """Delivers each sender's events to the driver in order and once, and the driver's requests to workers."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[bytes] = asyncio.Queue()
        self.senders: OrderedDict[str, _Sender] = OrderedDict()  # the last to send is the last
        self.num_requests = (0, 0)  # for a checkpoint, and to stop
        self.request_made = asyncio.Condition()
        self.closed = False

    async def post(self, sender: str, number: int, payload: bytes) -> None:
        """Queues a sender's event, numbered from 0, once those with lower numbers have arrived."""
        state = self.senders.setdefault(sender, _Sender())
        self.senders.move_to_end(sender)
        if len(self.senders) > MAX_SENDERS:
            self.senders.popitem(last=False)
        if number >= state.next_number:  # lower: a retry after the reply was lost
            state.waiting[number] = payload
        while state.next_number in state.waiting:
            self.events.put_nowait(state.waiting.pop(state.next_number))
            state.next_number += 1

    async def poll_events(self, timeout_s: float) -> list[bytes]:
        """Takes all events, after waiting for the first one. Returns an empty list at the timeout.

        Waits a moment for more events to join the first: the driver shares its cores with the workers.
        """
        try:
            payloads = [await asyncio.wait_for(self.events.get(), timeout_s)]
        except TimeoutError:
            return []
        await asyncio.sleep(BATCH_DELAY_S)
        while not self.events.empty():
            payloads.append(self.events.get_nowait())
        return payloads

    async def close(self) -> None:
        """Marks the run as finished: workers that Ray restarts have nothing left to do."""
        self.closed = True

    async def is_closed(self) -> bool:
        """Whether the run has finished."""
        return self.closed

    async def request(self, *, checkpoint: bool = False, stop: bool = False) -> None:
        """Requests a checkpoint, or to stop. Called by the driver."""
        async with self.request_made:
            self.num_requests = (self.num_requests[0] + checkpoint, self.num_requests[1] + stop)
            self.request_made.notify_all()

    async def wait_for_requests(self, known: tuple[int, int]) -> tuple[int, int]:
        """Waits until the numbers of requests differ from those that the caller has.

        Args:
            known: the numbers of requests for a checkpoint and to stop that this returned last; (0, 0) at first
        """
        async with self.request_made:
            await self.request_made.wait_for(lambda: self.num_requests != tuple(known))
            return self.num_requests
