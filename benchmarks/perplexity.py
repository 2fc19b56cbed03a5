"""Effect of precision on the seed configuration: perplexity of its last epoch, ours against the plain loop's.

    python -m benchmarks.perplexity [--epochs N]

All start from the same weights and read the same windows, for each of the book's cells.
"""

import argparse
import contextlib
import io
import math
import tempfile

import torch

import job
from benchmarks import measure, plain
from benchmarks.overhead import SEED, seed_spec
from job.config.config_file import load_config
from job.config.schema import Config
from job.data.stream import Stream
from job.distributed.context import raise_malloc_thresholds
from job.nn.language_model import build_model


def our_perplexity(config: Config, precision: str) -> float:
    scale = {"workers": 0, "cpus_per_worker": 1}
    with tempfile.TemporaryDirectory() as storage, contextlib.redirect_stdout(io.StringIO()):
        run = job.train(config, train={"precision": precision}, scale=scale, run={"storage": storage})
    assert run.perplexity
    return run.perplexity


def plain_perplexity(config: Config, stream: Stream, tokens: int) -> float:
    model = plain.PlainModel(config.model.cell, tokens, config.model.layer_sizes[0])
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
    dataset = seed_spec().dataset
    print(f"{measure.machine()}\nperplexity of epoch {args.epochs}, and relative difference to the plain loop")
    for cell in args.cells:
        config = load_config(SEED, {"model.cell": cell, "train.epochs": str(args.epochs)})
        stream = Stream(dataset.train_tokens, config.stream, config.run.seed)
        expected = plain_perplexity(config, stream, len(dataset.vocabulary))
        print(f"  {cell:<6}plain, fp32 {expected:12.6f}", flush=True)
        for precision in ("fp32", "bf16"):
            results = our_perplexity(config, precision)
            print(f"  {cell:<6}ours, {precision}  {results:12.6f}   {results / expected - 1:+.1e}", flush=True)


if __name__ == "__main__":
    main()
