"""What each technique gains: training runs that differ in it alone, on the same text for the same number of steps.

    python -m benchmarks.ablation --corpus TEXT [--results FILE] [--kind word] [--only NAME …] [--seeds N]

Each technique is added to a model without any, and removed from a model with all of them; other cells take the place of
the LSTM at equal numbers of weights. The model is an LSTM of 2 × 256 units on the first 200,000 tokens of the text,
which it passes a dozen times, so that it overfits without regularization. A row takes one to three minutes on one core.
Its result is a line of the file, and rows that are there are not run again; a run that was interrupted is resumed.
"""

import argparse
import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure
from job import train
from job.config.model import BUILTIN_CELLS, ModelConfig
from job.run.estimate import count_weights

NONE = "none"
BASE: dict[str, Any] = {
    "corpus.validation_fraction": 0.1, "corpus.max_tokens": 200_000, "stream.batch_size": 32, "stream.num_steps": 64,
    "model.cell": "lstm", "model.hidden_size": 256, "model.num_layers": 2, "model.embedding_size": 256,
    "optimizer.name": "adamw", "optimizer.learning_rate": 3e-3, "optimizer.schedule": "cosine",
    "optimizer.grad_clip_norm": 1.0, "train.epochs": 10_000, "scale.workers": 0, "scale.cpus_per_worker": 1,
}  # fmt: skip
TECHNIQUES: dict[str, dict[str, Any]] = {
    "dropout": {"model.dropout": 0.3},
    "locked dropout": {"model.dropout": 0.3, "model.dropout_locked": True},
    "input dropout": {"model.input_dropout": 0.2},
    "embedding dropout": {"model.embedding_dropout": 0.05},
    "weight-drop": {"model.weight_drop": 0.4},
    "AR": {"model.activation_regularization": 2.0},
    "TAR": {"model.temporal_regularization": 1.0},
    "tied weights": {"model.tied": True},
    "weight decay": {"optimizer.weight_decay": 0.3},
    "weight decay of matrices": {"optimizer.weight_decay": 0.3, "optimizer.decay_scope": "matrices"},
    "mean of weights": {"optimizer.averaging": "mean"},
    "EMA of weights": {"optimizer.averaging": "ema", "optimizer.ema_decay": 0.995},
}
CELLS = [cell for cell in BUILTIN_CELLS if cell != BASE["model.cell"]]
# The row after each is a variant of it, and is part of all.
ALTERNATIVES = {"dropout", "weight decay", "mean of weights"}


def equal_size(cell: str, num_tokens: int = 65) -> int:
    """The hidden size, a multiple of 8, with which a model of a cell has about as many weights as ``BASE``.

    By default with the characters of tiny Shakespeare.
    """
    base = {name.removeprefix("model."): value for name, value in BASE.items() if name.startswith("model.")}

    def num_weights(cell: str, hidden_size: int) -> int:
        return count_weights(ModelConfig(**{**base, "cell": cell, "hidden_size": hidden_size}), num_tokens)

    expected = num_weights(base["cell"], base["hidden_size"])
    return min(range(8, 2048, 8), key=lambda size: abs(num_weights(cell, size) - expected))


def rows() -> dict[str, dict[str, Any]]:
    """The fields of each row: none, one technique, all of them, all but one; cells of as many weights as the LSTM."""
    parts = {name: fields for name, fields in TECHNIQUES.items() if name not in ALTERNATIVES}

    def together(names: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        return {name: value for fields in names.values() for name, value in fields.items()}

    without = {f"all but {name}": together({key: parts[key] for key in parts if key != name}) for name in parts}
    cells = {f"cell {cell}": {"model.cell": cell, "model.hidden_size": equal_size(cell)} for cell in CELLS}
    return {NONE: {}, **TECHNIQUES, "all": together(parts), **without, **cells}


def run_row(name: str, fields: dict[str, Any], seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, or resumes, the run of a row; returns its result."""
    run = {"run.storage": f"{arguments.results}.runs", "run.seed": seed, "run.name": f"{name}-{seed}".replace(" ", "-")}
    text = {"corpus.source": arguments.corpus, "vocabulary.kind": arguments.kind}
    steps = {"train.max_steps": arguments.steps, "optimizer.schedule_steps": arguments.steps}
    sections: dict[str, Any] = defaultdict(dict)
    for full_name, value in {**BASE, **text, **run, **steps, **fields}.items():
        section, _, key = full_name.partition(".")
        sections[section][key] = value
    result = train(**sections).result
    assert result
    return {
        "row": name, "fields": fields, "seed": seed, "steps": arguments.steps, "kind": arguments.kind,
        "best": math.log(result["best_validation_perplexity"]), "last": math.log(result["validation_perplexity"]),
        "training": math.log(result["perplexity"]), "seconds": result["seconds"],
    }  # fmt: skip


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_result_of(result: dict[str, Any], name: str, fields: dict[str, Any], arguments: argparse.Namespace) -> bool:
    expected = (name, fields, arguments.steps, arguments.kind)
    return tuple(result[key] for key in ("row", "fields", "steps", "kind")) == expected


def print_table(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Prints nats per token of the best validation and of the last one, means over seeds."""
    print(f"{'':<34}{'best':>8}{'± seeds':>9}{'gain':>8}{'last':>8}{'training':>10}{'seconds':>9}{'seeds':>7}")
    best: dict[str, float] = {}
    for name, fields in rows().items():
        found = [result for result in results if is_result_of(result, name, fields, arguments)]
        if not found:
            continue
        best[name] = statistics.mean(result["best"] for result in found)
        spread = statistics.stdev([result["best"] for result in found]) if len(found) > 1 else math.nan
        compared = "all" if name.startswith("all but") else NONE
        gain = (best.get(compared, math.nan) - best[name]) * (-1 if compared == "all" else 1)
        last, training, seconds = (
            statistics.mean(row[key] for row in found) for key in ("last", "training", "seconds")
        )
        print(
            f"{name:<34}{best[name]:8.4f}{spread:9.4f}{gain:8.4f}{last:8.4f}{training:10.4f}{seconds:9.0f}{len(found):7}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a text, such as tiny Shakespeare")
    parser.add_argument("--results", default="runs/ablation.jsonl")
    parser.add_argument("--kind", choices=("char", "word"), default="char")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=rows(), default=list(rows()), metavar="NAME")
    arguments = parser.parse_args()
    path = Path(arguments.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        for name in arguments.only:
            fields, results = rows()[name], read_results(path)
            if any(is_result_of(each, name, fields, arguments) and each["seed"] == seed for each in results):
                continue
            result = run_row(name, fields, seed, arguments)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
                os.fsync(file.fileno())
    print(measure.machine())
    print_table(read_results(path), arguments)


if __name__ == "__main__":
    main()
