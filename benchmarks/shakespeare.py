"""Experiments on tiny Shakespeare: what models and ensembles reach on its last tenth, in nats per character.

    python -m benchmarks.shakespeare TEXT [--results FILE] [--only NAME …] [--seeds N] [--parallel N]

Each experiment is a training with a recipe of its own, once per seed. Its best checkpoint is evaluated with the state
carried in 32 lanes, and with a fresh state every 256 characters, which is what the windows of nanoGPT see. Then the
seeds of an experiment together as an ensemble. Each result is a line of the file, with its validation curve; what is
there is not run again, and a training that was interrupted is resumed. Prints a table of all results in the file.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks import measure

CONTEXT = 256  # characters of nanoGPT's windows
LANES = 32  # into which the validation text is split, with the state carried in each
BASE: dict[str, Any] = {
    "corpus.validation_fraction": 0.1, "stream.batch_size": 128, "stream.num_steps": 50, "model.cell": "lstm",
    "model.num_layers": 2, "model.hidden_size": 768, "model.embedding_size": 128, "model.dropout": 0.6,
    "optimizer.name": "adamw", "optimizer.learning_rate": 3e-3, "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 100, "optimizer.grad_clip_norm": 1.0, "optimizer.weight_decay": 1.0,
    "optimizer.decay_scope": "matrices", "optimizer.averaging": "ema", "train.epochs": 20,
    "train.keep_checkpoints": 1, "train.checkpoint_every": "600s", "generate.length": 0,
}  # fmt: skip
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "base": {},
    "less weight decay": {"optimizer.weight_decay": 0.3},
    "more weight decay": {"optimizer.weight_decay": 2.0},
    "less dropout": {"model.dropout": 0.5},
    "AR": {"model.activation_regularization": 2.0},
    "TAR": {"model.temporal_regularization": 1.0},
    "weight-drop": {"model.weight_drop": 0.3},
    "locked dropout": {"model.dropout_locked": True},
    "input dropout": {"model.input_dropout": 0.1},
    "embedding dropout": {"model.embedding_dropout": 0.05},
    "GRU": {"model.cell": "gru", "model.hidden_size": 888},
    "wide": {"model.hidden_size": 1024},
    "long windows": {"stream.batch_size": 64, "stream.num_steps": 100},
}


class Results:
    """The lines of a file, one per result."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **keys: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(key) == value for key, value in keys.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        with self.lock, self.path.open("a") as file:
            self.rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def flags(fields: dict[str, Any]) -> list[str]:
    """Fields as flags of the command line."""
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in fields.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def call(verb: str, words: list[str], log: Path) -> str:
    """Runs a verb of the program; returns its standard output, and keeps it in a log. Raises CalledProcessError."""
    with log.open("a") as errors:
        command = [sys.executable, "-m", "job", verb, *words]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=errors, text=True).stdout
    with log.open("a") as file:
        file.write(output)
    return output


def train(name: str, seed: int, text: str, storage: Path, threads: int) -> dict[str, Any]:
    """Trains an experiment with a seed, or resumes it, and evaluates its best checkpoint."""
    run_name, started = f"{name}-{seed}".replace(" ", "-"), time.time()
    run = {"corpus.source": text, "run.seed": seed, "run.name": run_name, "run.storage": storage, "scale.workers": 0}
    fields = {**BASE, **EXPERIMENTS[name], **run, "scale.cpus_per_worker": threads}
    folder, log = storage / run_name, storage / f"{run_name}.log"
    call("train", flags(fields), log)
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {"epoch": row["epoch"], "step": row["step"], "nats": row["nats"], "seconds": round(row["time"] - started, 1)}
        for row in rows
        if row["split"] == "validation"
    ]
    best = folder / result["best_checkpoint"]
    return {
        "experiment": name, "seed": seed, "fields": EXPERIMENTS[name], "seconds": result["seconds"],
        "best": min(row["nats"] for row in curve), "epoch": min(curve, key=lambda row: row["nats"])["epoch"],
        "checkpoint": str(best), "curve": curve, **evaluate([best], text, log),
    }  # fmt: skip


def evaluate(checkpoints: list[Path], text: str, log: Path) -> dict[str, float]:
    """The loss of a model or an ensemble on the last tenth."""
    validation = log.with_suffix(".validation")
    characters = Path(text).read_text()
    validation.write_text(characters[int(len(characters) * 0.9) :])
    found = {}
    for key, fields in (("carried", {"evaluate.lanes": LANES}), ("fresh", {"evaluate.context": CONTEXT})):
        words = [*map(str, checkpoints), "--json", *flags({"corpus.source": validation, **fields})]
        found[key] = json.loads(call("evaluate", words, log))["nats_per_token"]
    return found


def evaluate_ensemble(name: str, results: Results, text: str, storage: Path) -> None:
    """Evaluates all seeds of an experiment together."""
    rows = [row for row in results.rows if row["experiment"] == name and "checkpoint" in row]
    if len(rows) > 1 and not results.find(experiment=name, models=len(rows)):
        checkpoints = [Path(row["checkpoint"]) for row in rows]
        losses = evaluate(checkpoints, text, storage / f"{name}.log")
        results.add({"experiment": name, "models": len(rows), **losses})


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints nats per character of each model and ensemble."""
    print(f"{'':<28}{'carried':>9}{'fresh':>9}{'lanes':>9}{'epoch':>7}{'seconds':>9}")
    for row in rows:
        label = f"{row['experiment']} × {row['models']}" if "models" in row else f"{row['experiment']} {row['seed']}"
        single = f"{row['best']:9.4f}{row['epoch']:7}{row['seconds']:9.0f}" if "best" in row else ""
        print(f"{label:<28}{row['carried']:9.4f}{row['fresh']:9.4f}{single}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tiny Shakespeare, a file")
    parser.add_argument("--results", type=Path, default=Path("runs/shakespeare.jsonl"), metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    arguments = parser.parse_args()
    results = Results(arguments.results)
    storage = arguments.results.with_suffix(".runs")
    storage.mkdir(exist_ok=True)
    missing = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in arguments.only
        if not results.find(experiment=name, seed=seed)
    ]
    with ThreadPoolExecutor(arguments.parallel) as pool:

        def run(experiment: tuple[str, int]) -> None:
            results.add(train(*experiment, arguments.text, storage, arguments.threads))

        list(pool.map(run, missing))
    for name in arguments.only:
        evaluate_ensemble(name, results, arguments.text, storage)
    print(measure.machine())
    print_table(results.rows)


if __name__ == "__main__":
    main()
