"""What Ray costs: the plain loop, ours, and the job on one and two workers, in one run.

    make bench        (or: python -m benchmarks.overhead [--rounds N])

The loops run in this process on as many threads as a worker of the job has (one). The job's
figure is that of its own rows of metrics, one row each hundred steps. The first thousand steps
are left out of all: so long Ray is still starting what watches over the workers.
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
from benchmarks.loops import endless, learner_of
from job.config.toml import load_config
from job.data.corpus import read_corpus
from job.data.stream import Stream
from job.data.vocabulary import build_vocabulary
from job.distributed.context import raise_malloc_thresholds

STEPS, EVERY, WARM = 4000, 100, 1000
PLAIN_STEPS, PLAIN_WARM = 800, 100  # the plain loop takes its time
SEED = str(Path(__file__).parent.parent / "configs" / "seed.toml")


def stream_of() -> tuple[Stream, int]:
    options = load_config(SEED, {})
    text = read_corpus(options.corpus, "char")
    words = build_vocabulary(options.vocabulary, text)
    return Stream(words.encode(text.lines), options.stream, 0), len(words)


def timed(each_step: Iterator[object], steps: int, warm: int) -> float:
    """Thousand tokens per second of an endless iterator of steps, its first ones left out."""
    for _ in range(warm):
        next(each_step)
    start = time.perf_counter()
    for _ in range(steps - warm):
        next(each_step)
    return (steps - warm) * 32 * 40 / (time.perf_counter() - start) / 1000


def plain_loop() -> float:
    stream, size = stream_of()
    torch.manual_seed(0)
    return timed(plain.steps(plain.PlainModel("rnn", size, 256), stream, 0.1), PLAIN_STEPS, PLAIN_WARM)


def our_loop(precision: str) -> float:
    stream, size = stream_of()
    options = load_config(SEED, {})
    return timed(endless(learner_of(options, stream, size, precision), options), STEPS, WARM)


def job(workers: int, precision: str, starts: list[dict[str, float]]) -> float:
    """Thousand tokens per second of the job; ``starts`` takes the parts of its start in seconds."""
    with tempfile.TemporaryDirectory() as storage:
        words = ["train", SEED, "--run.storage", storage, "--run.name", "run", "--scale.workers", str(workers)]
        words += ["--train.max_steps", str(STEPS), "--train.log_every", str(EVERY), "--train.precision", precision]
        words += ["--scale.cpus_per_worker", "1"]
        begun = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "job", *words], env={**os.environ, "RAY_ADDRESS": ""}, stdout=subprocess.PIPE
        )
        assert process.stdout
        said = [time.time() for line in process.stdout if line.startswith((b"run ", b"rnn "))]
        assert process.wait() == 0
        run = Path(storage) / "run"
        connected = (run / "config.toml").stat().st_mtime  # written when the cluster stands
        parts = [begun, said[0], connected, said[1]]
        names = ["imports and text", "Ray starts", "workers start, to the first step"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        starts.append({name: after - before for name, before, after in zip(names, parts, parts[1:], strict=False)})
        trained = json.loads((run / "result.json").read_text())["seconds"]
        starts[-1]["after the last step"] = time.time() - said[1] - trained
    speeds = [row["tokens_per_second"] for row in lines if row["split"] == "train"]
    return statistics.harmonic_mean(speeds[WARM // EVERY :]) / 1000


def main() -> None:
    raise_malloc_thresholds()  # as every worker does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    starts: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    found = measure.interleaved(
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
    for name, values in found.items():
        print(f"  {name:<34}{statistics.median(values):8.1f}")
    print("ratios, pair by pair: median (range)")
    for a, b in (
        ("our loop, fp32", "plain loop, fp32"),
        ("our loop, auto", "plain loop, fp32"),
        ("job, 1 worker, auto", "our loop, auto"),
        ("job, 2 workers, auto", "job, 1 worker, auto"),
    ):
        print(f"  {a:<22} / {b:<22}{measure.ratios(found[a], found[b])}")
    for workers, found_parts in starts.items():
        print(f"seconds of the command outside its loop, {workers} worker(s), medians:")
        for part in found_parts[0]:
            print(f"  {part:<34}{statistics.median(each[part] for each in found_parts):8.1f}")


if __name__ == "__main__":
    main()
