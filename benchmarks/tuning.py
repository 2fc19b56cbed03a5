"""What stopping early costs and spares: searches of 16 trials on two CPUs, with ASHA and without.

make bench-tuning        (or: python -m benchmarks.tuning [--seeds N])
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks import measure

CONFIG = str(Path(__file__).parent.parent / "configs" / "tune.toml")
TOKENS = 60_000  # of the corpus, so that ten searches take minutes


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    winner: int
    rate: float
    perplexity: float
    stopped: int
    epochs: int
    seconds: float


def search(seed: int, scheduler: str) -> Found:
    """A search as the command line runs it."""
    with tempfile.TemporaryDirectory() as storage:
        words = ["tune", CONFIG, "--run.storage", storage, "--run.name", "search", "--run.seed", str(seed)]
        words += ["--search.scheduler", scheduler, "--search.trials", "16", "--search.concurrent", "2"]
        words += ["--corpus.max_tokens", str(TOKENS)]
        begun = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "job", *words],
            check=True,
            env={**os.environ, "RAY_ADDRESS": ""},
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - begun
        rows = pq.read_table(Path(storage) / "search" / "trials.parquet").to_pylist()
    (best,) = [row for row in rows if row["best"]]
    stopped = sum(row["state"] == "stopped" for row in rows)
    epochs = sum(row["epochs"] for row in rows)
    perplexity = best["validation_perplexity"]
    return Found(best["trial"], best["optimizer.learning_rate"], perplexity, stopped, epochs, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    print(measure.machine())
    print("\n| seed | winner of all | winner with ASHA | the same | stopped early | epochs | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for seed in seeds:
        full, early = search(seed, "none"), search(seed, "asha")
        print(
            f"| {seed} | {full.rate:.4g}, {full.perplexity:.3f} | {early.rate:.4g}, {early.perplexity:.3f} "
            f"| {'yes' if full.winner == early.winner else 'no'} | {early.stopped} of 16 "
            f"| {early.epochs} of {full.epochs} | {early.seconds:.0f} of {full.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
