"""Peak memory of a run, in units of W, the size of the weights; AdamW keeps two moments, so training takes 4 W.

    python -m benchmarks.memory [--checkout FOLDER]     (another checkout with its .venv: only its commands)

The resident size at its peak, less that with a tiny model: of commands, and of the worker that takes most among those
that train reproducibly with eight lane groups (by SGD, so the state is 2 W).
"""

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.loops import ONE_WORKER, Shapes, our_steps

UNITS = 4096
WEIGHT_BYTES = 4 * UNITS * (UNITS + 2 * 28)  # of an RNN; almost all of it is one matrix


def peak_of_command(checkout: Path, *words: object) -> int:
    """Bytes."""
    python = str(checkout / ".venv/bin/python") if checkout != Path.cwd() else sys.executable
    with subprocess.Popen([python, "-m", "job", *map(str, words)], cwd=checkout, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss << 10


def measure_commands(checkout: Path, folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("the time machine " * 300)
    for name, command, *more in (
        ("a run that saves twice", "train", "--train.max_steps", 4, "--train.checkpoint_every", 2),
        ("a run that resumes and saves", "train", "--train.max_steps", 6),
        ("generate", "generate"),
    ):
        peaks = []
        for units in (UNITS, 16):
            flags = [
                "--corpus.source", text, "--run.storage", folder, "--run.name", f"units-{units}", "--scale.workers", 0,
                "--model.hidden_size", units, "--stream.batch_size", 2, "--stream.num_steps", 4,
                "--optimizer.name", "adamw", "--train.precision", "fp32",
            ]  # fmt: skip
            target = [folder / f"units-{units}"] if command == "generate" else flags
            peaks.append(peak_of_command(checkout, command, *target, *more, "--generate.prefix", "the"))
        print(f"  {name:<36}{(peaks[0] - peaks[1]) / WEIGHT_BYTES:6.1f} W", flush=True)


def run_worker(
    rank: int, port: int, workers: int, gloo: bool, units: int, results: "multiprocessing.SimpleQueue[int]"
) -> None:
    torch.set_num_threads(1)
    if gloo:
        mock.patch("job.training.train_state.create_group", lambda timeout_s: None).start()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    shapes = Shapes("rnn", 8 // workers, 4, units, 28)
    steps = our_steps(shapes, "fp32", replace(ONE_WORKER, rank=rank, size=workers), True)
    for _ in range(2):
        next(steps)
    results.put(peak_of_this_process())
    dist.barrier()
    dist.destroy_process_group()


def peak_of_this_process() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def peak_of_worker(workers: int, gloo: bool, units: int) -> int:
    """Of the worker that takes most, in bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (port, workers, gloo, units, results)
    multiprocessing.spawn(run_worker, arguments, nprocs=workers)  # type: ignore[attr-defined,no-untyped-call]
    return max(results.get() for _ in range(workers))


def measure_exchange() -> None:
    for gloo in (False, True):
        for workers in (2, 4, 8):
            peaks = [peak_of_worker(workers, gloo, units) for units in (UNITS, 16)]
            name = f"{workers} workers, {'gloo' if gloo else 'shared memory'}"
            print(f"  reproducible, {name:<22}{(peaks[0] - peaks[1]) / WEIGHT_BYTES:6.1f} W", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=Path.cwd())
    args = parser.parse_args()
    print(f"W = {WEIGHT_BYTES / 1e6:.0f} MB; peaks over a tiny model")
    with tempfile.TemporaryDirectory() as folder:
        measure_commands(args.checkout.resolve(), Path(folder))
    if args.checkout == Path.cwd():
        measure_exchange()


if __name__ == "__main__":
    main()
