"""Measures what ASHA saves and what it costs: searches of 16 trials on two CPUs, with it and without.

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
MAX_TOKENS = 60_000  # of the corpus, so that ten searches take minutes


@dataclass(frozen=True)
class SearchResult:
    """The winner of a search, and what all its trials took."""

    winner: int
    learning_rate: float
    perplexity: float
    num_stopped: int
    epochs: int
    seconds: float


def run_search(seed: int, scheduler: str) -> SearchResult:
    """Runs a search through the command line."""
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "job", "tune", CONFIG, "--run.storage", storage, "--run.name", "search"]
        command += ["--run.seed", str(seed), "--corpus.max_tokens", str(MAX_TOKENS)]
        command += ["--search.scheduler", scheduler, "--search.trials", "16", "--search.concurrent", "2"]
        started_at = time.monotonic()
        subprocess.run(command, check=True, env={**os.environ, "RAY_ADDRESS": ""}, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started_at
        rows = pq.read_table(Path(storage) / "search" / "trials.parquet").to_pylist()
    (best,) = [row for row in rows if row["best"]]
    return SearchResult(
        best["trial"],
        best["optimizer.learning_rate"],
        best["validation_perplexity"],
        num_stopped=sum(row["state"] == "stopped" for row in rows),
        epochs=sum(row["epochs"] for row in rows),
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    print(measure.machine())
    print("\n| seed | winner without ASHA | winner with ASHA | the same | stopped early | epochs | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for seed in seeds:
        full, asha = run_search(seed, "none"), run_search(seed, "asha")
        print(
            f"| {seed} | {full.learning_rate:.4g}, {full.perplexity:.3f} "
            f"| {asha.learning_rate:.4g}, {asha.perplexity:.3f} "
            f"| {'yes' if full.winner == asha.winner else 'no'} | {asha.num_stopped} of 16 "
            f"| {asha.epochs} of {full.epochs} | {asha.seconds:.0f} of {full.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
