"""Endless iterators of training steps, ours and the plain loop's, over the same random text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import plain
from job.config.schema import Config, ModelConfig, StreamConfig, TrainConfig
from job.data.lanes import lane_groups_of_worker
from job.data.stream import Stream
from job.distributed.context import resolve_precision
from job.distributed.gradient_sync import AllReduceGradients, ControlFlags, DeterministicGradients, LaneAssignment
from job.distributed.shared_memory import create_group
from job.nn.language_model import build_model
from job.training.loop import TrainState, end_epoch, train_steps
from job.training.optimizer import build_optimizer
from job.training.progress import Progress
from job.training.train_step import EagerTrainStep


@dataclass(frozen=True)
class Shapes:
    """The sizes that determine the cost of a step."""

    cell: str
    lanes: int
    steps: int
    units: int
    tokens: int

    @property
    def recurrent_operations(self) -> int:
        """FLOPs of the recurrence: forward, and backward to states and to weights, are products of the same size."""
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[self.cell]
        return 3 * 2 * self.lanes * self.steps * gates * self.units**2

    @property
    def operations(self) -> int:
        """FLOPs including the output layer's three products; the input is a table look-up."""
        return self.recurrent_operations + 3 * 2 * self.lanes * self.steps * self.units * self.tokens

    def bytes(self, width: int) -> int:
        """Bytes that must be written once and read once: hidden states, saved gates, their gradients."""
        kept = {"rnn": 0, "gru": 4, "lstm": 4}[self.cell]
        rows = self.lanes * self.steps
        return 2 * rows * width * (self.units * (3 + 2 * kept) + self.tokens)

    def stream(self) -> Stream:
        text = np.random.default_rng(0).integers(0, self.tokens, 200 * self.lanes * self.steps).astype(np.uint8)
        return Stream(text, StreamConfig(batch_size=self.lanes, num_steps=self.steps, offset=0), 0)


def plain_steps(shapes: Shapes) -> Iterator[object]:
    torch.manual_seed(0)
    return plain.steps(plain.PlainModel(shapes.cell, shapes.tokens, shapes.units), shapes.stream(), 0.1)


def learner_of(
    config: Config, stream: Stream, tokens: int, precision: str, workers: int = 1, device: str = "cpu"
) -> TrainState:
    """A worker of ``workers``, which hold as many lanes each, before its first step."""
    place = torch.device(device)
    chosen = resolve_precision(precision, place)
    model = build_model(config.model, tokens, 0).to(place, chosen.weights)
    optimizer = build_optimizer(config.optimizer, model)
    near = create_group(60) if workers > 1 else None
    reproducible = config.train.reproducible
    groups = lane_groups_of_worker(stream.config.batch_size, config.train.lane_groups if reproducible else 0, 0, 1)
    share = LaneAssignment(groups, workers, stream.tokens_per_step, chosen.autocast, config.model.dropout, near)
    gradients = (DeterministicGradients if reproducible else AllReduceGradients)(model, share)
    update = EagerTrainStep(gradients, optimizer, config.optimizer.grad_clip_norm, place)
    return TrainState(model, optimizer, update, stream, 0, share, Progress())


def endless(train_state: TrainState, config: Config) -> Iterator[object]:
    """The training steps of epoch after epoch."""
    while True:
        yield from train_steps(train_state, config, ControlFlags)
        end_epoch(train_state)
        train_state.progress.epoch = 0


def our_steps(shapes: Shapes, precision: str, workers: int = 1, reproducible: bool = False) -> Iterator[object]:
    """As a worker of ``workers`` takes them, which hold as many lanes each."""
    args = ModelConfig(cell=shapes.cell, hidden_size=shapes.units)
    config = Config(model=args, train=TrainConfig(reproducible=reproducible))
    return endless(learner_of(config, shapes.stream(), shapes.tokens, precision, workers), config)
