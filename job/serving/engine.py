"""The thread that generates all streams: it advances those of each model together, a token at a time."""

import logging
import threading
from collections.abc import Callable, Sequence

import torch

from job.inference.generate import BLOCK_TOKENS
from job.serving.conversations import ServedModel
from job.serving.streams import Batch, Stream, choose_tokens

MAX_STREAMS = 128  # that are generated at a time
_logger = logging.getLogger(__name__)


class Engine:
    """Generates streams in a thread of its own.

    Args:
        models: whose streams it generates
        on_events: called in the thread, with the streams that have new events
        max_streams: largest number at a time
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        on_events: Callable[[Sequence[Stream]], None],
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self.on_events, self.max_streams = on_events, max_streams
        self.num_streams = 0  # those that were submitted and have not ended
        self._batches = {model: Batch(model) for model in models}
        self._submitted: list[Stream] = []
        self._reading: list[Stream] = []
        self._generating: list[Stream] = []
        self._condition, self._is_closed, self._is_woken = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, stream: Stream) -> bool:
        """Starts a stream, in the order of the calls. Returns False if there are too many, or the engine is closed."""
        with self._condition:
            if self._is_closed or self.num_streams >= self.max_streams:
                return False
            self.num_streams += 1
            self._submitted.append(stream)
        self.wake()
        return True

    def cancel(self, stream: Stream) -> None:
        """Ends a stream after its current token, which frees its place."""
        stream.is_cancelled = True
        self.wake()

    def wake(self) -> None:
        """Lets the thread look at its streams again: one was cancelled, or its client has read events."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    def close(self) -> None:
        """Ends all streams, and the thread."""
        with self._condition:
            self._is_closed = True
        self.wake()
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        while self._wait():
            try:
                self._advance()
            except Exception as error:  # such as no memory: the thread must not end while clients wait for it
                self._fail(self._reading + self._generating, error)
        self._begin_submitted()
        self._end(self._reading + self._generating, "cancelled")

    def _advance(self) -> None:
        self._end([stream for stream in self._reading + self._generating if stream.is_cancelled], "cancelled")
        self._begin_submitted()
        self._read()
        for batch in self._batches.values():
            self._step(batch)

    def _wait(self) -> bool:
        """Returns once there is something to do; False if the engine is closed."""
        has_work = self._reading or any(not stream.is_paused for stream in self._generating)
        with self._condition:
            self._condition.wait_for(lambda: has_work or self._is_woken)
            self._is_woken = False
            return not self._is_closed

    def _begin_submitted(self) -> None:
        """Begins streams in the order of their requests; a stream ends the one of the same conversation before it."""
        with self._condition:
            submitted, self._submitted = self._submitted, []
        for stream in submitted:
            streams = self._reading + self._generating
            self._end([other for other in streams if other.conversation is stream.conversation], "cancelled")
            stream.begin()
            self._reading.append(stream)

    def _read(self) -> None:
        """Reads what streams begin with, but not more than about a block, for which the other streams have to wait."""
        num_read = 0
        for stream in list(self._reading):
            try:
                num_read += 1 + stream.read_block()
                if len(stream.unread) == 1:
                    self._start(stream)
            except Exception as error:
                self._fail([stream], error)
            if num_read >= BLOCK_TOKENS:
                break
        self._reading = self._reading[1:] + self._reading[:1]

    def _start(self, stream: Stream) -> None:
        """Generates the first token alone, for which there may be no state yet."""
        self._reading.remove(stream)
        self._generating.append(stream)
        if not stream.is_complete:
            logits_1V, stream.states = stream.model.ensemble.step(torch.tensor([stream.token]), stream.states)
            choose_tokens([stream], logits_1V)
        self._report([stream])

    def _step(self, batch: Batch) -> None:
        streams = [stream for stream in self._generating if self._batches[stream.model] is batch]
        try:
            batch.set_streams([stream for stream in streams if not stream.is_paused])
            if batch.streams:
                batch.step()
        except Exception as error:
            self._fail(streams, error)
        self._report(batch.streams)

    def _report(self, streams: Sequence[Stream]) -> None:
        """Passes on the events of streams, and ends those that are complete."""
        self.on_events(streams)
        complete = [stream for stream in streams if stream.is_complete]
        self._end([s for s in complete if s.text.has_stopped], "stop")
        self._end([s for s in complete if not s.text.has_stopped], "length")

    def _fail(self, streams: Sequence[Stream], error: Exception) -> None:
        _logger.error("a model failed", exc_info=error)
        for batch in self._batches.values():
            if not {*batch.streams}.isdisjoint(streams):
                batch.clear()  # whose states may not fit together
        self._end(list(streams), "failed")

    def _end(self, streams: Sequence[Stream], reason: str) -> None:
        if not streams:
            return
        for batch in self._batches.values():
            batch.set_streams([stream for stream in batch.streams if stream not in streams])
        self._reading = [stream for stream in self._reading if stream not in streams]
        self._generating = [stream for stream in self._generating if stream not in streams]
        for stream in streams:
            stream.end(reason)
        with self._condition:
            self.num_streams -= len(streams)
        self.on_events(streams)
