"""Effect of precision on the seed configuration: perplexity of its last epoch, ours against the plain loop's.

    python -m benchmarks.perplexity [--epochs N]

All start from the same weights and read the same windows, for each of the book's cells.
"""

import argparse
import math

import torch

from benchmarks import measure, plain
from benchmarks.loops import new_train_state
from benchmarks.overhead import SEED, seed_stream
from job.config.config_file import load_config
from job.config.schema import Config
from job.data.stream import Stream
from job.distributed.context import raise_malloc_thresholds
from job.distributed.gradient_sync import ControlFlags
from job.nn.language_model import build_model
from job.training.loop import end_epoch, train_steps


def our_perplexity(config: Config, stream: Stream, tokens: int, precision: str) -> float:
    train_state = new_train_state(config, stream.tokens, tokens, precision)
    for _ in range(config.train.epochs):
        for _ in train_steps(train_state, config, ControlFlags):
            pass
        loss = end_epoch(train_state)
    return math.exp(loss.nats_per_token)


def plain_perplexity(config: Config, stream: Stream, tokens: int) -> float:
    model = plain.PlainModel(config.model.cell, tokens, config.model.hidden_size)
    model.load_state_dict(build_model(config.model, tokens, 0).state_dict())
    losses = plain.steps(model, stream, config.optimizer.learning_rate)
    for epoch in range(config.train.epochs):
        nats = [next(losses) for _ in range(stream.partition(epoch).num_windows)]
    return math.exp(sum(nats) / len(nats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--cells", nargs="+", default=["rnn", "gru", "lstm"])
    args = parser.parse_args()
    raise_malloc_thresholds()
    torch.set_num_threads(1)
    stream, tokens = seed_stream()
    print(f"{measure.machine()}\nperplexity of epoch {args.epochs}, and relative difference to the plain loop")
    for cell in args.cells:
        config = load_config(SEED, {"model.cell": cell, "train.epochs": str(args.epochs)})
        expected = plain_perplexity(config, stream, tokens)
        print(f"  {cell:<6}plain, fp32 {expected:12.6f}", flush=True)
        for precision in ("fp32", "bf16"):
            results = our_perplexity(config, stream, tokens, precision)
            print(f"  {cell:<6}ours, {precision}  {results:12.6f}   {results / expected - 1:+.1e}", flush=True)


if __name__ == "__main__":
    main()
