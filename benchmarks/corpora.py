"""Time and memory of ``prepare`` on a synthetic text, and its speed on two cores.

    python -m benchmarks.corpora [--megabytes 1000] [--only speed|bpe|cores]

Speeds are those of the text beyond a small one, so that they are without the start of processes. The memory of a
process is its resident size at its peak, sampled every 0.1 s, shared memory included.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]  # a dependency of Ray
from tokenizers import Tokenizer

from job.data.bpe import PIECE_CHARACTERS, train_bpe
from job.data.cuts import blocks_of

SMALL_MEGABYTES = 1  # of which one process prepares a single piece
SMALL_CLUSTER_MEGABYTES = 70  # a cluster several
VOCABULARY_SIZE = 8192
Peaks = dict[str, float]


def write_text(path: Path, megabytes: int) -> Path:
    """Words of falling frequency, in lines of twelve, as long as those of English."""
    generator, letters = np.random.default_rng(0), np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, length)) for length in generator.integers(2, 9, 50_000)]
    ranks, num_bytes = 1 / np.arange(10, len(words) + 10), 0
    with path.open("w") as file:
        while num_bytes < megabytes * 10**6:
            chosen = generator.choice(len(words), (10_000, 12), p=ranks / ranks.sum())
            num_bytes += file.write("".join(" ".join([words[index] for index in row]) + "\n" for row in chosen))
    return path


def prepare(text: Path, cpus: int, fields: dict[str, object]) -> tuple[float, Peaks]:
    """The seconds of one ``prepare``, in its process or on a cluster of some CPUs, and MB of memory by process."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"corpus.source": text, "corpus.store": Path(folder, "store"), "scale.workers": cpus} | fields
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        started_at, peaks = time.perf_counter(), Peaks()
        process = psutil.Popen([sys.executable, "-m", "job", "prepare", *words], stdout=sys.stderr)
        process.cpu_affinity(sorted(os.sched_getaffinity(0))[: max(1, cpus)])
        while process.poll() is None:
            for other in [process, *process.children(recursive=True)]:
                try:
                    name = "command" if other == process else other.name().split(":")[-1]
                    peaks[name] = max(peaks.get(name, 0.0), other.memory_info().rss / 1e6)
                except psutil.Error:  # it has ended
                    continue
            time.sleep(0.1)
        assert process.returncode == 0
        return time.perf_counter() - started_at, peaks


def speed(large: Path, small: Path, cpus: int, fields: dict[str, object]) -> tuple[float, Peaks]:
    """MB/s of the text beyond the small one, and the peaks."""
    seconds, peaks = prepare(large, cpus, fields)
    seconds -= prepare(small, cpus, fields)[0]
    return (large.stat().st_size - small.stat().st_size) / 1e6 / seconds, peaks


def show_peaks(peaks: Peaks) -> str:
    return ", ".join(f"{name} {peak:,.0f} MB" for name, peak in sorted(peaks.items(), key=lambda item: -item[1])[:4])


def measure_speed(large: Path, small: Path) -> None:
    for kind in ("byte", "char", "word"):
        megabytes_per_second, peaks = speed(large, small, 0, {"vocabulary.kind": kind})
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
        tokenizer.encode_batch_fast(list(blocks_of(text, PIECE_CHARACTERS)))
        plain = len(text) / 1e6 / (time.perf_counter() - started_at)
        ours, peaks = speed(large, small, 0, {"vocabulary.kind": "bpe", "vocabulary.file": file})
    print(
        f"  bpe     {ours:8.1f} MB/s   {ours / plain:.2f} of tokenizers alone ({plain:.1f} MB/s)   {show_peaks(peaks)}"
    )


def measure_cores(large: Path, small: Path) -> None:
    for kind in ("char", "word"):
        (one, _), (two, peaks) = (speed(large, small, cpus, {"vocabulary.kind": kind}) for cpus in (1, 2))
        print(f"  {kind:<8}{two:8.1f} MB/s on two cores, {two / one:.2f} of one   {show_peaks(peaks)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--only", choices=("speed", "bpe", "cores"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, medium = (
            write_text(Path(folder, f"{size}.txt"), size) for size in (SMALL_MEGABYTES, SMALL_CLUSTER_MEGABYTES)
        )
        large = write_text(Path(folder, "large.txt"), options.megabytes)
        for name, measure, smaller in (
            ("speed", measure_speed, small), ("bpe", measure_bpe, small), ("cores", measure_cores, medium)
        ):  # fmt: skip
            if options.only in (None, name):
                measure(large, smaller)


if __name__ == "__main__":
    main()
