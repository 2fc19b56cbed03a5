"""Time and memory of ``prepare`` on a synthetic text, and its speed on two cores.

    python -m benchmarks.corpora [--megabytes 1000] [--only speed|bpe|cores]

Speeds are those of the text beyond a small one, so that they are without the start of processes. The memory of a
process is its resident size at its peak, sampled every 0.1 s, shared memory included. ``cores`` prepares 1.65 GB on Ray
with one CPU and with two, and takes six minutes on an idle machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from itertools import chain
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]  # a dependency of Ray
from tokenizers import Tokenizer

from job.cluster.connection import connect
from job.cluster.local_cluster import disconnect
from job.cluster.prepare import cluster_tasks
from job.config.config_file import load_config
from job.config.run import ScaleConfig
from job.console import Console
from job.data.bpe import PIECE_CHARACTERS, train_bpe
from job.data.cuts import blocks_of
from job.run.prepare import prepare_store

SMALL_MEGABYTES = 1  # of which one process prepares a single piece
BLOCK_MEGABYTES = 16  # of a text, which repeats them
CLUSTER_MEGABYTES = {"char": (330, 1650), "word": (66, 132), "bpe": (66, 132)}  # of a small text and a large one
VOCABULARY_SIZE = 8192  # of bpe
Peaks = dict[str, float]


def write_text(path: Path, megabytes: int) -> Path:
    """Words of falling frequency, in lines of twelve, as long as those of English."""
    generator, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, length)) for length in generator.integers(2, 9, 50_000)]
    ranks, text = 1 / np.arange(10, len(words) + 10), ""
    while len(text) < min(megabytes, BLOCK_MEGABYTES) * 10**6:
        chosen = generator.choice(len(words), (10_000, 12), p=ranks / ranks.sum())
        text += "".join(" ".join([words[index] for index in row]) + "\n" for row in chosen)
    with path.open("w") as file:
        for start in range(0, megabytes * 10**6, len(text)):
            file.write(text[: megabytes * 10**6 - start])
    return path


def wait(process: psutil.Process) -> Peaks:
    """Waits for a process; returns MB of memory by process, its own as that of the command."""
    peaks = Peaks()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        for other in [process, *process.children(recursive=True)]:
            try:
                name = "command" if other == process else other.name().split(":")[-1]
                peaks[name] = max(peaks.get(name, 0.0), other.memory_info().rss / 1e6)
            except psutil.Error:  # it has ended
                continue
        time.sleep(0.1)
    return peaks


def prepare(text: Path, fields: dict[str, object]) -> tuple[float, Peaks]:
    """The seconds of one ``prepare`` in its process, and MB of memory."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"corpus.source": text, "corpus.store": Path(folder, "store"), "scale.workers": 0} | fields
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        started_at = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "job", "prepare", *words], stdout=sys.stderr)
        peaks = wait(psutil.Process(process.pid))
        assert process.wait() == 0
        return time.perf_counter() - started_at, peaks


def speed(large: Path, small: Path, fields: dict[str, object]) -> tuple[float, Peaks]:
    """MB/s of the text beyond the small one, and the peaks."""
    seconds, peaks = prepare(large, fields)
    seconds -= prepare(small, fields)[0]
    return (large.stat().st_size - small.stat().st_size) / 1e6 / seconds, peaks


def show_peaks(peaks: Peaks) -> str:
    return ", ".join(f"{name} {peak:,.0f} MB" for name, peak in sorted(peaks.items(), key=lambda item: -item[1])[:4])


def measure_speed(large: Path, small: Path) -> None:
    for kind in ("byte", "char", "word"):
        megabytes_per_second, peaks = speed(large, small, {"vocabulary.kind": kind})
        print(f"  {kind:<8}{megabytes_per_second:8.1f} MB/s   {show_peaks(peaks)}", flush=True)


def measure_bpe(large: Path, small: Path) -> None:
    """Compares with the tokenizers library alone, on one thread and with the same tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = train_bpe(blocks_of(small.read_text(), PIECE_CHARACTERS), VOCABULARY_SIZE)
        file = Path(folder, "tokenizer.json")
        file.write_text(vocabulary.to_json())
        text, tokenizer = small.read_text(), Tokenizer.from_file(str(file))
        started_at = time.perf_counter()
        encodings = tokenizer.encode_batch_fast(list(blocks_of(text, PIECE_CHARACTERS)))
        np.array([*chain.from_iterable(encoding.ids for encoding in encodings)], np.int32)
        plain = len(text) / 1e6 / (time.perf_counter() - started_at)
        ours, peaks = speed(large, small, {"vocabulary.kind": "bpe", "vocabulary.file": file})
    print(
        f"  bpe     {ours:8.1f} MB/s   {ours / plain:.2f} of tokenizers alone ({plain:.1f} MB/s)   {show_peaks(peaks)}"
    )


def time_on_cluster(cpus: int, texts: dict[str, tuple[Path, Path]], results: Connection) -> None:
    """Sends MB/s of each kind's large text beyond its small one, on a cluster of this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    console = Console(stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def seconds(kind: str, text: Path) -> float:
            store, started_at = tempfile.mkdtemp(dir=folder), time.perf_counter()
            config = load_config(
                None,
                {
                    "vocabulary.kind": kind,
                    "vocabulary.size": str(VOCABULARY_SIZE if kind == "bpe" else 0),
                    "corpus.source": str(text),
                    "corpus.store": f"{store}/store",
                },
            )
            assert prepare_store(config, console, partial(cluster_tasks, store, console)) == 0
            return time.perf_counter() - started_at

        connect(ScaleConfig(workers=1, accelerator="cpu", cpus_per_worker=1), stack)
        seconds("char", texts["char"][0])  # starts Ray's workers
        for kind, (small, large) in texts.items():
            num_bytes = large.stat().st_size - small.stat().st_size
            results.send(num_bytes / 1e6 / (seconds(kind, large) - seconds(kind, small)))
        disconnect()


def speeds_on_cluster(cpus: int, texts: dict[str, tuple[Path, Path]]) -> tuple[list[float], Peaks]:
    """MB/s of each kind on a cluster with some CPUs, and the peaks of all its processes."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=time_on_cluster, args=(cpus, texts, sender))
    process.start()
    peaks = wait(psutil.Process(process.pid))
    process.join()
    assert process.exitcode == 0
    return [receiver.recv() for _ in texts], peaks


def measure_cores(folder: Path) -> None:
    texts = {
        kind: (write_text(folder / f"{kind}-small.txt", small), write_text(folder / f"{kind}-large.txt", large))
        for kind, (small, large) in CLUSTER_MEGABYTES.items()
    }
    (one, _), (two, peaks) = (speeds_on_cluster(cpus, texts) for cpus in (1, 2))
    for kind, slow, fast in zip(texts, one, two, strict=True):
        print(f"  {kind:<8}{fast:8.1f} MB/s on two cores, {fast / slow:.2f} of one ({slow:.1f} MB/s)", flush=True)
    print(f"  memory of each process at its peak, of any kind   {show_peaks(peaks)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--only", choices=("speed", "bpe", "cores"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only in (None, "cores"):
            measure_cores(folder)
        if options.only != "cores":
            small = write_text(folder / "small.txt", SMALL_MEGABYTES)
            large = write_text(folder / "large.txt", options.megabytes)
            for task, measure in (("speed", measure_speed), ("bpe", measure_bpe)):
                if options.only in (None, task):
                    measure(large, small)


if __name__ == "__main__":
    main()
