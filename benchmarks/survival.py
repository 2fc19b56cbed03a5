"""What survival costs: checkpoints, reproducibility, and a worker's death.

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

from benchmarks import measure
from job.config.toml import load_config
from job.console import Console
from job.run.driver import run_training
from job.run.local_launcher import launch_local
from job.training.checkpoint_writer import CheckpointWriter
from job.training.loop import TrainState

SEED = str(Path(__file__).parent.parent / "configs" / "seed.toml")
STEPS = 1200  # of each run that is compared
EPOCHS, WARM = 120, 6  # of the run that is compared with itself


def speed(**flags: str) -> float:
    """Thousand tokens per second of a run in this process, all it does between its steps included."""
    with tempfile.TemporaryDirectory() as storage:
        given = {"run.storage": storage, "run.name": "run", "scale.workers": "0", "scale.cpus_per_worker": "1"}
        options = load_config(SEED, {**given, "train.max_steps": str(STEPS), **flags})
        run_training(options, "seed", Console(io.StringIO()), launch_local)
        result = json.loads((Path(storage) / "run" / "result.json").read_text())
    return float(result["tokens"] / result["seconds"] / 1000)


def epochs_after_a_checkpoint(count: int) -> tuple[list[float], list[float]]:
    """Seconds of epochs that begin with a checkpoint, as all do by default, and of those between without one.

    They take turns in one run, since two runs on a shared machine differ by more than a checkpoint costs.
    """
    begun: list[float] = []
    save = CheckpointWriter.save

    def every_other(writer: CheckpointWriter, train_state: TrainState) -> None:
        begun.append(time.perf_counter())
        if len(begun) % 2 or train_state.progress.epoch == count:  # the result needs the last
            save(writer, train_state)

    with mock.patch.object(CheckpointWriter, "save", every_other):
        speed(**{"train.max_steps": "0", "train.epochs": str(count)})
    taken = [after - before for before, after in itertools.pairwise(begun)][WARM:]
    return taken[0::2], taken[1::2]


def death() -> dict[str, float]:
    """Seconds from a worker's death to what follows it, on a cluster of the job's own with two workers."""
    with tempfile.TemporaryDirectory() as storage:
        words = ["train", SEED, "--run.storage", storage, "--run.name", "run", "--train.log_every", "1"]
        command = [sys.executable, "-m", "job", *words, "--train.checkpoint_every", "2s", "--train.epochs", "500"]
        process = subprocess.Popen(
            command, env={**os.environ, "RAY_ADDRESS": ""}, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        metrics = Path(storage) / "run" / "metrics.jsonl"
        _wait(lambda: _step(metrics) > 300)
        victim = _workers(process.pid)[-1]
        died, before = time.monotonic(), _step(metrics)
        os.kill(victim, signal.SIGKILL)
        found: dict[str, float] = {}
        assert process.stdout
        for line in process.stdout:
            if line.startswith("warning: worker") and "noticed" not in found:
                found["noticed"] = time.monotonic() - died
            if line.startswith("goes on from"):
                found["new workers stand"] = time.monotonic() - died
                break
        _wait(lambda: _step(metrics) > before)
        found["past the step of the death"] = time.monotonic() - died
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    return found


def _step(metrics: Path) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(json.loads(metrics.read_bytes().splitlines()[-1])["step"])
    return 0


def _wait(until: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not until():
        assert time.monotonic() - begun < 120
        time.sleep(0.02)


def _workers(driver_pid: int) -> list[int]:
    """The Ray Train workers on this machine, of which this must be the only run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith("ray::RayTrainWorker"):
                found.append(int(path.parent.name))
    assert found, f"driver {driver_pid} has no workers"
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(measure.machine())
    with_one, without = epochs_after_a_checkpoint(EPOCHS)
    print(f"seconds of an epoch, medians of {len(without)}: with a checkpoint, without one, and the ratio's quartiles")
    ratios = [a / b for a, b in zip(with_one, without, strict=False)]
    quartiles = ", ".join(f"{ratio:.3f}" for ratio in statistics.quantiles(ratios))
    print(f"  {statistics.median(with_one):.4f}  {statistics.median(without):.4f}  {quartiles}", flush=True)
    found = measure.interleaved(
        {
            "fp32": lambda: speed(**{"train.precision": "fp32"}),
            "fp32, reproducible": lambda: speed(**{"train.precision": "fp32", "train.reproducible": "true"}),
        },
        rounds,
    )
    print("reproducible / not, tokens a second, pair by pair: median (range)")
    print(f"  {measure.ratios(found['fp32, reproducible'], found['fp32'])}")
    deaths = [death() for _ in range(3)]
    print("seconds from a worker's death, medians of 3:")
    for part in deaths[0]:
        print(f"  {part:<34}{statistics.median(each[part] for each in deaths):8.1f}")


if __name__ == "__main__":
    main()
