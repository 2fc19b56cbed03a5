"""A storm: one run, many blows, and no trace of them.

    make storm        (or: python -m tests.storm [--blows N] [--only BLOW] [--seed S] [--mode MODE])

On a cluster of several nodes on this machine one run of a two-layer LSTM with dropout is hit at
random steps: a worker is killed, a node's raylet is killed, the driver is killed and its command
given again, a node leaves, a node joins, a worker is stopped and never answers. Then every window
must be there once in the sequence of losses, and the sequence must be that of the undisturbed run:

    reproducible    1 to 3 workers; bit for bit the run on one
    fp64            1 to 3 workers, float64; the run on one to 1e-8
    one, two        so many workers, float32; bit for bit the run on as many
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import job.cluster  # noqa: F401  sets what Ray reads when it is imported

ROOT = Path(__file__).parent.parent
BLOWS = ("kill worker", "kill node", "kill driver", "node leaves", "node joins", "stop worker")
# What the run is, on how many workers, and on how many the undisturbed one is that it must equal.
MODES = {
    "reproducible": (["--train.reproducible", "true", "--train.precision", "fp32"], "1-3", "0"),
    "fp64": (["--train.precision", "fp64"], "1-3", "0"),
    "one": (["--train.precision", "fp32"], "1", "1"),
    "two": (["--train.precision", "fp32"], "2", "2"),
}
LONGEST = 240.0  # seconds that a run may need to get on after a blow
MARK = "LANES_STORM"  # in the environment of all processes of one storm: others may run on this machine


class Storm:
    """The cluster, the driver's process, and what is done to them."""

    def __init__(self, flags: list[str], folder: Path, workers: str, nodes: int = 3) -> None:
        self.flags = [*flags, "--run.storage", str(folder), "--run.name", "storm", "--scale.workers", workers]
        self.run = folder / "storm"
        self.least = int(workers.partition("-")[0])  # nodes of one processor, that the run can go on at all
        self.mark = os.environ[MARK] = uuid.uuid4().hex
        # Nodes that die are noticed after three seconds, not thirty.
        noticed = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 1000,
            "health_check_timeout_ms": 1000,
        }
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "_system_config": {**noticed, "health_check_failure_threshold": 3},
        }
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(nodes)]
        self.driver: subprocess.Popen[str] | None = None

    def start_driver(self) -> None:
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "job", "train", *self.flags],
            cwd=ROOT,
            # Fewer workers are tried sooner than by default, as a user may choose.
            env={
                **os.environ,
                "RAY_ADDRESS": self.cluster.address,
                "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
            },
            text=True,
        )

    def workers(self) -> list[int]:
        """Processes of the run's workers."""
        return [process for process in marked(MARK, self.mark) if title(process).startswith("ray::RayTrainWorker")]

    def megabytes(self) -> dict[str, int]:
        """Memory of the processes that outlive the workers."""
        assert self.driver
        lasting = {"driver": [self.driver.pid]}
        for name in ("Mailbox", "TrainController"):
            found = [process for process in marked(MARK, self.mark) if title(process).startswith(f"ray::{name}")]
            lasting[name] = found[-1:]
        return {name: resident(process) >> 20 for name, found in lasting.items() for process in found}

    def step(self) -> int:
        """The last step whose loss is written down."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(json.loads(self.run.joinpath("metrics.jsonl").read_bytes().splitlines()[-1])["step"])
        return 0

    def wait_for_step(self, wanted: int) -> bool:
        """Waits until the run is there; False where it has ended."""
        assert self.driver
        seen, since = self.step(), time.monotonic()
        while (step := self.step()) < wanted:
            if step != seen:
                seen, since = step, time.monotonic()
            if self.driver.poll() is not None:
                return False
            assert time.monotonic() - since < LONGEST, f"no step for {LONGEST:.0f} s, at {step}"
            time.sleep(0.02)
        return True

    def strike(self, blow: str, rng: random.Random) -> None:
        assert self.driver
        if blow == "kill driver":
            self.driver.kill()
            self.driver.wait()
            self.start_driver()
        elif blow in ("kill worker", "stop worker"):
            workers = self.workers()
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL if blow == "kill worker" else signal.SIGSTOP)
        elif blow == "node joins" or len(self.nodes) == self.least:
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        else:
            node = self.nodes.pop(rng.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=blow == "node leaves")

    def announce_preemption(self, node_id: str, seconds: int) -> None:
        """As a cloud's agent tells Ray that a spot node will be taken."""
        words = ["drain-node", "--address", self.cluster.address, "--node-id", node_id]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        ray = Path(sys.executable).parent / "ray"
        subprocess.run(
            [str(ray), *words, "--deadline-remaining-seconds", str(seconds)], check=True, stdout=subprocess.DEVNULL
        )

    def close(self) -> None:
        if self.driver and self.driver.poll() is None:
            self.driver.kill()
        for process in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.cluster.shutdown()


