"""What ``corpus.documents = reset`` costs: the forward and backward pass of a window on one core, over one that joins.

python -m benchmarks.documents [--rounds N]
"""

import argparse
import statistics
import time
from unittest import mock

import torch

from benchmarks import measure
from job.config.model import ModelConfig
from job.distributed.context import raise_malloc_thresholds
from job.kernels.ops import supports_dtype
from job.nn.language_model import LanguageModel, build_model

LANES, STEPS, UNITS, TOKENS = 32, 40, 256, 28
SEPARATOR = TOKENS - 1
VARIANTS: dict[str, tuple[int | None, int]] = {  # the token that resets, and tokens per document; 0: no separator
    "reset, no separator": (SEPARATOR, 0),
    "reset, 1,000 tokens a document": (SEPARATOR, 1000),
    "reset, 100 tokens a document": (SEPARATOR, 100),
}


def window(document_length: int) -> torch.Tensor:
    tokens_TB = torch.randint(0, SEPARATOR, (STEPS, LANES))
    if document_length:
        tokens_TB.view(-1)[torch.randperm(STEPS * LANES)[: round(STEPS * LANES / document_length)]] = SEPARATOR
    return tokens_TB


def milliseconds(model: LanguageModel, tokens_TB: torch.Tensor, dtype: torch.dtype, times: int = 20) -> float:
    start = time.process_time()
    for _ in range(times):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            nats, _ = model.cross_entropy_sum(tokens_TB, tokens_TB.roll(-1, 0), None)
        torch.autograd.grad(nats, list(model.parameters()))
    return (time.process_time() - start) / times * 1e3


def row(cell: str, dtype: torch.dtype, rounds: int) -> None:
    model = build_model(ModelConfig(cell=cell, hidden_size=UNITS), TOKENS, 0)
    results: dict[str, list[float]] = {name: [] for name in ("join", *VARIANTS)}
    for number in range(rounds + 1):
        for name, values in results.items():
            model.reset_token, document_length = VARIANTS.get(name, (None, 0))
            elapsed = milliseconds(model, window(document_length), dtype)
            if number:  # the first round warms up
                values.append(elapsed)
    for name in VARIANTS:
        print(f"    {name:<32}{measure.ratios(results[name], results['join'])}", flush=True)
    print(f"    join: {statistics.median(results['join']):.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    raise_malloc_thresholds()  # as in every worker
    torch.set_num_threads(1)
    print(measure.machine())
    for cell in ("rnn", "gru", "lstm"):
        for dtype in (torch.float32, torch.bfloat16):
            if supports_dtype(dtype):
                print(f"  {cell}, {dtype}")
                row(cell, dtype, rounds)
        with mock.patch("job.kernels.ops.supports_dtype", lambda _: False):
            print(f"  {cell}, torch.float32, no compiler")
            row(cell, torch.float32, rounds)


if __name__ == "__main__":
    main()
