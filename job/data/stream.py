"""The windows of a stream of tokens, in any order and for any lanes.

Axes: T steps of a window, B lanes.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from job.config.text import StreamConfig
from job.config.training import TrainConfig
from job.data.lanes import Partition, sequential_partition
from job.data.tokens import ShardedTokens, Tokens
from job.errors import UserError

MAX_COUNTED_EPOCHS = 20_000  # so that a run of any length starts at once


@dataclass(frozen=True)
class Stream:
    """All training tokens in order, and how each epoch partitions them; the same on every worker.

    Args:
        tokens: token ids, in memory or of a store
        config: the number of lanes and steps, and the offset
        seed: ``run.seed``, for random offsets
    """

    tokens: Tokens
    config: StreamConfig
    seed: int

    def offset(self, epoch: int) -> int:
        """Returns the first token of an epoch, a pure function of seed and epoch."""
        offset = self.config.offset
        if isinstance(offset, tuple):
            return offset[epoch]
        if isinstance(offset, int):
            return offset
        digest = hashlib.sha256(f"offset {self.seed} {epoch}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % (self.config.num_steps + 1)

    def partition(self, epoch: int) -> Partition:
        """Returns the lanes and windows of an epoch."""
        return sequential_partition(len(self.tokens), self.offset(epoch), self.config.batch_size, self.config.num_steps)

    @property
    def tokens_per_step(self) -> int:
        """Number of targets in one window of all lanes."""
        return self.config.batch_size * self.config.num_steps

    @property
    def dropped_share(self) -> float:
        """Share of the targets that the first epoch does not use: before its offset, and after the last window."""
        return 1 - self.partition(0).num_windows * self.tokens_per_step / (len(self.tokens) - 1)

    def total_steps(self, train_config: TrainConfig) -> int:
        """Returns the number of windows in all epochs, at most ``train.max_steps``.

        Of more than ``MAX_COUNTED_EPOCHS`` epochs with different offsets, the mean of the first is taken for all.
        """
        epochs = train_config.epochs
        num_counted = 1 if isinstance(self.config.offset, int) else min(epochs, MAX_COUNTED_EPOCHS)
        steps = sum(self.partition(epoch).num_windows for epoch in range(num_counted)) * epochs // num_counted
        return min(steps, train_config.max_steps or steps)

    def read_window(self, epoch: int, window: int, lanes: range) -> tuple[Tensor, Tensor]:
        """Reads one window of successive lanes.

        Args:
            epoch: number of the epoch
            window: number of the window within the epoch
            lanes: global lane numbers

        Returns:
            Inputs and targets, each (T, B) int64.
        """
        return to_window(self.read_windows(epoch, range(window, window + 1), lanes))

    def read_windows(self, epoch: int, windows: range, lanes: range) -> np.ndarray:
        """Reads successive windows of successive lanes.

        Returns:
            Token ids (B, windows * num_steps + 1) in the dtype of the stream: the inputs, and the last target.
        """
        partition, num_steps = self.partition(epoch), self.config.num_steps
        stride, length = partition.lane_length, len(windows) * num_steps + 1
        start = partition.offset + lanes.start * stride + windows.start * num_steps
        if isinstance(self.tokens, ShardedTokens):
            return self.tokens.read_rows(start, stride, len(lanes), length)
        # A strided view reads only the tokens of these lanes.
        itemsize = self.tokens.itemsize
        shape, strides = (len(lanes), length), (stride * itemsize, itemsize)
        return np.ndarray(shape, self.tokens.dtype, self.tokens[start:], strides=strides)

    def check_enough_tokens(self, train_config: TrainConfig) -> None:
        """Raises UserError if an epoch may have no window."""
        num_lanes, num_steps = self.config.batch_size, self.config.num_steps
        offset = self.config.offset
        if isinstance(offset, tuple):
            offset = max(offset[: train_config.epochs])
        largest_offset = num_steps if isinstance(offset, str) else offset
        num_required = self.tokens_per_step + largest_offset + 1
        if len(self.tokens) < num_required:
            sizes = f"stream.batch_size = {num_lanes} and stream.num_steps = {num_steps}"
            problem = f"{sizes} need {num_required:,} tokens at offset {largest_offset}"
            raise UserError(f"{problem}, and the corpus has {len(self.tokens):,}", "lower them or give more text")


def to_window(tokens_BT: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets, each (T, B) int64, of the T + 1 token ids of each lane."""
    tokens_TB = torch.from_numpy(tokens_BT.T.astype(np.int64, order="C"))
    return tokens_TB[:-1], tokens_TB[1:]
