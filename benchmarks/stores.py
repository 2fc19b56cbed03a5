"""What training from a large token store costs: memory, the first step, and reading windows.

    make bench-stores        (or: python -m benchmarks.stores [--gigabytes N] [--rounds N])

The large store has shards of 256 MiB, of which only the first token ids are written: the rest are holes of sparse
files, which are read as zeros. Each measurement is a process of its own, which does what a driver and then a worker do:
it pickles the run's specification and reads it, as Ray does, and trains the seed model. Its memory is what the process
has allocated (RssAnon), without mapped pages.
"""

import argparse
import hashlib
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from benchmarks.loops import ONE_WORKER, endless
from benchmarks.overhead import SEED
from job.config.config_file import load_config
from job.data.indexed import format_index
from job.data.read_ahead import WindowReader
from job.data.store_writer import StoreInfo, shard_name, write_manifest, write_shard
from job.data.tokens import ShardedTokens
from job.data.vocabulary import Vocabulary
from job.distributed.context import raise_malloc_thresholds
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.run_spec import RunSpec
from job.training.train_state import build_train_state

VOCABULARY = Vocabulary("char", ("<unk>", *" etaoinshrdlcumwfgypbvkjxqz"))
SMALL_TOKENS, SHARD_TOKENS = 1 << 20, 256 << 20
STEPS = 1000


def write_synthetic_store(path: Path, num_tokens: int) -> None:
    """Writes a store of any size within seconds; but for the first of a shard its tokens are zeros, not on the disk."""
    folder, shards = Folder(str(path)), []
    generator = np.random.default_rng(0)
    for number, start in enumerate(range(0, num_tokens, SHARD_TOKENS)):
        length = min(SHARD_TOKENS, num_tokens - start)
        tokens = generator.integers(1, len(VOCABULARY), min(SMALL_TOKENS, length))
        shard = write_shard(folder, shard_name(number), tokens, VOCABULARY)
        if length > len(tokens):
            index = format_index(np.array([length]), np.dtype(np.uint8))
            (path / f"{shard.name}.idx").write_bytes(index)
            with open(path / f"{shard.name}.bin", "r+b") as stream:
                stream.truncate(length)
            sizes = {".bin": length, ".idx": len(index)}  # no run verifies the checksums of a large store
            files = {f"{shard.name}{suffix}": (size, "0" * 64) for suffix, size in sizes.items()}
            shard = replace(
                shard, tokens=length, token_sha256=hashlib.sha256(tokens.tobytes()).hexdigest(), files=files
            )
        shards.append(shard)
    config = load_config(SEED, {"corpus.cleaning": "none"})
    write_manifest(folder, shards, VOCABULARY, StoreInfo(config.corpus, config.vocabulary, num_tokens, num_tokens - 1))


def anonymous_mebibytes() -> float:
    """The memory that this process has allocated."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon:")).split()[1]) / 1024


def measure_store(store: str) -> dict[str, float]:
    """Measures in this process, which has read nothing yet."""
    raise_malloc_thresholds()
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # imports what takes seconds, with any store
    started_at, cpu_started_at, memory = time.perf_counter(), time.process_time(), anonymous_mebibytes()
    config = load_config(SEED, {"corpus.source": store, "corpus.cleaning": "none", "corpus.validation_fraction": "0.1"})
    data = pickle.dumps(build_run_spec(config, Folder.resolve("runs")))  # nothing is written there
    driver_memory = anonymous_mebibytes() - memory
    spec: RunSpec = pickle.loads(data)
    state = build_train_state(spec, ONE_WORKER, "auto")
    steps = endless(state, spec.config)
    next(steps)
    first_step_s, first_step_cpu_s = time.perf_counter() - started_at, time.process_time() - cpu_started_at
    for _ in range(STEPS):
        next(steps)
    start = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    step_s = (time.perf_counter() - start) / STEPS
    reader = WindowReader(state.stream, state.assignment.lanes, 1)
    num_windows = min(STEPS, state.stream.partition(0).num_windows)
    reader.read(0, 0)
    start = time.perf_counter()
    for window in range(num_windows):
        reader.read(0, window)
    window_s = (time.perf_counter() - start) / num_windows
    assert isinstance(spec.dataset.train_tokens, ShardedTokens)
    return {
        "memory, driver (MiB)": driver_memory,
        "memory, with the worker (MiB)": anonymous_mebibytes() - memory,
        "until the first step (s)": first_step_s,
        "of this, CPU time (s)": first_step_cpu_s,
        "specification, pickled (KiB)": len(data) / 1024,
        "step (us)": step_s * 1e6,
        "reading a window (us)": window_s * 1e6,
        "reading, share of a step (%)": 100 * window_s / step_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", metavar="STORE", help="measure this store, and print the values as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_store(arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        names = {"1 MiB": SMALL_TOKENS, f"{arguments.gigabytes:g} GB": int(arguments.gigabytes * 1e9)}
        results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for name, num_tokens in names.items():
            write_synthetic_store(Path(folder, name), num_tokens)
        for _ in range(arguments.rounds):
            for name, found in results.items():
                command = [sys.executable, "-m", "benchmarks.stores", "--measure", str(Path(folder, name))]
                found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    print(f"{measure.machine()}\nmedians of {arguments.rounds} interleaved rounds")
    print(f"{'':<34}" + "".join(f"{name:>12}" for name in names))
    for field in results["1 MiB"][0]:
        medians = (statistics.median(values[field] for values in found) for found in results.values())
        print(f"{field:<34}" + "".join(f"{value:>12,.2f}" for value in medians))


if __name__ == "__main__":
    main()
