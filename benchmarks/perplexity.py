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
from job import model, parse
from job.config import Config
from job.gradients import Signals
from job.loop import end_epoch, steps
from job.stream import Stream
from job.world import keep_memory


def ours(options: Config, stream: Stream, tokens: int, precision: str) -> float:
    learner = learner_of(options, stream, tokens, precision)
    for _ in range(options.train.epochs):
        for _ in steps(learner, options, Signals):
            pass
        mean = end_epoch(learner)
    return math.exp(mean.nats_per_token)


def plainly(options: Config, stream: Stream, tokens: int) -> float:
    net = plain.PlainModel(options.model.cell, tokens, options.model.hidden_size)
    net.load_state_dict(model.build(options.model, tokens, 0).state_dict())
    losses = plain.steps(net, stream, options.optimizer.learning_rate)
    for epoch in range(options.train.epochs):
        nats = [next(losses) for _ in range(stream.cut(epoch).num_windows)]
    return math.exp(sum(nats) / len(nats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--cells", nargs="+", default=["rnn", "gru", "lstm"])
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    stream, tokens = stream_of()
    print(f"{measure.machine()}\nperplexity of epoch {given.epochs}, and how far from the plain loop's")
    for cell in given.cells:
        options = parse.load(SEED, {"model.cell": cell, "train.epochs": str(given.epochs)})
        expected = plainly(options, stream, tokens)
        print(f"  {cell:<6}plain, fp32 {expected:12.6f}", flush=True)
        for precision in ("fp32", "bf16"):
            found = ours(options, stream, tokens, precision)
            print(f"  {cell:<6}ours, {precision}  {found:12.6f}   {found / expected - 1:+.1e}", flush=True)


if __name__ == "__main__":
    main()
