"""The actor through which a run's workers send events to its driver, and the driver sends commands to rank 0.

It carries pickled payloads without unpickling them. So its process does not import torch, starts seconds
earlier and takes a quarter of the memory.
"""

import asyncio
from typing import Any

import ray

BATCH_DELAY_S = 0.1


def dumps(value: Any) -> bytes:
    """Pickles an event or a command."""
    return bytes(ray.cloudpickle.dumps(value))


def loads(payload: bytes) -> Any:
    """Unpickles an event or a command of the same run."""
    return ray.cloudpickle.loads(payload)


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=-1)  # calls are retried if the network fails
class EventChannel:
    """Delivers each sender's events to the driver in order and once, and the driver's commands to workers."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[bytes] = asyncio.Queue()
        self.out_of_order: dict[str, dict[int, bytes]] = {}  # Ray may reorder the calls of one sender
        self.next_number: dict[str, int] = {}
        self.commands: list[bytes] = []
        self.command_sent = asyncio.Condition()
        self.closed = False

    async def post(self, sender: str, number: int, payload: bytes) -> None:
        """Queues a sender's event, numbered from 0, once those with lower numbers have arrived."""
        waiting = self.out_of_order.setdefault(sender, {})
        if number >= self.next_number.get(sender, 0):  # lower: a retry after the reply was lost
            waiting[number] = payload
        while (following := self.next_number.get(sender, 0)) in waiting:
            self.events.put_nowait(waiting.pop(following))
            self.next_number[sender] = following + 1

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

    async def send_command(self, payload: bytes) -> None:
        """Appends a command from the driver."""
        async with self.command_sent:
            self.commands.append(payload)
            self.command_sent.notify_all()

    async def commands_after(self, num_received: int) -> list[bytes]:
        """The commands after the first ones, which a worker has received. Waits for one."""
        async with self.command_sent:
            await self.command_sent.wait_for(lambda: len(self.commands) > num_received)
            return self.commands[num_received:]
