"""The output layer of a large vocabulary, forward and backward: peak memory and time, each row in a process of its own.

    python -m benchmarks.vocabulary [--tokens 700] [--units 400] [--vocabulary 100000] [--device cuda] [--threads 1]

Memory is the peak beyond the weights, gradients included: the resident size on a CPU, torch's allocations on a GPU.
Time is that of the CPU on a CPU, which other processes disturb less. Targets have the frequencies of Zipf's law, 1 /
rank. Weights are in float32; bf16 is by autocast.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import measure
from job.config.model import ModelConfig
from job.kernels.ops import supports_dtype
from job.nn.adaptive_softmax import Tails, head_size, resolve_cutoffs
from job.nn.cross_entropy import chunked_cross_entropy, linear_cross_entropy

ROUNDS = 3
ROWS = {"plain": "full", "chunked": "full", "kernel": "full", "adaptive": "adaptive", "adaptive, kernel": "adaptive"}


class Sizes(NamedTuple):
    tokens: int
    units: int
    vocabulary: int


def plain_cross_entropy(hidden_TBH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_TB: Tensor) -> Tensor:
    """Holds all logits."""
    logits_TBV = F.linear(hidden_TBH, weight_VH, bias_V)
    return F.cross_entropy(logits_TBV.flatten(0, 1).float(), targets_TB.flatten(), reduction="sum")


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def measure_row(row: str, dtype: torch.dtype, sizes: Sizes, device: str, threads: int) -> tuple[float, float]:
    """The median of milliseconds, and MB at the peak."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cutoffs = resolve_cutoffs(ModelConfig(softmax=ROWS[row]), sizes.vocabulary)
    head = nn.Linear(sizes.units, head_size(cutoffs, sizes.vocabulary)).to(device)
    tails = Tails(cutoffs, sizes.vocabulary, sizes.units).to(device)
    cross_entropy = {"plain": plain_cross_entropy, "chunked": chunked_cross_entropy, "adaptive": chunked_cross_entropy}
    compute = cross_entropy.get(row, linear_cross_entropy)
    targets_TB = torch.multinomial(1 / torch.arange(1.0, sizes.vocabulary + 1), sizes.tokens, True)[:, None].to(device)
    hidden_TBH = torch.randn(sizes.tokens, 1, sizes.units, device=device, requires_grad=True)

    def step() -> None:
        for tensor in (hidden_TBH, *head.parameters(), *tails.parameters()):
            tensor.grad = None
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            nats = tails.cross_entropy_sum(head, hidden_TBH, targets_TB, compute)
        nats.backward()  # type: ignore[no-untyped-call]

    before = peak_bytes(device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = [timed(step, clock) for _ in range(1 + ROUNDS)][1:]
    return 1e3 * statistics.median(seconds), (peak_bytes(device) - before) / 1e6


def timed(step: Callable[[], None], clock: Callable[[], float]) -> float:
    started_at = clock()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--units", type=int, default=400)
    parser.add_argument("--vocabulary", type=int, default=100_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    sizes = Sizes(options.tokens, options.units, options.vocabulary)
    print(f"{measure.machine()}\n{sizes}, {options.device}, {options.threads} threads", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    pool = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    for dtype in (torch.float32, torch.bfloat16):
        rows = [row for row in ROWS if "kernel" not in row or (options.device == "cpu" and supports_dtype(dtype))]
        results = {
            row: pool.submit(measure_row, row, dtype, sizes, options.device, options.threads).result() for row in rows
        }
        plain_ms, plain_mb = results["plain"]
        for row, (milliseconds, megabytes) in results.items():
            print(
                f"  {str(dtype).removeprefix('torch.'):<9} {row:<17} {megabytes:7,.0f} MB {milliseconds:9,.1f} ms"
                f"   {megabytes / plain_mb:5.2f} of plain's memory, {milliseconds / plain_ms:5.2f} of its time",
                flush=True,
            )
    pool.shutdown()


if __name__ == "__main__":
    main()
