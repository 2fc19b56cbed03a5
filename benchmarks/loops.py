"""Endless iterators of training steps, ours and the plain loop's, over the same random text."""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import plain
from job.config.model import ModelConfig
from job.config.schema import Config
from job.config.text import StreamConfig, VocabularyConfig
from job.config.training import TrainConfig
from job.data.stream import Stream
from job.data.vocabulary import Vocabulary
from job.distributed.context import World
from job.distributed.gradient_sync import ControlFlags
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.loop import end_epoch, train_steps
from job.training.run_spec import RunSpec
from job.training.train_state import TrainState, build_train_state

ONE_WORKER = World(0, 1, torch.device("cpu"), 1, "")


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

    def text(self, num_workers: int = 1) -> np.ndarray:
        """Random tokens for 200 steps of workers with ``lanes`` lanes each."""
        num_tokens = 200 * self.lanes * self.steps * num_workers
        return np.random.default_rng(0).integers(0, self.tokens, num_tokens).astype(np.uint8)

    def stream(self) -> Stream:
        """The stream of one worker."""
        return Stream(self.text(), StreamConfig(batch_size=self.lanes, num_steps=self.steps, offset=0), 0)


def plain_steps(shapes: Shapes) -> Iterator[object]:
    torch.manual_seed(0)
    return plain.steps(plain.PlainModel(shapes.cell, shapes.tokens, shapes.units), shapes.stream(), 0.1)


def spec_of_tokens(config: Config, tokens: np.ndarray, vocabulary_size: int) -> RunSpec:
    """The specification of a run on token ids."""
    vocabulary = Vocabulary("char", ("<unk>", *map(chr, range(1, vocabulary_size))))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocabulary.json")
        file.write_text(vocabulary.to_json())
        config = replace(config, vocabulary=VocabularyConfig(file=str(file)))
        return build_run_spec(config, Folder(folder), tokens.astype(np.int32))


def endless(train_state: TrainState, config: Config) -> Iterator[object]:
    """The training steps of epoch after epoch."""
    while True:
        yield from train_steps(train_state, config, ControlFlags)
        end_epoch(train_state)
        train_state.progress.epoch = 0


def our_steps(
    shapes: Shapes,
    precision: str,
    world: World = ONE_WORKER,
    reproducible: bool = False,
    exact_steps: int = 0,
    **model: Any,
) -> Iterator[object]:
    """The training steps of one worker, each of which holds ``shapes.lanes`` lanes, in eight groups if reproducible.

    The model has the other fields ``model``.

    The first ``exact_steps`` have their own loss also on a GPU, which otherwise is that of the step before.
    """
    config = Config(
        model=ModelConfig(cell=shapes.cell, hidden_size=shapes.units, **model),
        stream=StreamConfig(batch_size=shapes.lanes * world.size, num_steps=shapes.steps, offset=0),
        train=TrainConfig(reproducible=reproducible, lane_groups=8 * world.size),
    )
    spec = spec_of_tokens(config, shapes.text(world.size), shapes.tokens)
    train_state = build_train_state(spec, world, precision)
    exact_config = replace(config, train=replace(config.train, log_every=1))
    return itertools.chain(
        itertools.islice(endless(train_state, exact_config), exact_steps), endless(train_state, config)
    )
