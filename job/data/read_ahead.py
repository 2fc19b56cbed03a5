"""Reads the windows of a token store before they are needed, in a thread."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from job.data.stream import Stream, to_window
from job.data.tokens import ShardedTokens

BLOCK_BYTES = 8 << 20  # of the windows that are read at once, for all lanes of a worker; two blocks are in memory


@dataclass
class WindowReader:
    """The windows of a worker's lanes, one after the other. Those in memory are read when they are needed.

    Args:
        stream: all tokens
        lanes: global numbers of the worker's lanes
        epochs: number of epochs
    """

    stream: Stream
    lanes: range
    epochs: int
    _block: tuple[int, range, np.ndarray] | None = field(default=None, init=False)  # epoch, windows, their tokens
    _next: tuple[int, int, "Future[np.ndarray]"] | None = field(default=None, init=False)  # epoch, first window

    def read(self, epoch: int, window: int) -> tuple[Tensor, Tensor]:
        """Returns what ``Stream.read_window`` returns for these lanes.

        Raises:
            UserError: the tokens cannot be read, or are no ids of the vocabulary
        """
        if not isinstance(self.stream.tokens, ShardedTokens):
            return self.stream.read_window(epoch, window, self.lanes)
        if self._block is None or self._block[0] != epoch or window not in self._block[1]:
            self._block = epoch, self._windows(epoch, window), self._take(epoch, window)
            self._read_ahead(epoch, self._block[1].stop)
        _, windows, tokens_BT = self._block
        num_steps = self.stream.config.num_steps
        start = (window - windows.start) * num_steps
        return to_window(tokens_BT[:, start : start + num_steps + 1])

    def _windows(self, epoch: int, first: int) -> range:
        """Returns the windows of the block that begins with a window."""
        window_bytes = len(self.lanes) * self.stream.config.num_steps * self.stream.tokens.dtype.itemsize
        stop = self.stream.partition(epoch).num_windows
        return range(first, min(stop, first + max(1, BLOCK_BYTES // window_bytes)))

    def _take(self, epoch: int, first: int) -> np.ndarray:
        if self._next and self._next[:2] == (epoch, first):
            return self._next[2].result()
        return self._read_block(epoch, first)

    def _read_block(self, epoch: int, first: int) -> np.ndarray:
        return self.stream.read_windows(epoch, self._windows(epoch, first), self.lanes)

    def _read_ahead(self, epoch: int, first: int) -> None:
        """Starts to read the block after the current one."""
        if first == self.stream.partition(epoch).num_windows:
            epoch, first = epoch + 1, 0
        if epoch >= self.epochs:
            return
        future: Future[np.ndarray] = Future()

        def read() -> None:
            try:
                future.set_result(self._read_block(epoch, first))
            except BaseException as error:  # raised by `result`
                future.set_exception(error)

        threading.Thread(target=read, name="read ahead").start()
        self._next = epoch, first, future
