"""Cost of a long run's metrics: what a start of the workers and a checkpoint read, write and keep in memory.

python -m benchmarks.long_runs [--rows N …]

A start cuts off 20 rows after the checkpoint; a checkpoint follows 50 new rows. On the object store, here a folder that
cannot append, the rows before are in segments.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow import fs

from benchmarks.measure import machine
from job.run.metrics import METRICS_FILE, MetricsLog
from job.storage import Folder

ROWS_BETWEEN_CHECKPOINTS = 1000  # of the run before


def row(step: int) -> dict[str, Any]:
    """A row as a run reports it."""
    numbers = {"tokens": step * 1280, "nats": 1.2345678901234567, "perplexity": 3.4368929374564567}
    speed = {"learning_rate": 0.0020000000000000005, "tokens_per_second": 123456.7, "workers": 2}
    return {"split": "train", "epoch": 1 + step // 100, "step": step, **numbers, **speed, "time": 1.7e9 + step / 8}


def open_folder(storage: str, root: str) -> Folder:
    """A run's folder on a disk or an object store."""
    if storage == "disk":
        return Folder(f"{root}/run")
    return Folder("s3://bucket/run", location=(fs.SubTreeFileSystem(root, fs.LocalFileSystem()), "run"))


def prepare(storage: str, root: str, rows: int) -> None:
    """Writes the files of a run with that many rows, without events files of a disk."""
    run = Path(root) / "run"
    run.mkdir()
    if storage == "disk":
        with (run / METRICS_FILE).open("w") as file:
            file.writelines(f"{json.dumps(row(step))}\n" for step in range(1, rows + 1))
        return
    log = MetricsLog(open_folder(storage, root))
    log.truncate(0)
    for step in range(1, rows + 1):
        log.append(row(step))
        if step % ROWS_BETWEEN_CHECKPOINTS == 0:
            log.sync()
    log.close()


def measure_case(storage: str, root: str, rows: int) -> dict[str, list[float]]:
    """Costs of a start, a checkpoint, and the end of the run."""
    log = MetricsLog(open_folder(storage, root))
    results = {"start": costs(lambda: log.truncate(rows - 20))}
    for step in range(rows - 19, rows + 31):
        log.append(row(step))
    results["checkpoint"] = costs(log.sync)
    results["end"] = costs(log.merge)
    log.close()
    return results


def costs(action: Callable[[], None]) -> list[float]:
    """Seconds, growth of the largest resident size in MB, and kB that the process read and wrote."""
    peak, read, written, started_at = peak_mb(), *io_bytes(), time.perf_counter()
    action()
    seconds, (read_after, written_after) = time.perf_counter() - started_at, io_bytes()
    return [seconds, peak_mb() - peak, (read_after - read) / 1000, (written_after - written) / 1000]


def peak_mb() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def io_bytes() -> tuple[int, int]:
    """Bytes that this process has read and written so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[3_000, 30_000, 300_000])
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # storage and folder, in a process of its own
    arguments = parser.parse_args()
    if arguments.case:
        storage, root = arguments.case
        return print(json.dumps(measure_case(storage, root, arguments.rows[0])))
    print(machine())
    print(f"{'':<24}{'rows':>9}{'seconds':>10}{'MB':>8}{'kB read':>10}{'kB written':>12}")
    for storage in ("disk", "object store"):
        for rows in arguments.rows:
            with tempfile.TemporaryDirectory() as root:
                prepare(storage, root, rows)
                command = [sys.executable, "-m", "benchmarks.long_runs", "--rows", str(rows), "--case", storage, root]
                reply = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for name, (seconds, memory, read, written) in json.loads(reply).items():
                line = f"{storage:<13}{name:<11}{rows:>9,}{seconds:>10.3f}{memory:>8.1f}{read:>10.1f}{written:>12.1f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
