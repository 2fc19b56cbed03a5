"""The chaos test: one run, many faults, and the same result as without them.

    make storm        (or: python tests/chaos.py [--faults N] [--only FAULT] [--seed S] [--mode MODE])

Trains a two-layer LSTM with dropout on a cluster of several nodes on this machine. At random steps a worker, a
node's raylet or the driver is killed (and the driver's command run again), a node leaves, a node joins, or a
worker is stopped with SIGSTOP. Some faults end the run with one error line, after which they are repaired and the
command is run again: a node's mount of the storage is lost, the head's GCS is killed, or a node without the compiled
kernel joins (which may also have no effect). Afterwards every step must appear once in the losses, and the losses
must equal those of the undisturbed run:

    reproducible    1 to 3 workers; identical bit for bit to the run on one
    fp64            1 to 3 workers, float64; within 1e-8 of the run on one
    one, two        that number of workers, float32; identical bit for bit to the run on as many

At the end a driver is replaced by another one while its object store refuses requests (object_store.py). This and the
loss of a mount need root.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import job.cluster  # noqa: F401  sets the environment that Ray reads when it is imported

ROOT = Path(__file__).parent.parent
FAULTS = ("kill worker", "kill node", "kill driver", "node leaves", "node joins", "stop worker")
SLOW_STORE = "slow store"  # for a driver that another one replaces: a run of its own, after the others
ENDING_FAULTS = ("lose mount", "kill GCS", "no kernel")  # that may end the run with an error line
# Flags, the number of workers, and that of the undisturbed run with the same losses.
MODES = {
    "reproducible": (["--train.reproducible", "true", "--train.precision", "fp32"], "1-3", "0"),
    "fp64": (["--train.precision", "fp64"], "1-3", "0"),
    "one": (["--train.precision", "fp32"], "1", "1"),
    "two": (["--train.precision", "fp32"], "2", "2"),
}
RECOVERY_TIMEOUT_S = 240.0  # from a fault to the next step
CAN_MOUNT = (
    bool(shutil.which("unshare")) and subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0
)
MARK = "LANES_CHAOS_TEST"  # set for all processes of one test: others may run on this machine
# Dead nodes are noticed after 3 seconds instead of 30.
HEALTH_CHECK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
# Mounts the storage, $1, over another disk; $2 still leads to it once it is unmounted.
MOUNT_STORAGE = """
mount --make-rprivate / && mount --bind "$1" "$2" && mount -t tmpfs none "$1" && mount --bind "$2" "$1" || exit 1
shift 2
exec "$@"
"""


class ChaosRun:
    """The cluster and the driver's process, and the faults that can be injected into them."""

    def __init__(self, flags: list[str], folder: Path, workers: str, nodes: int = 3) -> None:
        self.storage, self.storage_link, self.stderr = folder / "storage", folder / "link", folder / "stderr"
        self.raylet = folder / "raylet.sh"
        for path in (self.storage, self.storage_link):
            path.mkdir()
        self.write_raylet_script()
        self.flags = [*flags, "--run.storage", str(self.storage), "--run.name", "disturbed", "--scale.workers", workers]
        self.run = self.storage / "disturbed"
        # Of one CPU each; with fewer nodes the run would wait.
        self.min_nodes, self.max_workers = int(workers.partition("-")[0]), int(workers.rpartition("-")[2])
        self.mark = os.environ[MARK] = uuid.uuid4().hex
        self.driver: subprocess.Popen[str] | None = None
        self.start_cluster(nodes)

    def start_cluster(self, nodes: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECK}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add_node() for _ in range(nodes)]

    def add_node(self, **env: str) -> Any:
        """Adds a node of one CPU, with its own mount of the storage if this user may mount."""
        own_mounts = mock.patch("ray._private.services.RAYLET_EXECUTABLE", str(self.raylet))
        with own_mounts if CAN_MOUNT else contextlib.nullcontext():
            return self.cluster.add_node(num_cpus=1, env_vars=env or None)

    def write_raylet_script(self) -> None:
        """Writes a program that starts Ray's raylet with its own mount of the storage."""
        from ray._private.services import RAYLET_EXECUTABLE

        words = shlex.join([MOUNT_STORAGE, "sh", str(self.storage), str(self.storage_link), RAYLET_EXECUTABLE])
        self.raylet.write_text(f'#!/bin/sh\nexec unshare --mount sh -c {words} "$@"\n')
        self.raylet.chmod(0o755)

    def remove_node(self, node: Any, *, allow_graceful: bool = False) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=allow_graceful)

    def start_driver(self) -> None:
        # Fewer workers are tried sooner than by default.
        timeout = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8"}
        with self.stderr.open("w") as stderr:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "job", "train", *self.flags],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": self.cluster.address, **timeout},
                stderr=stderr,
                text=True,
            )

    def find(self, part: str) -> list[int]:
        """The cluster's processes whose command lines contain these words."""
        return [process for process in marked_processes(self.mark) if part in command_line(process)]

    def processes(self, title: str) -> list[int]:
        """The run's Ray processes whose titles start with these words."""
        return [process for process in self.find("ray::") if command_line(process).startswith(f"ray::{title}")]

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
        elif fault == "lose mount":
            self.lose_mount(rng)
        elif fault == "kill GCS":
            self.kill_gcs()
        elif fault == "no kernel":
            self.add_node_without_kernel()
        elif fault == "node joins" or len(self.nodes) == self.min_nodes:
            self.nodes.append(self.add_node())
        else:
            self.remove_node(rng.choice(self.nodes), allow_graceful=fault == "node leaves")

    def lose_mount(self, rng: random.Random) -> None:
        """Unmounts the storage on a node with a worker, whose files are then on the node's own disk."""
        self.wait_for(self.workers, "worker")
        namespace = mount_namespace(rng.choice(self.workers()))
        (raylet,) = (process for process in self.find("/raylet/raylet ") if mount_namespace(process) == namespace)
        enter = ("nsenter", f"--target={raylet}", "--mount")
        subprocess.run([*enter, "umount", "--lazy", str(self.storage)], check=True)
        self.wait_for_failure("same storage")
        subprocess.run([*enter, "mount", "--bind", str(self.storage_link), str(self.storage)], check=True)
        self.start_driver()

    def kill_gcs(self) -> None:
        """Kills the head's GCS, and a worker, which cannot be started again without it; starts another cluster."""
        self.wait_for(self.workers, "worker")
        for process in (*self.find("/gcs_server "), self.workers()[0]):
            os.kill(process, signal.SIGKILL)
        self.wait_for_failure("")
        self.kill_processes()
        self.start_cluster(len(self.nodes))
        self.start_driver()

    def add_node_without_kernel(self) -> None:
        """Replaces nodes until a worker runs on one without the kernel. The run is refused or continues as before."""
        while len(self.nodes) >= self.max_workers:
            self.remove_node(self.nodes[0])
        node = self.add_node(LANES_KERNEL="off")
        self.nodes.append(node)
        assert self.driver
        driver = self.driver
        self.wait_for(lambda: driver.poll() is not None or self.has_worker_without_kernel(), "worker there")
        step = self.step()
        if not self.wait_for_step(step + 30):
            self.wait_for_failure("kernel")
            self.remove_node(node)
            self.nodes.append(self.add_node())
            self.start_driver()

    def has_worker_without_kernel(self) -> bool:
        environments = (Path(f"/proc/{process}/environ").read_bytes() for process in self.workers())
        with contextlib.suppress(OSError):
            return any(b"LANES_KERNEL=off" in environment.split(b"\0") for environment in environments)
        return False

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what} for {RECOVERY_TIMEOUT_S:.0f} s"
            time.sleep(0.05)

    def wait_for_failure(self, part: str) -> None:
        """Waits until the driver ends with one error line, which contains this part and how to resume."""
        assert self.driver
        status = self.driver.wait(RECOVERY_TIMEOUT_S)
        text = self.stderr.read_text()
        assert status == 1 and text.startswith("error: ") and text.count("\n") == 1, (status, text)
        assert part in text and "Resume: the same command" in text, text
        print(f"    {text.rstrip()}", flush=True)

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

    def kill_processes(self) -> None:
        for process in marked_processes(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def mount_namespace(process: int) -> str:
    return os.readlink(f"/proc/{process}/ns/mnt")


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


def possible_faults(mode: str) -> list[str]:
    """Without the kernel, other modes have other losses."""
    is_possible = {"lose mount": CAN_MOUNT, "no kernel": mode in ("reproducible", "fp64")}
    return [fault for fault in (*FAULTS, *ENDING_FAULTS) if is_possible.get(fault, True)]


def draw_faults(count: int, seed: int, mode: str) -> list[str]:
    """Faults in a random order, each as often as the others, give or take one."""
    rng, kinds, faults = random.Random(seed), possible_faults(mode), list[str]()
    while len(faults) < count:
        faults += rng.sample(kinds, len(kinds))
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
            assert run.wait_for_step(step), f"the run ended before the last fault: {run.stderr.read_text()}"
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
    check_same_result(run.run, folder / "undisturbed", steps, exact=mode != "fp64")


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
        prog="python tests/chaos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=12, help="number of faults")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--mode", choices=MODES, default="reproducible")
    parser.add_argument("--only", choices=(*FAULTS, *ENDING_FAULTS, SLOW_STORE), help="inject only this fault")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    flags = ["--model.cell", "lstm", "--model.num_layers", "2", "--model.hidden_size", "64", "--model.dropout", "0.3"]
    flags += ["--optimizer.name", "adamw", "--optimizer.learning_rate", "0.002", "--corpus.cleaning", "d2l"]
    count, seed = arguments.faults, arguments.seed
    faults = [arguments.only] * count if arguments.only else draw_faults(count, seed, arguments.mode)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != SLOW_STORE:
            run_chaos(flags, arguments.steps, faults, seed, arguments.mode, Path(folder))
        if CAN_MOUNT and arguments.only in (None, SLOW_STORE):
            from object_store import run_takeover

            print("a driver is replaced while its object store is slow", flush=True)
            steps = ["--train.max_steps", "600", "--train.checkpoint_every", "20", "--train.log_every", "1"]
            run_takeover([*flags, *steps], Path(folder))
            print("same result, and the first driver wrote nothing more")


if __name__ == "__main__":
    main()