def marked(name: str, value: str) -> list[int]:
    """Processes with this variable in the environment they were started with."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{name}={value}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return sorted(found)


def title(process: int) -> str:
    """The command line of a process, or what it calls itself."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    return ""


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def losses(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["nats"]) for row in rows if row["split"] == "train"]


def kinds_of(blows: int, seed: int) -> list[str]:
    """Kinds of blows in a random order; every kind falls before any falls twice."""
    rng, kinds = random.Random(seed), list[str]()
    while len(kinds) < blows:
        kinds += rng.sample(BLOWS, len(BLOWS))
    return kinds[:blows]


def storm(flags: list[str], steps: int, kinds: Sequence[str], seed: int, mode: str, folder: Path) -> None:
    """Runs it, and raises AssertionError where a trace is left."""
    more, workers, calm_workers = MODES[mode]
    flags = [*flags, *more, "--train.max_steps", str(steps), "--train.log_every", "1"]
    flags += ["--train.checkpoint_every", "25", "--scale.hang_timeout", "10", "--scale.cpus_per_worker", "1"]
    rng = random.Random(seed)
    at = sorted(rng.sample(range(10, steps - 20), len(kinds)))
    print(f"storm of {len(kinds)} blows, seed {seed}, {mode}", flush=True)
    calm = [sys.executable, "-m", "job", "train", *flags, "--run.storage", str(folder), "--run.name", "calm"]
    alone = {**os.environ, "RAY_ADDRESS": ""}
    calm += ["--scale.workers", calm_workers]
    subprocess.run(calm, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=alone)
    it = Storm(flags, folder, workers)
    try:
        it.start_driver()
        for step, blow in zip(at, kinds, strict=True):
            assert it.wait_for_step(step), "the run ended before the storm did"
            print(f"  at step {it.step()} of {steps}: {blow}, {len(it.nodes)} nodes", flush=True)
            begun = time.monotonic()
            before = it.step()
            it.strike(blow, rng)
            it.wait_for_step(before + 5)
            sizes = ", ".join(f"{name} {size} MB" for name, size in it.megabytes().items())
            print(f"    five steps on after {time.monotonic() - begun:.1f} s; {sizes}", flush=True)
        assert it.driver
        assert it.driver.wait(LONGEST) == 0
    finally:
        it.close()
    expected, found = losses(folder / "calm"), losses(folder / "storm")
    assert [step for step, _ in found] == list(range(1, steps + 1)), "a window is missing or was counted twice"
    calm_result, storm_result = (json.loads((folder / name / "result.json").read_text()) for name in ("calm", "storm"))
    if mode != "fp64":
        assert found == expected
        assert storm_result["weights_sha256"] == calm_result["weights_sha256"]
    else:
        assert all(abs(a - b) <= 1e-8 * b for (_, a), (_, b) in zip(found, expected, strict=True))
    assert storm_result["generated"] == calm_result["generated"]
    print(f"no trace: {steps} losses and final weights as undisturbed, {storm_result['restarts']} restarts")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.storm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blows", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--mode", choices=MODES, default="reproducible")
    parser.add_argument("--only", choices=BLOWS, help="one kind of blow")
    chosen = parser.parse_args()
    flags = ["--model.cell", "lstm", "--model.num_layers", "2", "--model.hidden_size", "64", "--model.dropout", "0.3"]
    flags += ["--optimizer.name", "adamw", "--optimizer.learning_rate", "0.002", "--corpus.cleaning", "d2l"]
    with tempfile.TemporaryDirectory() as folder:
        kinds = [chosen.only] * chosen.blows if chosen.only else kinds_of(chosen.blows, chosen.seed)
        storm(flags, chosen.steps, kinds, chosen.seed, chosen.mode, Path(folder))


if __name__ == "__main__":
    main()
