"""Cost of fault tolerance: checkpoints, reproducible runs, and the time to recover from a worker's death.

make bench-survival        (or: python -m benchmarks.survival [--rounds N])
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import job
from benchmarks import measure
from job.training.checkpoint_writer import CheckpointWriter
from job.training.train_state import TrainState

SEED = str(Path(__file__).parent.parent / "configs" / "seed.toml")
STEPS = 1200  # of each run that is compared
EPOCHS, WARM = 120, 6  # of the run whose epochs are compared


def speed(**train: object) -> float:
    """Thousand tokens per second of a run in this process, including everything between its steps."""
    with tempfile.TemporaryDirectory() as storage:
        scale = {"workers": 0, "cpus_per_worker": 1}
        with contextlib.redirect_stdout(io.StringIO()):
            run = job.train(SEED, run={"storage": storage}, scale=scale, train={"max_steps": STEPS, **train})
    assert run.result
    return float(run.result["tokens"] / run.result["seconds"] / 1000)


def epochs_after_a_checkpoint(count: int) -> tuple[list[float], list[float]]:
    """Seconds of epochs that begin with a checkpoint, as all do by default, and of those without one.

    They alternate in one run, because two runs on a shared machine differ by more than the cost of a checkpoint.
    """
    start: list[float] = []
    save = CheckpointWriter.save

    def save_every_other(writer: CheckpointWriter, train_state: TrainState) -> None:
        start.append(time.perf_counter())
        if len(start) % 2 or train_state.progress.epoch == count:  # the result needs the last checkpoint
            save(writer, train_state)

    with mock.patch.object(CheckpointWriter, "save", save_every_other):
        speed(max_steps=0, epochs=count)
    elapsed = [after - before for before, after in itertools.pairwise(start)][WARM:]
    return elapsed[0::2], elapsed[1::2]


def recovery_times() -> dict[str, float]:
    """Seconds from the death of one of two workers to the phases of recovery, on a local cluster."""
    with tempfile.TemporaryDirectory() as storage:
        arguments = ["train", SEED, "--run.storage", storage, "--run.name", "run", "--train.log_every", "1"]
        command = [sys.executable, "-m", "job", *arguments, "--train.checkpoint_every", "2s", "--train.epochs", "500"]
        process = subprocess.Popen(
            command, env={**os.environ, "RAY_ADDRESS": ""}, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        metrics = Path(storage) / "run" / "metrics.jsonl"
        _wait(lambda: _step(metrics) > 300)
        killed_pid = _workers(process.pid)[-1]
        died, before = time.monotonic(), _step(metrics)
        os.kill(killed_pid, signal.SIGKILL)
        results: dict[str, float] = {}
        assert process.stdout
        for line in process.stdout:
            if line.startswith("warning: worker") and "noticed" not in results:
                results["noticed"] = time.monotonic() - died
            if line.startswith("resuming from"):
                results["new workers running"] = time.monotonic() - died
                break
        _wait(lambda: _step(metrics) > before)
        results["past the step of the death"] = time.monotonic() - died
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    return results


def _step(metrics: Path) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(json.loads(metrics.read_bytes().splitlines()[-1])["step"])
    return 0


def _wait(until: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not until():
        assert time.monotonic() - start < 120
        time.sleep(0.02)


def _workers(driver_pid: int) -> list[int]:
    """Process ids of the Ray Train workers on this machine, on which no other run may be active."""
    results = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith("ray::RayTrainWorker"):
                results.append(int(path.parent.name))
    assert results, f"driver {driver_pid} has no workers"
    return sorted(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(measure.machine())
    with_one, without = epochs_after_a_checkpoint(EPOCHS)
    print(f"seconds per epoch, medians of {len(without)}: with a checkpoint, without one, and quartiles of the ratio")
    ratios = [a / b for a, b in zip(with_one, without, strict=False)]
    quartiles = ", ".join(f"{ratio:.3f}" for ratio in statistics.quantiles(ratios))
    print(f"  {statistics.median(with_one):.4f}  {statistics.median(without):.4f}  {quartiles}", flush=True)
    results = measure.interleaved(
        {
            "fp32": lambda: speed(precision="fp32"),
            "fp32, reproducible": lambda: speed(precision="fp32", reproducible=True),
        },
        rounds,
    )
    print("tokens per second, reproducible / not: median (range)")
    print(f"  {measure.ratios(results['fp32, reproducible'], results['fp32'])}")
    deaths = [recovery_times() for _ in range(3)]
    print("seconds after a worker's death, medians of 3:")
    for part in deaths[0]:
        print(f"  {part:<34}{statistics.median(each[part] for each in deaths):8.1f}")


if __name__ == "__main__":
    main()
