"""Characters per second of greedy generation: the d2l book's loop with one module call per character, and ours.

make bench-speed        (or: python -m benchmarks.generation [--rounds N])
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks import measure, plain
from benchmarks.speed import milliseconds
from job.config.schema import ModelConfig
from job.inference.ensemble import Ensemble
from job.inference.generate import continue_greedily
from job.nn.language_model import build_model

LENGTH, LANES, TOKENS, UNITS = 500, 32, 28, 256


@torch.no_grad()
def predict_ch8(model: plain.PlainModel) -> list[int]:
    """Greedy generation as in the d2l book, section 9.5."""
    outputs, state = [0], None
    for _ in range(LENGTH):
        one_hot = F.one_hot(torch.tensor([[outputs[-1]]]), model.vocabulary_size).float()
        hidden, state = model.rnn(one_hot, state)
        outputs.append(int(model.linear(hidden.reshape(-1, hidden.shape[-1])).argmax(dim=1)))
    return outputs


def variants(cell: str) -> dict[str, Callable[[], object]]:
    model = build_model(ModelConfig(cell=cell, hidden_size=UNITS), TOKENS, 0)
    book_model = plain.PlainModel(cell, TOKENS, UNITS)
    book_model.load_state_dict(model.state_dict())
    ensemble, prefixes_NB = Ensemble([model]), torch.randint(0, TOKENS, (8, LANES))

    def generate(prefixes_NB: torch.Tensor) -> torch.Tensor:
        return continue_greedily(ensemble, prefixes_NB[-1], ensemble.advance(prefixes_NB[:-1], [None]), LENGTH)

    return {
        "the book's": lambda: predict_ch8(book_model),
        "one prefix": lambda: generate(prefixes_NB[:2, :1]),
        f"{LANES} prefixes": lambda: generate(prefixes_NB),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{measure.machine()}\nthousand characters per second, medians; ratio to the book's: median (range)")
    for cell in ("rnn", "gru", "lstm"):
        runs = variants(cell)
        results: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                characters = LENGTH * (LANES if "prefixes" in name else 1)
                results[name].append(characters / milliseconds(run, 1))
        for name, values in results.items():
            ratio = measure.ratios(values, results["the book's"])
            print(f"  {cell:<6}{name:<14}{statistics.median(values):9.1f}   {ratio}", flush=True)


if __name__ == "__main__":
    main()
