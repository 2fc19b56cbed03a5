"""Speed-up of a step by a second thread, with waiting threads that sleep (as in a run) and that spin.

python -m benchmarks.threads [--rounds N]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks import measure
from benchmarks.loops import Shapes, our_steps
from benchmarks.speed import SIZES
from job.distributed.context import raise_malloc_thresholds


def compare(name: str, shapes: Shapes, precision: str, rounds: int) -> None:
    """Measures one and two threads in turns."""
    runs = {threads: our_steps(shapes, precision) for threads in (1, 2)}
    times = max(3, round(1e10 / shapes.operations))
    results: dict[int, list[float]] = {threads: [] for threads in runs}
    for number in range(rounds + 1):
        for threads, steps in runs.items():
            torch.set_num_threads(threads)
            start = time.perf_counter()
            for _ in range(times):
                next(steps)
            if number:
                results[threads].append((time.perf_counter() - start) / times * 1e3)
    print(
        f"  {name:<14}{precision:<6}{statistics.median(results[1]):8.2f} ms   {measure.ratios(results[1], results[2])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    policy = os.environ["OMP_WAIT_POLICY"]
    if policy == "PASSIVE":
        print(f"{measure.machine()}\nms per step on one thread, and speed-up on two: median (range)")
    print(f"OMP_WAIT_POLICY = {policy}", flush=True)
    raise_malloc_thresholds()
    for size, numbers in SIZES.items():
        for cell in ("rnn", "gru", "lstm"):
            for precision in ("fp32", "auto"):
                compare(f"{size} {cell}", Shapes(cell, *numbers), precision, rounds)
    if policy == "PASSIVE":  # the policy is read once per process
        line = [sys.executable, "-m", "benchmarks.threads", "--rounds", str(rounds)]
        subprocess.run(line, env={**os.environ, "OMP_WAIT_POLICY": "ACTIVE"}, check=True)


if __name__ == "__main__":
    main()
