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
from job.config.schema import GenerateConfig, ModelConfig
from job.inference.generate import generate_batch, generate_tokens
from job.nn.language_model import build_model

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


def ways(cell: str, generate_config: GenerateConfig) -> dict[str, Callable[[], object]]:
    net = build_model(ModelConfig(cell=cell, hidden_size=UNITS), TOKENS, 0)
    theirs = plain.PlainModel(cell, TOKENS, UNITS)
    theirs.load_state_dict(net.state_dict())
    prefixes_NB = torch.randint(0, TOKENS, (8, LANES))
    return {
        "the seed's": lambda: seeds(theirs),
        "one prefix": lambda: generate_tokens(net, np.zeros(1, np.int64), generate_config, 0),
        f"{LANES} prefixes": lambda: generate_batch(net, prefixes_NB, generate_config, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{measure.machine()}\nthousand characters a second, medians; over the seed's: median (range)")
    options = GenerateConfig(length=LENGTH)
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
