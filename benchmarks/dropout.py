"""Milliseconds for the dropout of one layer and step: its keys with the kernel, without it, and with one Python call
per key; and the masks of a million elements, forward and backward, with the kernel and without it.

python -m benchmarks.dropout [--rounds N]
"""

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks import measure
from job.kernels.ops import supports_dtype
from job.nn.dropout import drop, dropout_keys


def _key(seed: int, step: int, layer: int, lane: int) -> int:
    digest = hashlib.blake2b(b"%d %d %d %d" % (seed, step, layer, lane), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def one_by_one(lanes: range) -> Tensor:
    """As before the kernel."""
    return torch.tensor([_key(0, 5, 1, lane) for lane in lanes], dtype=torch.int32)


def without_kernel(lanes: range) -> Tensor:
    with mock.patch("job.kernels.ops.load_library", lambda: None):
        return dropout_keys(0, 5, 1, lanes)


def milliseconds(run: Callable[[range], Tensor], lanes: range) -> float:
    start = time.process_time()
    for _ in range(max(1, 10_000 // len(lanes))):
        run(lanes)
    return (time.process_time() - start) * 1e3 / max(1, 10_000 // len(lanes))


def masks(dtype: torch.dtype, name: str) -> float:
    """Milliseconds of 64 steps of 32 lanes with 512 units, forward and backward."""
    x, gradient = torch.randn(2, 64, 32, 512).to(dtype)
    x.requires_grad_()
    keys = dropout_keys(0, 5, 1, range(32))
    with mock.patch("job.kernels.ops.supports_dtype", (lambda _: False) if name == "no kernel" else supports_dtype):
        start = time.process_time()
        torch.autograd.grad(drop(x, 0.3, keys), x, gradient)
        return (time.process_time() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(measure.machine())
    runs = {"kernel": lambda lanes: dropout_keys(0, 5, 1, lanes), "no kernel": without_kernel, "before": one_by_one}
    for lanes in (range(32), range(1024), range(65_536)):
        results: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                assert torch.equal(run(lanes[:100]), one_by_one(lanes[:100]))
                results[name].append(milliseconds(run, lanes))
        for name, values in results.items():
            ratio = measure.ratios(results["before"], values)
            print(f"  {len(lanes):>6} lanes  {name:<10}{statistics.median(values):10.3f}   {ratio}", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        pairs = [(masks(dtype, "kernel"), masks(dtype, "no kernel")) for _ in range(rounds + 1)][1:]
        kernel, plain = (list(values) for values in zip(*pairs, strict=True))
        medians = statistics.median(kernel), statistics.median(plain)
        print(f"  masks, {dtype}: {medians[0]:.2f}, no kernel {medians[1]:.2f}   {measure.ratios(plain, kernel)}")


if __name__ == "__main__":
    main()
