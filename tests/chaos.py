"""The chaos test: one run, many faults, and the same result as without them.

    make storm        (or: python -m tests.chaos [--faults N] [--only FAULT] [--seed S] [--mode MODE])

Trains a two-layer LSTM with dropout on a cluster of several nodes on this machine. At random steps a worker, a
node's raylet or the driver is killed (and the driver's command run again), a node leaves, a node joins, or a
worker is stopped with SIGSTOP. Afterwards every step must appear once in the losses, and the losses must equal
those of the undisturbed run:

    reproducible    1 to 3 workers; identical bit for bit to the run on one
    fp64            1 to 3 workers, float64; within 1e-8 of the run on one
    one, two        that number of workers, float32; identical bit for bit to the run on as many
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import job.cluster  # noqa: F401  sets the environment that Ray reads when it is imported

ROOT = Path(__file__).parent.parent
FAULTS = ("kill worker", "kill node", "kill driver", "node leaves", "node joins", "stop worker")
# Flags, the number of workers, and that of the undisturbed run with the same losses.
MODES = {
    "reproducible": (["--train.reproducible", "true", "--train.precision", "fp32"], "1-3", "0"),
    "fp64": (["--train.precision", "fp64"], "1-3", "0"),
    "one": (["--train.precision", "fp32"], "1", "1"),
    "two": (["--train.precision", "fp32"], "2", "2"),
}
RECOVERY_TIMEOUT_S = 240.0  # from a fault to the next step
MARK = "LANES_CHAOS_TEST"  # set for all processes of one test: others may run on this machine


class ChaosRun:
    """The cluster and the driver's process, and the faults that can be injected into them."""

    def __init__(self, flags: list[str], folder: Path, workers: str, nodes: int = 3) -> None:
        self.flags = [*flags, "--run.storage", str(folder), "--run.name", "disturbed", "--scale.workers", workers]
        self.run = folder / "disturbed"
        self.min_nodes = int(workers.partition("-")[0])  # of one CPU each; with fewer the run would wait
        self.mark = os.environ[MARK] = uuid.uuid4().hex
        # Dead nodes are noticed after 3 seconds instead of 30.
        health_check = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 1000,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 3,
        }
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health_check}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(nodes)]
        self.driver: subprocess.Popen[str] | None = None

    def start_driver(self) -> None:
        # Fewer workers are tried sooner than by default.
        timeout = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8"}
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "job", "train", *self.flags],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": self.cluster.address, **timeout},
            text=True,
        )

    def processes(self, title: str) -> list[int]:
        """The run's Ray processes whose titles start with these words."""
        return [process for process in marked_processes(self.mark) if command_line(process).startswith(f"ray::{title}")]

    def workers(self) -> list[int]:
        return self.processes("RayTrainWorker")

    def megabytes(self) -> dict[str, int]:
        """The memory of the processes that outlive the workers."""
        assert self.driver
        processes = {"driver": [self.driver.pid]}
        processes |= {name: self.processes(name)[-1:] for name in ("EventChannel", "TrainController")}
        return {name: resident_bytes(process) >> 20 for name, ids in processes.items() for process in ids}

    def step(self) -> int:
        """The last step in the metrics."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(json.loads(self.run.joinpath("metrics.jsonl").read_bytes().splitlines()[-1])["step"])
        return 0

    def wait_for_step(self, target: int) -> bool:
        """Waits for a step. Returns False if the run ends before it."""
        assert self.driver
        last_step, since = self.step(), time.monotonic()
        while (step := self.step()) < target:
            if step != last_step:
                last_step, since = step, time.monotonic()
            if self.driver.poll() is not None:
                return False
            assert time.monotonic() - since < RECOVERY_TIMEOUT_S, f"no step for {RECOVERY_TIMEOUT_S:.0f} s, at {step}"
            time.sleep(0.02)
        return True

    def inject(self, fault: str, rng: random.Random) -> None:
        assert self.driver
        if fault == "kill driver":
            self.driver.kill()
            self.driver.wait()
            self.start_driver()
        elif fault in ("kill worker", "stop worker"):
            workers = self.workers()
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL if fault == "kill worker" else signal.SIGSTOP)
        elif fault == "node joins" or len(self.nodes) == self.min_nodes:
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        else:
            node = self.nodes.pop(rng.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=fault == "node leaves")

    def announce_preemption(self, node_id: str, seconds: int) -> None:
        """Announces to Ray that a spot node will be taken away, as a cloud's agent does."""
        ray = Path(sys.executable).parent / "ray"
        command = [str(ray), "drain-node", "--address", self.cluster.address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        if self.driver and self.driver.poll() is None:
            self.driver.kill()
        for process in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.cluster.shutdown()


def marked_processes(mark: str) -> list[int]:
    """The processes that were started with this value of MARK in their environment."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                processes.append(int(path.parent.name))
    return sorted(processes)


def command_line(process: int) -> str:
    """The command line of a process, or the title that it has set."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    return ""


def resident_bytes(process: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def losses(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["nats"]) for row in rows if row["split"] == "train"]


def draw_faults(count: int, seed: int) -> list[str]:
    """Faults in a random order, each as often as the others, give or take one."""
    rng, faults = random.Random(seed), list[str]()
    while len(faults) < count:
        faults += rng.sample(FAULTS, len(FAULTS))
    return faults[:count]


def run_chaos(flags: list[str], steps: int, faults: Sequence[str], seed: int, mode: str, folder: Path) -> None:
    """Trains with and without faults. Raises AssertionError if the results differ."""
    mode_flags, workers, undisturbed_workers = MODES[mode]
    flags = [*flags, *mode_flags, "--train.max_steps", str(steps), "--train.log_every", "1"]
    flags += ["--train.checkpoint_every", "25", "--scale.hang_timeout", "10", "--scale.cpus_per_worker", "1"]
    rng = random.Random(seed)
    fault_steps = sorted(rng.sample(range(10, steps - 20), len(faults)))
    print(f"chaos test with {len(faults)} faults, seed {seed}, {mode}", flush=True)
    undisturbed = [*flags, "--run.storage", str(folder), "--run.name", "undisturbed"]
    subprocess.run(
        [sys.executable, "-m", "job", "train", *undisturbed, "--scale.workers", undisturbed_workers],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    run = ChaosRun(flags, folder, workers)
    try:
        run.start_driver()
        for step, fault in zip(fault_steps, faults, strict=True):
            assert run.wait_for_step(step), "the run ended before the last fault"
            before, started = run.step(), time.monotonic()
            print(f"  at step {before} of {steps}: {fault}, {len(run.nodes)} nodes", flush=True)
            run.inject(fault, rng)
            run.wait_for_step(before + 5)
            sizes = ", ".join(f"{name} {size} MB" for name, size in run.megabytes().items())
            print(f"    five more steps after {time.monotonic() - started:.1f} s; {sizes}", flush=True)
        assert run.driver
        assert run.driver.wait(RECOVERY_TIMEOUT_S) == 0
    finally:
        run.close()
    check_same_result(folder / "disturbed", folder / "undisturbed", steps, exact=mode != "fp64")


def check_same_result(run: Path, expected_run: Path, steps: int, exact: bool) -> None:
    actual, expected = losses(run), losses(expected_run)
    assert [step for step, _ in actual] == list(range(1, steps + 1)), "a step is missing or appears twice"
    result, expected_result = (json.loads((path / "result.json").read_text()) for path in (run, expected_run))
    if exact:
        assert actual == expected
        assert result["weights_sha256"] == expected_result["weights_sha256"]
    else:
        assert all(abs(a - b) <= 1e-8 * b for (_, a), (_, b) in zip(actual, expected, strict=True))
    assert result["generated"] == expected_result["generated"]
    print(f"same result: {steps} losses and the final weights, after {result['restarts']} restarts")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=12, help="number of faults")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--mode", choices=MODES, default="reproducible")
    parser.add_argument("--only", choices=FAULTS, help="inject only this fault")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    flags = ["--model.cell", "lstm", "--model.num_layers", "2", "--model.hidden_size", "64", "--model.dropout", "0.3"]
    flags += ["--optimizer.name", "adamw", "--optimizer.learning_rate", "0.002", "--corpus.cleaning", "d2l"]
    count, seed = arguments.faults, arguments.seed
    faults = [arguments.only] * count if arguments.only else draw_faults(count, seed)
    with tempfile.TemporaryDirectory() as folder:
        run_chaos(flags, arguments.steps, faults, seed, arguments.mode, Path(folder))


if __name__ == "__main__":
    main()
