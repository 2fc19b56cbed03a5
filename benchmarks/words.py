"""Word models: our training steps against word_language_model's own program, and against the machine's peak.

    python -m benchmarks.words CHECKOUT TEXT [--units 200 …] [--rounds N] [--threads N]

CHECKOUT is one of pytorch/examples, TEXT the validation part of WikiText-2. Both train an LSTM of two layers, with as
many features as units, on the same token ids: 20 lanes, 35 steps, dropout 0.2, plain SGD, the gradient clipped. They
take turns. The share is that of the peak of one core, by the CPU time of our process.
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
from job.config.schema import Config, ModelConfig, OptimizerConfig, StreamConfig
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


def our_seconds(steps: Iterator[object]) -> tuple[float, float]:
    """Seconds of a step: wall-clock and CPU time."""
    next(steps)
    start = time.perf_counter(), time.process_time()
    for _ in itertools.islice(steps, COUNTED_STEPS):
        pass
    return (time.perf_counter() - start[0]) / COUNTED_STEPS, (time.process_time() - start[1]) / COUNTED_STEPS


def their_seconds(checkout: Path, text: str, units: int, threads: int) -> float:
    """Seconds of a step by the report of the program, without its first one, after which it is stopped."""
    program = checkout.resolve() / "word_language_model" / "main.py"
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "valid", "test"):
            Path(folder, f"{part}.txt").write_text(text)
        sizes = ("--emsize", units, "--nhid", units, "--nlayers", LAYERS, "--batch_size", LANES, "--bptt", STEPS)
        training = ("--dropout", DROPOUT, "--clip", CLIP_NORM, "--lr", LEARNING_RATE, "--log-interval", COUNTED_STEPS)
        command = [sys.executable, "-u", program, "--data", folder, "--save", f"{folder}/model.pt", *sizes, *training]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(
            list(map(str, command)), cwd=program.parent, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            found = (re.search(r"ms/batch +([\d.]+)", line) for line in process.stdout)
            reports = [float(match[1]) for match in itertools.islice(filter(None, found), 2)]
            process.kill()
    return reports[1] / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--units", type=int, nargs="+", default=[200, 256, 650])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    raise_malloc_thresholds()
    torch.set_num_threads(arguments.threads)
    text = arguments.text.read_text()
    tokens, vocabulary_size = token_ids(text)
    fast_dtype = torch.bfloat16 if supports_dtype(torch.bfloat16) else torch.float32
    print(f"{measure.machine()}\n{vocabulary_size:,} words, {arguments.threads} threads; tokens/s: medians", flush=True)
    for units in arguments.units:
        steps, ours, theirs, cpu = our_steps(tokens, vocabulary_size, units), [], [], []
        for _ in range(arguments.rounds):
            wall_s, cpu_s = our_seconds(steps)
            ours.append(LANES * STEPS / wall_s)
            cpu.append(cpu_s)
            theirs.append(LANES * STEPS / their_seconds(arguments.checkout, text, units, arguments.threads))
        share = operations(units, vocabulary_size) / statistics.median(cpu) / limits().of(fast_dtype)
        print(
            f"  {units:5} units: ours {statistics.median(ours):8,.0f}, theirs {statistics.median(theirs):8,.0f}, "
            f"{measure.ratios(ours, theirs)} times; {share:.0%} of the peak",
            flush=True,
        )


if __name__ == "__main__":
    main()
