"""A training step on a GPU, with and without a CUDA graph, against plain ``nn`` modules under autocast.

    python -m benchmarks.gpu [--rounds N] [--device cpu]

The plain step has one-hot input and bf16 autocast and, like ours, reads its loss at each step. The peak is
measured with a large bf16 matrix product. With ``--device cpu`` there is no graph; use it to check the program.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.loops import ONE_WORKER, Shapes, our_steps
from benchmarks.plain import PlainModel
from job.training.cuda_graph import GRAPH_ENV_VAR

SIZES = {
    "seed's": (32, 40, 256, 28),
    "larger": (64, 64, 512, 256),
    "1024 units": (128, 64, 1024, 256),
    "4096 units": (128, 64, 4096, 256),
}


def plain_steps(shapes: Shapes, device: torch.device) -> Iterator[object]:
    """The d2l book's loop with cuDNN under autocast and a fused optimizer."""
    model, stream = PlainModel(shapes.cell, shapes.tokens, shapes.units).to(device), shapes.stream()
    updates = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    state, windows = None, stream.partition(0).num_windows
    while True:
        for index in range(windows):
            inputs, targets = (part.to(device) for part in stream.read_window(0, index, range(shapes.lanes)))
            if state is not None:
                state = state.detach() if isinstance(state, torch.Tensor) else tuple(part.detach() for part in state)
            with torch.autocast(device.type, torch.bfloat16):
                logits, state = model(inputs, state)
            loss = F.cross_entropy(logits.float(), targets.reshape(-1))
            updates.zero_grad()
            loss.backward()
            updates.step()
            yield loss.item()


def graph_or_eager_steps(shapes: Shapes, device: torch.device, use_graph: bool) -> Iterator[object]:
    with mock.patch.dict(os.environ, {} if use_graph else {GRAPH_ENV_VAR: "off"}):
        return our_steps(shapes, "bf16", replace(ONE_WORKER, device=device))


def seconds(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean seconds of a run, with the device idle before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - start) / times


def peak(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product: the best of five tries."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    return max(2 * side**3 / seconds(lambda: a @ b, 10, device) for _ in range(5))


def row(shapes: Shapes, rounds: int, device: torch.device, limit: float) -> None:
    """Measures one cell at one size: all variants take turns."""
    runs = {
        "plain, autocast": plain_steps(shapes, device),
        "ours, eager": graph_or_eager_steps(shapes, device, False),
        "ours, CUDA graph": graph_or_eager_steps(shapes, device, True),
    }
    times = 50 if device.type == "cuda" else 2
    results: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            elapsed = seconds(lambda run=run: next(run), times, device)  # type: ignore[misc]
            if number:  # the first round warms up and captures the graph
                results[name].append(elapsed)
    for name, values in results.items():
        elapsed = statistics.median(values)
        speed, share = shapes.lanes * shapes.steps / elapsed, shapes.operations / elapsed / limit
        ratio = measure.ratios(results["plain, autocast"], values)
        print(f"  {name:<18}{elapsed * 1e3:9.3f} ms {speed:12,.0f} tokens/s {share:7.1%}   {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--cells", nargs="+", default=["rnn", "gru", "lstm"])
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU on this machine; use --device cpu to check the program")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else measure.machine()
    limit = peak(device)
    print(f"{name}, torch {torch.__version__}; {limit / 1e12:.1f} TFLOP/s in a large bf16 product")
    print("per step: ms, tokens per second, share of the peak, speed-up over plain: median (range)")
    for size in args.sizes:
        for cell in args.cells:
            print(f"{size} {cell}", flush=True)
            row(Shapes(cell, *SIZES[size]), args.rounds, device, limit)


if __name__ == "__main__":
    main()
