"""Records golden values: what one version of the job computes, to compare later versions with.

    python tests/record_golden.py CHECKOUT NAME

runs the job of CHECKOUT, a folder with its sources, and writes ``tests/golden/NAME/``:

    golden.json   the machine and, per case, what came out: losses, validation, ``weights_sha256``
    run/          a run that stopped after 60 steps
    search/       a search that was interrupted in the second of its three trials

``tests/golden/63eb800`` was recorded from commit 63eb800. Record new values only if numbers are meant to change.
The corpus is the text of ``tests/reference/``. The search and the runs on 2 and 4 workers start Ray.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).parent
TEXT = "text.txt"
FOLDER = Path("/tmp/lanes-golden")  # a search stores its absolute path, so every machine records in the same one
NUM_STEPS_OF_INTERRUPTED_RUN = 60
KEPT_SUFFIXES = {".toml", ".json", ".jsonl", ".safetensors"}  # what resuming needs; no plots, no event files

MODEL = [
    "--corpus.source", TEXT, "--corpus.cleaning", "none", "--corpus.validation_fraction", "0.1",
    "--stream.batch_size", "8", "--stream.num_steps", "15", "--generate.prefix", "a lane of",
    "--model.cell", "lstm", "--model.num_layers", "2", "--model.hidden_size", "8", "--model.dropout", "0.3",
    "--optimizer.name", "adamw", "--optimizer.learning_rate", "0.01", "--optimizer.grad_clip_norm", "1",
    "--train.epochs", "4", "--train.log_every", "1", "--train.keep_checkpoints", "1",
]  # fmt: skip
FP64 = ["--train.precision", "fp64", "--train.reproducible", "true"]
FP32 = ["--train.precision", "fp32", "--train.reproducible", "true"]
SEARCH_TOML = '[search.space]\n"optimizer.learning_rate" = { grid = [0.01, 0.003, 0.03] }\n'
SEARCH = ["tune", "search.toml", *MODEL, *FP64, "--search.concurrent", "1", "--scale.workers", "0"]


def train_arguments(name: str, *more: object) -> list[str]:
    """Arguments of a training run that is stored in ``runs/NAME`` below the current folder."""
    return ["train", *MODEL, "--run.storage", "runs", "--run.name", name, *map(str, more)]


def search_arguments(name: str) -> list[str]:
    """Arguments of a search that is stored in ``runs/NAME`` below the current folder."""
    return [*SEARCH, "--run.storage", "runs", "--run.name", name]


def write_inputs(folder: Path) -> None:
    """Writes the corpus and the search space, which the arguments name relative to ``folder``."""
    with np.load(TESTS / "reference" / "portable-lstm.npz", allow_pickle=False) as trace:
        (folder / TEXT).write_bytes(trace["text"].tobytes())
    (folder / "search.toml").write_text(SEARCH_TOML)


def machine() -> dict[str, str]:
    """What bits depend on besides the code: processor, compiler and libraries."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True) if compiler else None
    return {
        "architecture": platform.machine(),
        "processor": fields.get("model name", platform.processor()),
        "processor_family_model_stepping": "-".join(fields.get(key, "") for key in ("cpu family", "model", "stepping")),
        "processor_flags": " ".join(sorted(fields.get("flags", fields.get("Features", "")).split())),
        "system": f"{platform.system()} {' '.join(platform.libc_ver())}",
        "compiler": version.stdout.splitlines()[0] if version else "none",
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "numpy": np.__version__,
    }


def outcome(run: Path) -> dict[str, Any]:
    """The losses of all steps and validations of a finished run, and its final weights' digest."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    return {
        "train": [row["nats"] for row in rows if row["split"] == "train"],
        "validation": {str(row["step"]): row["nats"] for row in rows if row["split"] == "validation"},
        "generated": result["generated"],
        "weights_sha256": result["weights_sha256"],
    }


def record(checkout: Path, golden: Path) -> dict[str, Any]:
    """Runs the job in ``FOLDER``, copies what was interrupted to ``golden``, and returns the values of the rest."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "RAY_ADDRESS": ""}
    runs = FOLDER / "runs"

    def start(arguments: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "job", *arguments], cwd=FOLDER, env=env)

    def run(arguments: list[str]) -> None:
        assert start(arguments).wait() == 0

    run(train_arguments("fp64", *FP64, "--scale.workers", 0))
    for workers in (0, 2, 4):
        run(train_arguments(f"fp32-{workers}", *FP32, "--scale.workers", workers, "--scale.cpus_per_worker", 1))
    fp32 = [outcome(runs / f"fp32-{workers}") for workers in (0, 2, 4)]
    assert fp32[0] == fp32[1] == fp32[2]
    run(train_arguments("run", *FP64, "--scale.workers", 0, "--train.max_steps", NUM_STEPS_OF_INTERRUPTED_RUN))
    run(search_arguments("calm"))
    interrupted = start(search_arguments("search"))
    while not list(runs.glob("search/trials/00001/checkpoints/*/manifest.json")):
        assert interrupted.poll() is None
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait() == 130
    assert not (runs / "search/trials/00001/result.json").exists(), "the trial ended before it was interrupted"
    shutil.rmtree(golden, ignore_errors=True)
    for path in (path for name in ("run", "search") for path in (runs / name).rglob("*")):
        if path.suffix in KEPT_SUFFIXES:
            target = golden / path.relative_to(runs)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    search = {path.parent.name: outcome(path.parent) for path in sorted(runs.glob("calm/trials/*/result.json"))}
    return {"fp64": outcome(runs / "fp64"), "fp32": fp32[0], "search": search}


def main() -> None:
    checkout, name = Path(sys.argv[1]).resolve(), sys.argv[2]
    golden = TESTS / "golden" / name
    FOLDER.mkdir()
    try:
        write_inputs(FOLDER)
        values = {"machine": machine(), **record(checkout, golden)}
    finally:
        shutil.rmtree(FOLDER)
    (golden / "golden.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
