"""Experiments on tiny Shakespeare: what models and ensembles reach on its last tenth, in nats per character.

    python -m benchmarks.shakespeare TEXT [--results FILE] [--only NAME …] [--seeds N] [--parallel N] [--together RUN …]
    python -m benchmarks.shakespeare --plot FILE.png --results FILE …

Each experiment is a training with a recipe of its own, once per seed. Its best checkpoint is evaluated with the state
carried in 32 lanes, and with a fresh state every 256 characters, which is what the windows of nanoGPT see. Each result
is a line of the file, with its validation curve; what is there is not run again, and a training that was interrupted is
resumed. ``--together`` evaluates runs (combined-1 is the experiment "combined" with seed 1) as one ensemble. Prints a
table of all results in the file. ``--plot`` draws the validation curves of the files' experiments over time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import matplotlib.pyplot as plt

from benchmarks import measure

CONTEXT = 256  # characters of nanoGPT's windows
LANES = 32  # into which the validation text is split, with the state carried in each
BASE: dict[str, Any] = {
    "corpus.validation_fraction": 0.1, "stream.batch_size": 128, "stream.num_steps": 50, "model.cell": "lstm",
    "model.num_layers": 2, "model.hidden_size": 768, "model.embedding_size": 128, "model.dropout": 0.6,
    "optimizer.name": "adamw", "optimizer.learning_rate": 3e-3, "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 100, "optimizer.grad_clip_norm": 1.0, "optimizer.weight_decay": 1.0,
    "optimizer.decay_scope": "matrices", "optimizer.averaging": "ema", "train.epochs": 16,
    "train.keep_checkpoints": 1, "train.checkpoint_every": "600s", "generate.length": 0,
}  # fmt: skip
RECIPE = {  # configs/shakespeare.toml, with a model of its own
    "stream.batch_size": 64, "stream.num_steps": 25, "model.embedding_size": 64, "optimizer.weight_decay": 0.2,
    "train.epochs": 9,
}  # fmt: skip
LARGE = {"model.hidden_size": 1024, "model.dropout": 0.45}
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
    "combined": {
        "model.hidden_size": 1024, "model.dropout": 0.5, "optimizer.weight_decay": 0.3, "train.epochs": 36,
    },
    "recipe": {**RECIPE, "model.hidden_size": 512, "model.dropout": 0.3},
    "recipe with 640 units": {**RECIPE, "model.hidden_size": 640, "model.dropout": 0.36},
    "1024 units": {**RECIPE, **LARGE, "optimizer.weight_decay": 0.4},
    "1024 units with less weight decay": {**RECIPE, **LARGE},
    "1024 units with more dropout": {**RECIPE, **LARGE, "model.dropout": 0.5},
    "1024 units with most dropout": {**RECIPE, **LARGE, "model.dropout": 0.55},
    "1024 units with lower learning rate": {**RECIPE, **LARGE, "optimizer.learning_rate": 2e-3},
    "1024 units with 12 epochs": {**RECIPE, **LARGE, "model.dropout": 0.5, "train.epochs": 12},
}  # fmt: skip
ANCHORS = {"nanoGPT, 10.7 M weights, A100": 1.4697, "nanoGPT's recipe for CPUs": 1.8857}  # as published; fresh state


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


def run_name(experiment: str, seed: int) -> str:
    return f"{experiment}-{seed}".replace(" ", "-")


def train(name: str, seed: int, text: str, storage: Path, threads: int) -> dict[str, Any]:
    """Trains an experiment with a seed, or resumes it, and evaluates its best checkpoint."""
    folder, started = storage / run_name(name, seed), time.time()
    log = folder.with_suffix(".log")
    run = {"corpus.source": text, "run.seed": seed, "run.name": folder.name, "run.storage": storage, "scale.workers": 0}
    fields = {**BASE, **EXPERIMENTS[name], **run, "scale.cpus_per_worker": threads}
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


def evaluate_together(names: list[str], results: Results, text: str, storage: Path) -> None:
    """Evaluates runs that are in the results as one ensemble."""
    checkpoints = {run_name(row["experiment"], row["seed"]): row["checkpoint"] for row in results.rows if "seed" in row}
    if not results.find(models=names):
        losses = evaluate([Path(checkpoints[name]) for name in names], text, storage / "ensemble.log")
        results.add({"models": names, **losses})


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints nats per character of each model and ensemble."""
    print(f"{'':<28}{'carried':>9}{'fresh':>9}{'epoch':>7}{'seconds':>9}")
    for row in rows:
        label = f"{len(row['models'])} models" if "models" in row else f"{row['experiment']} {row['seed']}"
        single = f"{row['epoch']:7}{row['seconds']:9.0f}" if "seed" in row else "  " + " ".join(row["models"])
        print(f"{label:<28}{row['carried']:9.4f}{row['fresh']:9.4f}{single}")


def plot(paths: list[Path], names: list[str], output: Path) -> None:
    """Draws validation losses over the seconds since the command, a color for each experiment of the files."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    curves = defaultdict(list)
    for path in paths:
        for row in Results(path).rows:
            if row.get("experiment") in names:
                curves[f"{path.stem}: {row['experiment']}"].append(row["curve"])
    for (label, runs), color in zip(curves.items(), plt.get_cmap("tab10").colors, strict=False):
        for number, curve in enumerate(runs):
            seconds, nats = [point["seconds"] for point in curve], [point["nats"] for point in curve]
            axes.plot(seconds, nats, color=color, linewidth=1.5, label="_" if number else label)
    for label, anchor in ANCHORS.items():
        axes.axhline(anchor, color="gray", linestyle="--", linewidth=1)
        axes.annotate(label, (0.01, anchor), xycoords=("axes fraction", "data"), va="bottom", color="gray")
    axes.set(xscale="log", ylim=(1.35, 2.0), xlabel="seconds", ylabel="validation loss, nats per character")
    axes.set_xticks([10, 20, 50, 100, 200, 500], labels=["10", "20", "50", "100", "200", "500"])
    axes.set_xticks([], minor=True)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="tiny Shakespeare, a file")
    parser.add_argument("--results", type=Path, nargs="+", default=[Path("runs/shakespeare.jsonl")], metavar="FILE")
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    parser.add_argument("--together", nargs="+", default=[], metavar="RUN")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.results, arguments.only, arguments.plot)
        return
    if not arguments.text:
        parser.error("the text is missing")
    results, storage = Results(arguments.results[0]), arguments.results[0].with_suffix(".runs")
    storage.mkdir(exist_ok=True)
    experiments = [(name, seed) for seed in range(arguments.seeds) for name in arguments.only]
    missing = [(name, seed) for name, seed in experiments if not results.find(experiment=name, seed=seed)]
    with ThreadPoolExecutor(arguments.parallel) as pool:

        def run(experiment: tuple[str, int]) -> None:
            results.add(train(*experiment, arguments.text, storage, arguments.threads))

        list(pool.map(run, missing))
    if arguments.together:
        evaluate_together(arguments.together, results, arguments.text, storage)
    print(measure.machine())
    print_table(results.rows)


if __name__ == "__main__":
    main()
