"""Time to quality on one core: tiny Shakespeare against nanoGPT's recipe for a processor, 1.88 nats.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.quality nanoGPT [--corpus TEXT]

Both train on the first nine tenths and are judged on the last. Seconds are those of the loops, on one
thread: nanoGPT's without its evaluations, ours (benchmarks/shakespeare.toml) with them. Ours runs
before and after. nanoGPT's loss is its own estimate, ours counts each target once.
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
from job.config.toml import load_config
from job.data.corpus import read_corpus

CONFIG = str(Path(__file__).parent / "shakespeare.toml")
RECIPE = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)  # as its README gives it


def ours(flags: list[str]) -> tuple[float, float]:
    """Nats of the validation text, and seconds."""
    with tempfile.TemporaryDirectory() as storage:
        words = ["train", CONFIG, *flags, "--run.storage", storage, "--run.name", "run"]
        subprocess.run([sys.executable, "-m", "job", *words], check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(storage) / "run" / "result.json").read_text())
    return math.log(result["validation_perplexity"]), result["seconds"]


def nano_gpt(checkout: str, text: str) -> tuple[float, float]:
    """As ``ours``, in a copy of the checkout: it writes beside itself."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "nanoGPT"
        shutil.copytree(checkout, place)
        (place / "data" / "shakespeare_char" / "input.txt").write_text(text)
        (place / "out").mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "data/shakespeare_char/prepare.py"], cwd=place, check=True, stdout=subprocess.DEVNULL
        )
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *RECIPE.split()]
        said = subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    nats = [float(found) for found in re.findall(r"val loss ([\d.]+)", said)]
    times = [float(found) / 1000 for found in re.findall(r"time ([\d.]+)ms", said)]
    usual = statistics.median(times)
    return nats[-1], sum(time if time < 3 * usual else usual for time in times)  # far longer where it evaluates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", help="folder of a checkout of karpathy/nanoGPT")
    parser.add_argument("--corpus", help="tiny Shakespeare, a file or an address")
    given = parser.parse_args()
    flags = ["--corpus.source", given.corpus] if given.corpus else []
    options = load_config(CONFIG, {"corpus.source": given.corpus} if given.corpus else {})
    (text,) = read_corpus(options.corpus, options.vocabulary.kind).lines
    assert isinstance(text, str)
    print(measure.machine())
    runs = {"ours": ours(flags), "nanoGPT": nano_gpt(given.nanogpt, text), "ours again": ours(flags)}
    for name, (nats, seconds) in runs.items():
        print(f"  {name:<12}{nats:7.4f} nats {seconds:8.1f} s, {runs['nanoGPT'][1] / seconds:6.1f} times as fast")


if __name__ == "__main__":
    main()
