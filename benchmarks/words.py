"""Word models: our training steps against word_language_model's own program, and against the machine's peak.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.words CHECKOUT TEXT [--units 200 …] [--threads 1 …]
        [--rounds N] [--seconds S]

CHECKOUT is one of pytorch/examples, TEXT the validation part of WikiText-2. Both train an LSTM of two layers, with as
many features as units, on the same token ids: 20 lanes, 35 steps, dropout 0.2, plain SGD, the gradient clipped. They
take turns, each for at most 20 steps or about S seconds. The share of the peak is that of as many cores as there are
threads: by the CPU time of our process, and by time, which means something on an idle machine only.
"""

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from benchmarks.loops import ONE_WORKER, endless, spec_of_tokens
from benchmarks.peak import limits
from job.config.model import ModelConfig
from job.config.schema import Config
from job.config.text import StreamConfig
from job.config.training import OptimizerConfig
from job.distributed.context import raise_malloc_thresholds
from job.kernels.ops import supports_dtype
from job.training.train_state import build_train_state

LAYERS, LANES, STEPS, DROPOUT, CLIP_NORM, LEARNING_RATE = 2, 20, 35, 0.2, 0.25, 20.0
COUNTED_STEPS = 20


def operations(units: int, vocabulary_size: int) -> int:
    """FLOPs of a step: the three products with each weight of the recurrence and of the output layer."""
    return 3 * 2 * LANES * STEPS * units * (LAYERS * 4 * 2 * units + vocabulary_size)


def token_ids(text: str) -> tuple[np.ndarray, int]:
    """The ids that word_language_model gives the words, and their number."""
    words = [word for line in text.splitlines(keepends=True) for word in [*line.split(), "<eos>"]]
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(word, len(ids)) for word in words], np.int32), len(ids)


def our_steps(tokens: np.ndarray, vocabulary_size: int, units: int) -> Iterator[object]:
    config = Config(
        model=ModelConfig(
            cell="lstm",
            num_layers=LAYERS,
            hidden_size=units,
            embedding_size=units,
            dropout=DROPOUT,
            input_dropout=DROPOUT,
        ),
        stream=StreamConfig(batch_size=LANES, num_steps=STEPS),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, grad_clip_norm=CLIP_NORM),
    )
    spec = spec_of_tokens(config, tokens, vocabulary_size)
    return endless(build_train_state(spec, ONE_WORKER, "auto"), config)


def our_seconds(steps: Iterator[object], seconds: float) -> tuple[float, float]:
    """Seconds of a step: wall-clock and CPU time."""
    next(steps)
    start, count = (time.perf_counter(), time.process_time()), 0
    while count < COUNTED_STEPS and (count == 0 or time.perf_counter() - start[0] < seconds):
        next(steps)
        count += 1
    return (time.perf_counter() - start[0]) / count, (time.process_time() - start[1]) / count


def their_seconds(checkout: Path, text: str, units: int, threads: int, seconds: float) -> float:
    """Seconds of a step by the reports of the program, without the first one. Then it is stopped."""
    program = checkout.resolve() / "word_language_model" / "main.py"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop("OMP_WAIT_POLICY", None)  # waiting threads spin by torch's default, and sleep in a run of ours
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "valid", "test"):
            Path(folder, f"{part}.txt").write_text(text)
        sizes = ("--emsize", units, "--nhid", units, "--nlayers", LAYERS, "--batch_size", LANES, "--bptt", STEPS)
        training = ("--dropout", DROPOUT, "--clip", CLIP_NORM, "--lr", LEARNING_RATE, "--log-interval", 1)
        command = [sys.executable, "-u", program, "--data", folder, "--save", f"{folder}/model.pt", *sizes, *training]
        with subprocess.Popen(
            list(map(str, command)), cwd=program.parent, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            found = (re.search(r"ms/batch +([\d.]+)", line) for line in process.stdout)
            reports = (float(match[1]) / 1e3 for match in found if match)
            next(reports)
            counted = [next(reports)]
            while len(counted) < COUNTED_STEPS and sum(counted) < seconds:
                counted.append(next(reports))
            process.kill()
    return statistics.mean(counted)


def row(checkout: Path, text: str, units: int, threads: int, rounds: int, seconds: float, peak: float) -> str:
    """Trains one size in turns with the other program; returns the row of the table."""
    torch.set_num_threads(threads)
    tokens, vocabulary_size = token_ids(text)
    steps, ours, theirs, shares = our_steps(tokens, vocabulary_size, units), [], [], []
    for _ in range(rounds):
        wall_s, cpu_s = our_seconds(steps, seconds)
        ours.append(LANES * STEPS / wall_s)
        shares.append([operations(units, vocabulary_size) / peak / used_s for used_s in (cpu_s, wall_s * threads)])
        theirs.append(LANES * STEPS / their_seconds(checkout, text, units, threads, seconds))
    by_cpu, by_time = (statistics.median(share) for share in zip(*shares, strict=True))
    return (
        f"  {units:5} units, {threads} threads: ours {statistics.median(ours):8,.0f} tokens/s, "
        f"theirs {statistics.median(theirs):8,.0f}, {measure.ratios(ours, theirs)} times; "
        f"{by_cpu:.0%} of the peak by CPU time, {by_time:.0%} by time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--units", type=int, nargs="+", default=[200, 650, 1150, 1500])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    raise_malloc_thresholds()
    text = arguments.text.read_text()
    peak = limits().of(torch.bfloat16 if supports_dtype(torch.bfloat16) else torch.float32)
    print(f"{measure.machine()}\n{token_ids(text)[1]:,} words, peak {peak / 1e9:.0f} GFLOP/s; medians", flush=True)
    for threads, units in itertools.product(arguments.threads, arguments.units):
        print(row(arguments.checkout, text, units, threads, arguments.rounds, arguments.seconds, peak), flush=True)


if __name__ == "__main__":
    main()
