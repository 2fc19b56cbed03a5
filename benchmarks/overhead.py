"""Overhead of Ray: the plain loop, our loop, and the job on one and two workers, interleaved.

    make bench        (or: python -m benchmarks.overhead [--rounds N])

The loops run in this process on one thread, like a worker of the job. The job's speed is read from its
metrics, one row per hundred steps. The first thousand steps are left out everywhere, because Ray is still
starting processes during that time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import measure, plain
from benchmarks.loops import ONE_WORKER, endless
from job.config.config_file import load_config
from job.data.stream import Stream
from job.distributed.context import raise_malloc_thresholds
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.run_spec import RunSpec
from job.training.train_state import build_train_state

STEPS, LOG_EVERY, WARMUP_STEPS = 4000, 100, 1000
PLAIN_STEPS, PLAIN_WARMUP_STEPS = 800, 100  # the plain loop is slower
SEED = str(Path(__file__).parent.parent / "configs" / "seed.toml")


def seed_spec() -> RunSpec:
    return build_run_spec(load_config(SEED, {}), Folder.resolve("runs"))  # nothing is written there


def timed(each_step: Iterator[object], steps: int, warm: int) -> float:
    """Thousand tokens per second of an endless iterator of steps, without the warm-up."""
    for _ in range(warm):
        next(each_step)
    start = time.perf_counter()
    for _ in range(steps - warm):
        next(each_step)
    return (steps - warm) * 32 * 40 / (time.perf_counter() - start) / 1000


def plain_loop() -> float:
    spec = seed_spec()
    torch.manual_seed(0)
    model = plain.PlainModel("rnn", len(spec.dataset.vocabulary), 256)
    stream = Stream(spec.dataset.train_tokens, spec.config.stream, 0)
    return timed(plain.steps(model, stream, 0.1), PLAIN_STEPS, PLAIN_WARMUP_STEPS)


def our_loop(precision: str) -> float:
    spec = seed_spec()
    return timed(endless(build_train_state(spec, ONE_WORKER, precision), spec.config), STEPS, WARMUP_STEPS)


def job(workers: int, precision: str, starts: list[dict[str, float]]) -> float:
    """Thousand tokens per second of the job; appends the seconds of each start-up phase to ``starts``."""
    with tempfile.TemporaryDirectory() as storage:
        arguments = ["train", SEED, "--run.storage", storage, "--run.name", "run", "--scale.workers", str(workers)]
        arguments += [
            "--train.max_steps",
            str(STEPS),
            "--train.log_every",
            str(LOG_EVERY),
            "--train.precision",
            precision,
        ]
        arguments += ["--scale.cpus_per_worker", "1"]
        start = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "job", *arguments], env={**os.environ, "RAY_ADDRESS": ""}, stdout=subprocess.PIPE
        )
        assert process.stdout
        printed_at = [time.time() for line in process.stdout if line.startswith((b"run ", b"rnn "))]
        assert process.wait() == 0
        run = Path(storage) / "run"
        connected = (run / "config.toml").stat().st_mtime  # written once the cluster is connected
        parts = [start, printed_at[0], connected, printed_at[1]]
        names = ["imports and corpus", "Ray start-up", "worker start-up, to the first step"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        starts.append({name: after - before for name, before, after in zip(names, parts, parts[1:], strict=False)})
        trained = json.loads((run / "result.json").read_text())["seconds"]
        starts[-1]["after the last step"] = time.time() - printed_at[1] - trained
    speeds = [row["tokens_per_second"] for row in lines if row["split"] == "train"]
    return statistics.harmonic_mean(speeds[WARMUP_STEPS // LOG_EVERY :]) / 1000


def main() -> None:
    raise_malloc_thresholds()  # as in every worker
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    starts: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    results = measure.interleaved(
        {
            "plain loop, fp32": plain_loop,
            "our loop, fp32": lambda: our_loop("fp32"),
            "our loop, auto": lambda: our_loop("auto"),
            "job, 1 worker, auto": lambda: job(1, "auto", starts[1]),
            "job, 2 workers, auto": lambda: job(2, "auto", starts[2]),
        },
        rounds,
    )
    print(f"\n{measure.machine()}\nthousand tokens per second, medians of {rounds} interleaved rounds:")
    for name, values in results.items():
        print(f"  {name:<34}{statistics.median(values):8.1f}")
    print("ratios, pair by pair: median (range)")
    for a, b in (
        ("our loop, fp32", "plain loop, fp32"),
        ("our loop, auto", "plain loop, fp32"),
        ("job, 1 worker, auto", "our loop, auto"),
        ("job, 2 workers, auto", "job, 1 worker, auto"),
    ):
        print(f"  {a:<22} / {b:<22}{measure.ratios(results[a], results[b])}")
    for workers, found_parts in starts.items():
        print(f"seconds of the command outside its loop, {workers} worker(s), medians:")
        for part in found_parts[0]:
            print(f"  {part:<34}{statistics.median(each[part] for each in found_parts):8.1f}")


if __name__ == "__main__":
    main()
