"""What precision does to the seed's whole run: its last epoch's perplexity, ours against the plain loop's.

    python -m benchmarks.perplexity [--epochs N]

All start from the same weights and take the same windows, for the recurrent cells of the book.
"""

import argparse
import math

import torch

from benchmarks import measure, plain
from benchmarks.loops import learner_of
from benchmarks.overhead import SEED, stream_of
from job.config.schema import Config
from job.config.toml import load_config
from job.data.stream import Stream
from job.distributed.context import raise_malloc_thresholds
from job.distributed.gradient_sync import ControlFlags
from job.nn.language_model import build_model
from job.training.loop import end_epoch, train_steps


def ours(config: Config, stream: Stream, tokens: int, precision: str) -> float:
    train_state = learner_of(config, stream, tokens, precision)
    for _ in range(config.train.epochs):
        for _ in train_steps(train_state, config, ControlFlags):
            pass
        mean = end_epoch(train_state)
    return math.exp(mean.nats_per_token)


def plainly(config: Config, stream: Stream, tokens: int) -> float:
    net = plain.PlainModel(config.model.cell, tokens, config.model.hidden_size)
    net.load_state_dict(build_model(config.model, tokens, 0).state_dict())
    losses = plain.steps(net, stream, config.optimizer.learning_rate)
    for epoch in range(config.train.epochs):
        nats = [next(losses) for _ in range(stream.partition(epoch).num_windows)]
    return math.exp(sum(nats) / len(nats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--cells", nargs="+", default=["rnn", "gru", "lstm"])
    given = parser.parse_args()
    raise_malloc_thresholds()
    torch.set_num_threads(1)
    stream, tokens = stream_of()
    print(f"{measure.machine()}\nperplexity of epoch {given.epochs}, and how far from the plain loop's")
    for cell in given.cells:
        options = load_config(SEED, {"model.cell": cell, "train.epochs": str(given.epochs)})
        expected = plainly(options, stream, tokens)
        print(f"  {cell:<6}plain, fp32 {expected:12.6f}", flush=True)
        for precision in ("fp32", "bf16"):
            found = ours(options, stream, tokens, precision)
            print(f"  {cell:<6}ours, {precision}  {found:12.6f}   {found / expected - 1:+.1e}", flush=True)


if __name__ == "__main__":
    main()
