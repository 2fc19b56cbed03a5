"""Endless iterators of steps, ours and the plain one, over the same random text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import plain
from job import config, model, neighbours, optimizer
from job.gradients import Ordered, Share, Signals, Summed
from job.lanes import groups_of
from job.loop import Learner, Progress, end_epoch, steps
from job.stream import Stream
from job.update import Direct
from job.world import precision_of


@dataclass(frozen=True)
class Shapes:
    """What a step's cost depends on."""

    cell: str
    lanes: int
    steps: int
    units: int
    tokens: int

    @property
    def recurrent_operations(self) -> int:
        """Forward, and backward to states and weights: a product of the same size each."""
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[self.cell]
        return 3 * 2 * self.lanes * self.steps * gates * self.units**2

    @property
    def operations(self) -> int:
        """With the output layer's three products; the input is a look-up."""
        return self.recurrent_operations + 3 * 2 * self.lanes * self.steps * self.units * self.tokens

    def bytes(self, width: int) -> int:
        """What is written once and read once at the least: hidden states, kept gates, their gradients."""
        kept = {"rnn": 0, "gru": 4, "lstm": 4}[self.cell]
        rows = self.lanes * self.steps
        return 2 * rows * width * (self.units * (3 + 2 * kept) + self.tokens)

    def stream(self) -> Stream:
        text = np.random.default_rng(0).integers(0, self.tokens, 200 * self.lanes * self.steps).astype(np.uint8)
        return Stream(text, config.Stream(batch_size=self.lanes, num_steps=self.steps, offset=0), 0)


def plain_steps(shapes: Shapes) -> Iterator[object]:
    torch.manual_seed(0)
    return plain.steps(plain.PlainModel(shapes.cell, shapes.tokens, shapes.units), shapes.stream(), 0.1)


def learner_of(
    options: config.Config, stream: Stream, tokens: int, precision: str, workers: int = 1, device: str = "cpu"
) -> Learner:
    """A worker of ``workers``, which hold as many lanes each, before its first step."""
    place = torch.device(device)
    chosen = precision_of(precision, place)
    net = model.build(options.model, tokens, 0).to(place, chosen.weights)
    updates = optimizer.build(options.optimizer, net)
    near = neighbours.meet(60) if workers > 1 else None
    reproducible = options.train.reproducible
    groups = groups_of(stream.options.batch_size, options.train.lane_groups if reproducible else 0, 0, 1)
    share = Share(groups, workers, stream.tokens_of_window, chosen.autocast, options.model.dropout, near)
    gradients = (Ordered if reproducible else Summed)(net, share)
    update = Direct(gradients, updates, options.optimizer.grad_clip_norm, place)
    return Learner(net, updates, update, stream, 0, share, Progress())


def endless(learner: Learner, options: config.Config) -> Iterator[object]:
    """Its steps, epoch after epoch."""
    while True:
        yield from steps(learner, options, Signals)
        end_epoch(learner)
        learner.progress.epoch = 0


def our_steps(shapes: Shapes, precision: str, workers: int = 1, reproducible: bool = False) -> Iterator[object]:
    """As a worker of ``workers`` takes them, which hold as many lanes each."""
    given = config.Model(cell=shapes.cell, hidden_size=shapes.units)
    options = config.Config(model=given, train=config.Train(reproducible=reproducible))
    return endless(learner_of(options, shapes.stream(), shapes.tokens, precision, workers), options)
