"""Tokens per second of generation, greedy and sampled: the d2l book's loop, a call of the model per token, and ours.

make bench-speed        (or: python -m benchmarks.generation [--rounds N])
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import measure, plain
from benchmarks.speed import milliseconds
from job.config.inference import GenerateConfig
from job.config.model import ModelConfig
from job.data.vocabulary import Vocabulary
from job.inference.ensemble import Ensemble
from job.inference.generate import StopCondition, continue_greedily, continue_randomly
from job.inference.sampling import sample_generator, sample_tokens
from job.nn.language_model import LanguageModel, build_model
from job.nn.state import State

WORDS: dict[str, Any] = {"hidden_size": (650, 650, 200), "num_layers": 3, "embedding_size": 200, "tied": True}
# Vocabulary, continuations at once, tokens of each, and the model.
CASES: list[tuple[int, int, int, dict[str, Any]]] = [
    (28, 1, 500, {"cell": "rnn", "hidden_size": 256}),
    (28, 1, 500, {"cell": "gru", "hidden_size": 256}),
    (28, 1, 500, {"cell": "lstm", "hidden_size": 256}),
    (28, 32, 100, {"cell": "lstm", "hidden_size": 256}),
    (65, 1, 100, {"cell": "lstm", "hidden_size": 650, "num_layers": 2}),
    (65, 8, 50, {"cell": "lstm", "hidden_size": 650, "num_layers": 2}),
    (65, 100, 10, {"cell": "lstm", "hidden_size": 650, "num_layers": 2}),
    (10_000, 1, 30, {**WORDS, "cell": "lstm"}),
    (65, 1, 100, {"cell": "mlstm", "hidden_size": 256, "embedding_size": 64}),
    (65, 1, 100, {"cell": "mogrifier", "hidden_size": 256, "embedding_size": 64}),
    (65, 1, 100, {"cell": "mingru", "hidden_size": 256, "embedding_size": 64}),
    (65, 1, 100, {"cell": "minlstm", "hidden_size": 256, "embedding_size": 64}),
]  # fmt: skip


@torch.no_grad()
def predict_ch8(model: plain.PlainModel, length: int) -> None:
    """Greedy generation as in the d2l book, section 9.5."""
    outputs, state = [0], None
    for _ in range(length):
        one_hot = F.one_hot(torch.tensor([[outputs[-1]]]), model.vocabulary_size).float()
        hidden, state = model.rnn(one_hot, state)
        outputs.append(int(model.linear(hidden.reshape(-1, hidden.shape[-1])).argmax(dim=1)))


@torch.no_grad()
def call_model(model: LanguageModel, lanes: int, length: int, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A call of the model for each token, which packs or converts its weights each time."""
    tokens_B = torch.zeros(lanes, dtype=torch.int64)
    state: State = None
    for _ in range(length):
        logits_TBV, state = model(tokens_B[None], state)
        tokens_B = choose(logits_TBV[0])


def variants(vocabulary_size: int, lanes: int, length: int, fields: dict[str, Any]) -> dict[str, Callable[[], object]]:
    model = build_model(ModelConfig(**fields), vocabulary_size, 0)
    ensemble, first_B = Ensemble([model]), torch.zeros(lanes, dtype=torch.int64)
    config, never = GenerateConfig(temperature=0.8, length=length), StopCondition(Vocabulary("byte", ()), "", lanes)

    def generators() -> list[torch.Generator]:
        return [sample_generator(0, lane) for lane in range(lanes)]

    def call_model_and_sample() -> None:
        own = generators()
        call_model(model, lanes, length, lambda logits_BV: sample_tokens(logits_BV, config, own))

    runs: dict[str, Callable[[], object]] = {
        "greedy, calls": lambda: call_model(model, lanes, length, lambda logits_BV: logits_BV.argmax(1)),
        "greedy": lambda: continue_greedily(ensemble, first_B, [None], length),
        "sampled, calls": call_model_and_sample,
        "sampled": lambda: continue_randomly(ensemble, first_B, [None], config, generators(), never),
    }
    if fields.keys() == {"cell", "hidden_size"} and lanes == 1:
        book_model = plain.PlainModel(fields["cell"], vocabulary_size, fields["hidden_size"])
        book_model.load_state_dict(model.state_dict())
        runs = {"the book's": lambda: predict_ch8(book_model, length), **runs}
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{measure.machine()}\ntokens per second of CPU time, medians; ratio to the calls: median (range)")
    for vocabulary_size, lanes, length, fields in CASES:
        print(f"{fields}, {vocabulary_size} tokens, {lanes} at once")
        runs = variants(vocabulary_size, lanes, length, fields)
        results: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                results[name].append(lanes * length / milliseconds(run, 1) * 1e3)
        for name, values in results.items():
            calls = results["sampled, calls" if name.startswith("sampled") else "greedy, calls"]
            print(f"  {name:<16}{statistics.median(values):12,.0f}   {measure.ratios(values, calls)}", flush=True)


if __name__ == "__main__":
    main()
