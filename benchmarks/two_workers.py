"""Weak scaling: two workers on two cores against one, with the same number of lanes each; without Ray.

    make bench-speed        (or: python -m benchmarks.two_workers [--rounds N] [--gloo] [--reproducible])

The CPU time of the first worker is shown next to the wall-clock time: it excludes waiting for the other
worker, which other processes on a busy machine may delay.
"""

import argparse
import os
import socket
import statistics
import time
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks import measure
from benchmarks.loops import ONE_WORKER, Shapes, our_steps
from benchmarks.speed import SIZES
from job.distributed.context import raise_malloc_thresholds


def run_worker(rank: int, port: int, rounds: int, gloo: bool, reproducible: bool) -> None:
    if gloo:
        mock.patch("job.training.train_state.create_group", lambda timeout_s: None).start()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    raise_malloc_thresholds()
    torch.set_num_threads(1)
    for size, numbers in SIZES.items():
        for cell in ("rnn", "gru", "lstm"):
            compare(rank, f"{size} {cell}", Shapes(cell, *numbers), rounds, reproducible)
    dist.destroy_process_group()


def compare(rank: int, name: str, shapes: Shapes, rounds: int, reproducible: bool) -> None:
    """Measures one worker while the other sleeps, then both, in turns."""
    worlds = ONE_WORKER, replace(ONE_WORKER, rank=rank, size=2)
    alone, together = (our_steps(shapes, "auto", world, reproducible) for world in worlds)
    times = max(3, round(2e10 / shapes.operations))
    results: dict[str, list[tuple[float, float]]] = {"one": [], "two": []}
    for number in range(rounds + 1):
        for way, steps in (("one", alone), ("two", together)):
            dist.barrier()
            start = time.perf_counter(), time.process_time()
            if way == "two" or rank == 0:
                for _ in range(times):
                    next(steps)
            dist.barrier()
            elapsed = time.perf_counter() - start[0], time.process_time() - start[1]
            if number:
                results[way].append(elapsed)
    if rank == 0:
        for clock in (0, 1):
            one, two = (
                [2 * times[clock] if way == "one" else times[clock] for times in results[way]] for way in results
            )
            ms = statistics.median(two) / times * 1e3
            print(
                f"  {name:<14}{('wall', 'processor')[clock]:<10}{ms:8.2f} ms   {measure.ratios(one, two)}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gloo", action="store_true", help="exchange gradients through gloo, as between two machines")
    parser.add_argument("--reproducible", action="store_true", help="with eight lane groups per worker")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print(
        f"{measure.machine()}\nms per step of two workers, and their tokens per second relative to one: median (range)"
    )
    config = (port, args.rounds, args.gloo, args.reproducible)
    multiprocessing.spawn(run_worker, config, nprocs=2)  # type: ignore[attr-defined,no-untyped-call]


if __name__ == "__main__":
    main()
