"""Characters a second of greedy generation: the seed's way, one module call a character, and ours.

make bench-speed        (or: python -m benchmarks.generation [--rounds N])
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import measure, plain
from benchmarks.speed import milliseconds
from job import config, generate, model

LENGTH, LANES, TOKENS, UNITS = 500, 32, 28, 256


@torch.no_grad()
def seeds(net: plain.PlainModel) -> list[int]:
    """The d2l book's ``predict_ch8``."""
    outputs, state = [0], None
    for _ in range(LENGTH):
        one_hot = F.one_hot(torch.tensor([[outputs[-1]]]), net.vocabulary_size).float()
        hidden, state = net.rnn(one_hot, state)
        outputs.append(int(net.linear(hidden.reshape(-1, hidden.shape[-1])).argmax(dim=1)))
    return outputs


def ways(cell: str, options: config.Generate) -> dict[str, Callable[[], object]]:
    net = model.build(config.Model(cell=cell, hidden_size=UNITS), TOKENS, 0)
    theirs = plain.PlainModel(cell, TOKENS, UNITS)
    theirs.load_state_dict(net.state_dict())
    prefixes_NB = torch.randint(0, TOKENS, (8, LANES))
    return {
        "the seed's": lambda: seeds(theirs),
        "one prefix": lambda: generate.continuation(net, np.zeros(1, np.int64), options, 0),
        f"{LANES} prefixes": lambda: generate.continuations(net, prefixes_NB, options, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{measure.machine()}\nthousand characters a second, medians; over the seed's: median (range)")
    options = config.Generate(length=LENGTH)
    for cell in ("rnn", "gru", "lstm"):
        runs = ways(cell, options)
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                characters = LENGTH * (LANES if "prefixes" in name else 1)
                found[name].append(characters / milliseconds(run, 1))
        for name, values in found.items():
            ratio = measure.ratios(values, found["the seed's"])
            print(f"  {cell:<6}{name:<14}{statistics.median(values):9.1f}   {ratio}", flush=True)


if __name__ == "__main__":
    main()
