"""Tokens and lanes to windows, from any window on.

Axes: T steps of a window, B lanes.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from job.config.schema import StreamConfig, TrainConfig
from job.data.lanes import Partition, sequential_partition
from job.errors import UserError


@dataclass(frozen=True)
class Stream:
    """One long row of tokens and how each epoch cuts it; the same for every worker."""

    tokens: np.ndarray
    config: StreamConfig
    seed: int

    def offset(self, epoch: int) -> int:
        """Where the epoch's first lane begins, a pure function of seed and epoch."""
        chosen = self.config.offset
        if isinstance(chosen, tuple):
            return chosen[epoch]
        if isinstance(chosen, int):
            return chosen
        digest = hashlib.sha256(f"offset {self.seed} {epoch}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % (self.config.num_steps + 1)

    def partition(self, epoch: int) -> Partition:
        """How the epoch cuts the stream into lanes and windows."""
        options = self.config
        return sequential_partition(len(self.tokens), self.offset(epoch), options.batch_size, options.num_steps)

    @property
    def tokens_per_step(self) -> int:
        """Targets in one window of all lanes."""
        return self.config.batch_size * self.config.num_steps

    def total_steps(self, train: TrainConfig) -> int:
        """Windows of all epochs, or ``max_steps`` where that is less."""
        steps = 0
        for epoch in range(train.epochs):
            steps += self.partition(epoch).num_windows
            if train.max_steps and steps >= train.max_steps:
                return train.max_steps
        return steps

    def read_window(self, epoch: int, index: int, lanes: range) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some lanes in one window: two (T, B) int64."""
        layout, steps = self.partition(epoch), self.config.num_steps
        first = layout.offset + lanes.start * layout.lane_length + index * steps
        # Successive lanes lie lane_length tokens apart: a view, and only these lanes are read.
        stride = self.tokens.itemsize
        view_TB = np.ndarray(
            (steps + 1, len(lanes)),
            self.tokens.dtype,
            self.tokens[first:],
            strides=(stride, layout.lane_length * stride),
        )
        window_TB = torch.from_numpy(view_TB.astype(np.int64, order="C"))
        return window_TB[:-1], window_TB[1:]

    def check_enough_tokens(self, train: TrainConfig) -> None:
        """UserError unless every epoch has a window."""
        options = self.config
        for epoch in range(train.epochs if options.offset != "random" else 1):
            offset = options.num_steps if options.offset == "random" else self.offset(epoch)
            layout = sequential_partition(len(self.tokens), offset, options.batch_size, options.num_steps)
            if not layout.num_windows:
                needed = options.batch_size * options.num_steps + offset + 1
                raise UserError(
                    f"stream.batch_size = {options.batch_size} and stream.num_steps = {options.num_steps} "
                    f"need {needed:,} tokens at offset {offset}, and the corpus has {len(self.tokens):,}: "
                    "lower them or give more text"
                )
