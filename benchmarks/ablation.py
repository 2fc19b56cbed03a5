"""What each technique gains: training runs that differ in it alone, on the same text for the same number of steps.

    python -m benchmarks.ablation --corpus TEXT [--results FILE] [--kind word] [--only NAME …] [--seeds N]

Each technique is added to a model without any, and removed from a model with all of them; other cells take the place of
the LSTM at equal numbers of weights. The model is an LSTM of 2 × 256 units for characters, trained by AdamW, and of
2 × 200 for words, trained by SGD as in AWD-LSTM. It passes the first 200,000 tokens of the text several times, so that
it overfits without regularization. A row takes one to three minutes on one core. Its result is a line of the file, and
rows that are there are not run again; a run that was interrupted is resumed.
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
CELL = "lstm"
COMMON: dict[str, Any] = {
    "corpus.validation_fraction": 0.1, "corpus.max_tokens": 200_000, "model.cell": CELL, "model.num_layers": 2,
    "optimizer.schedule": "cosine", "train.epochs": 10_000, "scale.workers": 0, "scale.cpus_per_worker": 1,
}  # fmt: skip
BASE: dict[str, dict[str, Any]] = {
    "char": COMMON | {
        "stream.batch_size": 32, "stream.num_steps": 64, "model.hidden_size": 256, "model.embedding_size": 256,
        "optimizer.name": "adamw", "optimizer.learning_rate": 3e-3, "optimizer.grad_clip_norm": 1.0,
    },
    "word": COMMON | {
        "stream.batch_size": 20, "stream.num_steps": 35, "model.hidden_size": 200, "model.embedding_size": 200,
        "optimizer.name": "sgd", "optimizer.learning_rate": 20.0, "optimizer.grad_clip_norm": 0.25,
    },
}  # fmt: skip
NUM_TOKENS = {"char": 65, "word": 13_777}  # of tiny Shakespeare, and of WikiText-2's validation part
DECAY = {"char": 0.3, "word": 1e-5}  # of the weights, times the learning rate at each step
TECHNIQUES: dict[str, dict[str, Any]] = {  # None: of DECAY
    "dropout": {"model.dropout": 0.3},
    "locked dropout": {"model.dropout": 0.3, "model.dropout_locked": True},
    "input dropout": {"model.input_dropout": 0.2},
    "embedding dropout": {"model.embedding_dropout": 0.05},
    "weight-drop": {"model.weight_drop": 0.4},
    "AR": {"model.activation_regularization": 2.0},
    "TAR": {"model.temporal_regularization": 1.0},
    "tied weights": {"model.tied": True},
    "weight decay": {"optimizer.weight_decay": None},
    "weight decay of matrices": {"optimizer.weight_decay": None, "optimizer.decay_scope": "matrices"},
    "mean of weights": {"optimizer.averaging": "mean"},
    "EMA of weights": {"optimizer.averaging": "ema", "optimizer.ema_decay": 0.995},
}
CELLS = [cell for cell in BUILTIN_CELLS if cell != CELL]
# The row after each is a variant of it, and is part of all.
ALTERNATIVES = {"dropout", "weight decay", "mean of weights"}


def of_equal_size(fields: dict[str, Any], kind: str) -> dict[str, Any]:
    """The fields, with a size, a multiple of 8, that gives about as many weights as the model of ``BASE`` has."""
    base = {name: value for name, value in BASE[kind].items() if name.startswith("model.")}

    def sized(size: int) -> dict[str, Any]:
        embedding = {"model.embedding_size": size} if fields.get("model.tied") else {}
        return {**fields, "model.hidden_size": size, **embedding}

    def num_weights(fields: dict[str, Any]) -> int:
        model = {name.removeprefix("model."): value for name, value in {**base, **fields}.items()}
        return count_weights(ModelConfig(**model), NUM_TOKENS[kind])

    return min(map(sized, range(8, 2048, 8)), key=lambda fields: abs(num_weights(fields) - num_weights({})))


def rows(kind: str) -> dict[str, dict[str, Any]]:
    """The fields of each row: none, one technique, all of them, all but one; cells of as many weights as the LSTM."""
    techniques = {
        name: {field: DECAY[kind] if value is None else value for field, value in fields.items()}
        for name, fields in TECHNIQUES.items()
    }
    parts = {name: fields for name, fields in techniques.items() if name not in ALTERNATIVES}

    def together(names: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        return {name: value for fields in names.values() for name, value in fields.items()}

    without = {f"all but {name}": together({key: parts[key] for key in parts if key != name}) for name in parts}
    tied = {"tied weights of equal number": of_equal_size(techniques["tied weights"], kind)}
    cells = {f"cell {cell}": of_equal_size({"model.cell": cell}, kind) for cell in CELLS}
    return {NONE: {}, **techniques, **tied, "all": together(parts), **without, **cells}


def run_row(name: str, fields: dict[str, Any], seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, or resumes, the run of a row; returns its result."""
    run = {"run.storage": f"{arguments.results}.runs", "run.seed": seed, "run.name": f"{name}-{seed}".replace(" ", "-")}
    text = {"corpus.source": arguments.corpus, "vocabulary.kind": arguments.kind}
    steps = {"train.max_steps": arguments.steps, "optimizer.schedule_steps": arguments.steps}
    sections: dict[str, Any] = defaultdict(dict)
    for full_name, value in {**BASE[arguments.kind], **text, **run, **steps, **fields}.items():
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
    for name, fields in rows(arguments.kind).items():
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
    parser.add_argument("--only", nargs="+", choices=rows("char"), default=list(rows("char")), metavar="NAME")
    arguments = parser.parse_args()
    path = Path(arguments.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        for name in arguments.only:
            fields, results = rows(arguments.kind)[name], read_results(path)
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
