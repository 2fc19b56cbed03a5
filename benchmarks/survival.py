"""What survival costs: checkpoints, reproducibility, and a worker's death.

make bench-survival        (or: python -m benchmarks.survival [--rounds N])
"""

import argparse
import contextlib
import io
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
from job import driver, inprocess, parse, trainer
from job.loop import Learner
from job.screen import Screen

SEED = str(Path(__file__).parent.parent / "configs" / "seed.toml")
STEPS = 1200


def speed(**flags: str) -> float:
    """Thousand tokens per second of a run in this process, all it does between its steps included."""
    with tempfile.TemporaryDirectory() as storage:
        given = {"run.storage": storage, "run.name": "run", "scale.workers": "0", "scale.cpus_per_worker": "1"}
        options = parse.load(SEED, {**given, "train.max_steps": str(STEPS), **flags})
        driver.run(options, "seed", Screen(io.StringIO()), inprocess.launch)
        result = json.loads((Path(storage) / "run" / "result.json").read_text())
    return float(result["tokens"] / result["seconds"] / 1000)


def without_checkpoints() -> float:
    """Only the last one, which the result needs."""
    save = trainer._Writer.save

    def last_only(writer: trainer._Writer, learner: Learner) -> None:
        if learner.progress.step == STEPS:
            save(writer, learner)

    with mock.patch.object(trainer._Writer, "save", last_only):
        return speed()


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
    runs = {
        "checkpoints at their default": speed,
        "no checkpoint but the last": without_checkpoints,
        "fp32": lambda: speed(**{"train.precision": "fp32"}),
        "fp32, reproducible": lambda: speed(**{"train.precision": "fp32", "train.reproducible": "true"}),
    }
    found = measure.interleaved(runs, rounds)
    print(f"\n{measure.machine()}\nthousand tokens per second, medians of {rounds} interleaved rounds:")
    for name, values in found.items():
        print(f"  {name:<34}{statistics.median(values):8.1f}")
    print("ratios, pair by pair: median (range)")
    a, b, c, d = found
    print(f"  with / without checkpoints        {measure.ratios(found[a], found[b])}")
    print(f"  reproducible / not, fp32          {measure.ratios(found[d], found[c])}")
    deaths = [death() for _ in range(3)]
    print("seconds from a worker's death, medians of 3:")
    for part in deaths[0]:
        print(f"  {part:<34}{statistics.median(each[part] for each in deaths):8.1f}")


if __name__ == "__main__":
    main()
