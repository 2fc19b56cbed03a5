"""One core: a step of ours against the seed's loop written plainly, and against the machine's limits.

    make bench-speed        (or: python -m benchmarks.speed [--rounds N] [--techniques])

All variants take turns in this process on one thread. Times are CPU times of this process, which other
processes on a shared machine affect less than wall-clock times; ratios are of neighbouring turns.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks import measure
from benchmarks.loops import Shapes, our_steps, plain_steps
from benchmarks.peak import Limits, limits
from job.distributed.context import raise_malloc_thresholds
from job.kernels.ops import supports_dtype
from job.nn.rnn import RecurrentLayers

SIZES = {"seed's": (32, 40, 256, 28), "larger": (64, 64, 512, 256)}
VARIANTS = {"auto": "auto", "auto, no compiler": "auto", "fp32": "fp32", "fp32, no compiler": "fp32"}


CHARACTERS, WORDS = Shapes("lstm", 32, 64, 512, 128), Shapes("lstm", 20, 35, 256, 10_000)
TECHNIQUES: dict[str, dict[str, Any]] = {
    "none": {},
    "dropout": {"dropout": 0.3},
    "locked dropout": {"dropout": 0.3, "dropout_locked": True},
    "input dropout": {"input_dropout": 0.3},
    "embedding dropout": {"embedding_dropout": 0.1},
    "weight-drop": {"weight_drop": 0.5},
    "AR and TAR": {"activation_regularization": 2.0, "temporal_regularization": 1.0},
    "tied weights": {"tied": True},
}
TECHNIQUES["all"] = {name: value for options in TECHNIQUES.values() for name, value in options.items()}


def without_kernel(name: str) -> contextlib.AbstractContextManager[object]:
    """Disables the compiled kernel for variants whose name says so."""
    if "no compiler" not in name:
        return contextlib.nullcontext()
    return mock.patch("job.kernels.ops.supports_dtype", lambda dtype: False)


def milliseconds(run: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times * 1e3


def recurrences(shapes: Shapes, dtype: torch.dtype) -> Iterator[object]:
    """Forward and backward of the recurrent layer alone."""
    layer = RecurrentLayers(shapes.cell, shapes.tokens, [shapes.units])
    tokens_TB = torch.randint(0, shapes.tokens, (shapes.steps, shapes.lanes))
    grad_outputs_TBH = torch.randn(shapes.steps, shapes.lanes, shapes.units).to(dtype)
    while True:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden_TBH, _ = layer(tokens_TB)
        torch.autograd.backward(hidden_TBH, grad_outputs_TBH)
        yield None


def turns(runs: dict[str, Iterator[object]], rounds: int, times: int) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round, of which the first one only warms up."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            with without_kernel(name):
                elapsed = milliseconds(lambda run=run: next(run), times)  # type: ignore[misc]
            if number:
                results[name].append(elapsed)
    return results


def row(shapes: Shapes, rounds: int, peak: Limits) -> None:
    """Measures one cell at one size: all variants take turns."""
    fast_dtype = torch.bfloat16 if supports_dtype(torch.bfloat16) else torch.float32
    runs = {"plain": plain_steps(shapes)} | {name: our_steps(shapes, way) for name, way in VARIANTS.items()}
    runs |= {
        "auto: recurrence": recurrences(shapes, fast_dtype),
        "fp32: recurrence": recurrences(shapes, torch.float32),
    }
    times = max(3, round(2e10 / shapes.operations))  # enough that the first, cold step of a turn has little weight
    results = turns(runs, rounds, times)
    for name, values in results.items():
        dtype = fast_dtype if name.startswith("auto") else torch.float32
        operations = shapes.recurrent_operations if "recurrence" in name else shapes.operations
        floor = 1e3 * operations / peak.of(dtype)
        memory_floor = 1e3 * shapes.bytes(dtype.itemsize) / peak.memory
        ms = statistics.median(values)
        ratio = "" if "recurrence" in name else measure.ratios(results["plain"], values)
        print(f"  {name:<20}{ms:9.2f}{floor:8.2f}{memory_floor:8.2f}{floor / ms:8.0%}   {ratio}", flush=True)


def technique_rows(shapes: Shapes, rounds: int) -> None:
    """Measures a step with each technique of regularization against one without any, with and without the kernel."""
    sizes: dict[str, Any] = {"num_layers": 2, "embedding_size": shapes.units}
    runs = {
        f"{technique}{implementation}": our_steps(shapes, "auto", **sizes, **options)
        for implementation in ("", ", no compiler")
        for technique, options in TECHNIQUES.items()
    }
    results = turns(runs, rounds, times=2)
    for name, values in results.items():
        none = results["none, no compiler" if "no compiler" in name else "none"]
        print(f"  {name:<32}{statistics.median(values):9.2f}   {measure.ratios(values, none)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--techniques", action="store_true", help="the cost of each technique of regularization")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    raise_malloc_thresholds()  # as in every worker
    torch.set_num_threads(1)
    if arguments.techniques:
        print(measure.machine())
        for name, shapes in {"characters": CHARACTERS, "words": WORDS}.items():
            print(f"{name}: ms, and its ratio to a step without techniques: median (range)")
            technique_rows(shapes, rounds)
        return
    peak = limits()
    gflops, bf16, memory = (limit / 1e9 for limit in (peak.float32, peak.bfloat16, peak.memory))
    print(
        f"{measure.machine()}\none core: {gflops:.0f} GFLOP/s in float32, {bf16:.0f} in bf16, {memory:.0f} GB/s copied."
    )
    print(f"Medians of {rounds} rounds; lower bounds from FLOPs and from bytes.")
    for size, numbers in SIZES.items():
        for cell in ("rnn", "gru", "lstm"):
            print(f"{size} {cell}: ms, lower bounds in ms by FLOPs and by bytes, share of the peak,")
            print("  speed-up over plain: median (range)")
            row(Shapes(cell, *numbers), rounds, peak)


if __name__ == "__main__":
    main()
