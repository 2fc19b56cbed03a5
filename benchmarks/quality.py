"""Time to quality on one core: tiny Shakespeare against nanoGPT's recipe for CPUs, 1.88 nats.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.quality nanoGPT [--corpus TEXT]

Both train on the first nine tenths and are evaluated on the last. Seconds are those of the training loops on
one thread: nanoGPT's without its evaluations, ours (benchmarks/shakespeare.toml) with them. Ours runs before
and after nanoGPT. nanoGPT's loss is its own estimate, ours counts each target once.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import measure
from job.config.config_file import load_config
from job.data.corpus import read_corpus

CONFIG = str(Path(__file__).parent / "shakespeare.toml")
RECIPE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)  # from its README


def ours(flags: list[str]) -> tuple[float, float]:
    """Trains ours; returns nats per validation token, and seconds."""
    with tempfile.TemporaryDirectory() as storage:
        arguments = ["train", CONFIG, *flags, "--run.storage", storage, "--run.name", "run"]
        subprocess.run([sys.executable, "-m", "job", *arguments], check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(storage) / "run" / "result.json").read_text())
    return math.log(result["validation_perplexity"]), result["seconds"]


def nano_gpt(checkout: str, text: str) -> tuple[float, float]:
    """Trains nanoGPT in a copy of its checkout, because it writes there; returns the same as ``ours``."""
    with tempfile.TemporaryDirectory() as folder:
        folder_of_copy = Path(folder) / "nanoGPT"
        shutil.copytree(checkout, folder_of_copy)
        (folder_of_copy / "data" / "shakespeare_char" / "input.txt").write_text(text)
        (folder_of_copy / "out").mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "data/shakespeare_char/prepare.py"],
            cwd=folder_of_copy,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *RECIPE.split()]
        output = subprocess.run(
            command, cwd=folder_of_copy, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    nats = [float(results) for results in re.findall(r"val loss ([\d.]+)", output)]
    times = [float(results) / 1000 for results in re.findall(r"time ([\d.]+)ms", output)]
    typical = statistics.median(times)
    return nats[-1], sum(
        time if time < 3 * typical else typical for time in times
    )  # an iteration that evaluates takes far longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", help="folder of a checkout of karpathy/nanoGPT")
    parser.add_argument("--corpus", help="tiny Shakespeare, a file or a URI")
    args = parser.parse_args()
    flags = ["--corpus.source", args.corpus] if args.corpus else []
    config = load_config(CONFIG, {"corpus.source": args.corpus} if args.corpus else {})
    ((text,),) = read_corpus(config.corpus, config.vocabulary.kind).documents
    assert isinstance(text, str)
    print(measure.machine())
    runs = {"ours": ours(flags), "nanoGPT": nano_gpt(args.nanogpt, text), "ours again": ours(flags)}
    for name, (nats, seconds) in runs.items():
        print(f"  {name:<12}{nats:7.4f} nats {seconds:8.1f} s, {runs['nanoGPT'][1] / seconds:6.1f} times as fast")


if __name__ == "__main__":
    main()
