"""clusters/slurm.sh with simulated commands of Slurm; in most tests Ray and the run are simulated, too."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SCRIPT = ROOT / "clusters" / "slurm.sh"
WAIT_S = 400.0
pytestmark = pytest.mark.slow

# Slurm: each step runs on this machine, and srun passes signals on to its task.
SRUN = """#!/bin/bash
echo "srun $*" | tr '\\n' ' ' | sed 's/ bash -c.*run_node/ run_node/' >> "$LOG"; echo >> "$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$LOG"
if [[ $1 == show ]]; then printf '127.0.0.1\\nlocalhost\\n'; fi
"""
RAY = """#!/bin/bash
echo "ray $*" >> "$LOG"
if [[ -e $FOLDER/no-ray ]]; then echo "no port is free"; exit 1; fi
for option; do case $option in --temp-dir=*) folder=${option#*=} ;; esac; done
echo $$ >> "$FOLDER/nodes"
if [[ $2 == --block && $* == *--head* ]]; then echo 127.0.0.1:4321 > "$folder/ray_current_cluster"; fi
sleep 60 & wait
"""
# Python: short programs run, except the one that waits for Ray's nodes; a run waits for SIGTERM unless it ends at once.
PYTHON = f"""#!/bin/bash
if [[ $1 == -c && $2 != *"import sys, time, ray"* ]]; then exec {sys.executable} "$@"; fi
if [[ $1 == -c ]]; then
    until (($(grep -c "^ray start" "$LOG") == $3)); do sleep 0.05; done
    exit 0
fi
save() {{
    sleep 0.3
    alive=0
    for node in $(cat "$FOLDER/nodes"); do if kill -0 "$node"; then alive=$((alive + 1)); fi; done
    echo "driver saved with $alive nodes" >> "$LOG"
    kill $!
    exit ${{STATUS:-143}}
}}
trap save TERM
echo "driver $* at ${{RAY_ADDRESS:-none}} token ${{#RAY_AUTH_TOKEN}} $RAY_AUTH_TOKEN" >> "$LOG"
if [[ $* == *at-once* ]]; then exit ${{STATUS:-0}}; fi
sleep 60 & wait
"""


class Job:
    """A job of two nodes, or of one, in a folder of its own."""

    def __init__(self, folder: Path, job_id: str) -> None:
        self.folder, self.log, self.ray_folder = folder, folder / "log", Path(f"/tmp/lanes-{job_id}")
        self.tools = folder / ".venv" / "bin"  # what the script puts first on the PATH
        self.tools.mkdir(parents=True)
        self.install(srun=SRUN, scontrol=SCONTROL, ray=RAY, python=PYTHON)
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "LOG": str(self.log), "FOLDER": str(folder),
            "SLURM_JOB_ID": job_id, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip
        self.process: subprocess.Popen[str] | None = None

    def install(self, **tools: str) -> None:
        for name, text in tools.items():
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        # Commands that ran in the tests' process have made it ignore SIGUSR1, which a shell cannot undo.
        self.process = subprocess.Popen(
            ["env", "--default-signal=USR1", "bash", SCRIPT, *words],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """The exit status and standard error of a job that ends by itself."""
        process = self.start(*words, **environment)
        errors = process.communicate(timeout=WAIT_S)[1]
        return process.returncode, errors

    def lines(self) -> list[str]:
        return [line.strip() for line in self.log.read_text().splitlines() if line.strip()] if self.log.exists() else []

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process and self.process.poll() is None, self.process and self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def is_cleaned_up(self, num_nodes: int) -> bool:
        """Whether Ray ran on this many nodes, and has left neither processes nor files."""
        nodes = (self.folder / "nodes").read_text().split()
        alive = [node for node in nodes if Path(f"/proc/{node}").exists()]
        return len(nodes) == num_nodes and not alive and not self.ray_folder.exists()

    def close(self) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        shutil.rmtree(self.ray_folder, ignore_errors=True)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path, f"{os.getpid()}-test")
    yield job
    job.close()


def is_running(job: Job) -> bool:
    return any(line.startswith("driver -m job") for line in job.lines())


def test_job_on_two_nodes_starts_ray_and_returns_status_of_run(slurm: Job) -> None:
    assert slurm.run("train", "at-once.toml", "--scale.workers", "2") == (0, "")
    lines = slurm.lines()
    (driver,) = [line for line in lines if line.startswith("driver")]
    command, token = driver.split(" token ")
    assert command == (
        f"driver -m job train --run.name lanes-{os.getpid()}-test at-once.toml --scale.workers 2 at 127.0.0.1:4321"
    )
    head, worker = [line for line in lines[: lines.index(driver)] if line.startswith("ray start")]
    assert "--head" in head and "--include-dashboard=false" in head and "--address=127.0.0.1:4321" in worker
    length, secret = token.split()
    assert length == "64"
    assert not [line for line in lines if secret in line and line != driver]  # no other user can list it
    assert [re.findall("--(nodelist|nodes|ntasks)=(\\S+)", line) for line in lines if line.startswith("srun")] == [
        [("nodelist", "127.0.0.1"), ("nodes", "1"), ("ntasks", "1")],
        [("nodelist", "localhost"), ("nodes", "1"), ("ntasks", "1")],
    ]
    assert slurm.is_cleaned_up(2)


def test_ray_of_job_has_no_fixed_port(slurm: Job) -> None:
    """Jobs that share a node do not collide."""
    slurm.run("train", "at-once")
    head, worker = [line for line in slurm.lines() if line.startswith("ray start")]
    zero = {"dashboard-agent-listen-port", "min-worker-port", "max-worker-port"}
    assert set(re.findall(r"--([\w-]*port)=0", worker)) == zero
    assert set(re.findall(r"--([\w-]*port)=0", head)) == zero | {"port"}
    (other,) = re.findall(r"--([\w-]*port=[1-9]\d*)", head + worker)
    name, port = other.split("=")
    assert name == "ray-client-server-port" and port != "10001"


def test_job_with_failed_run_returns_its_status(slurm: Job) -> None:
    assert slurm.run("train", "at-once", STATUS="2") == (2, "")
    assert slurm.is_cleaned_up(2)


def test_job_at_time_limit_saves_and_is_queued_again(slurm: Job) -> None:
    process = slurm.start("train", "x.toml")
    slurm.wait_for(lambda: is_running(slurm))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(WAIT_S) == 143
    assert slurm.lines()[-2:] == ["driver saved with 2 nodes", f"scontrol requeue {os.getpid()}-test"]
    assert slurm.is_cleaned_up(2)


def test_job_that_failed_at_time_limit_is_not_queued_again(slurm: Job) -> None:
    process = slurm.start("train", "x.toml", STATUS="1")
    slurm.wait_for(lambda: is_running(slurm))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(WAIT_S) == 1
    assert not [line for line in slurm.lines() if "requeue" in line]


def test_cancelled_job_saves_before_ray_ends(slurm: Job) -> None:
    """Slurm sends SIGTERM to the script and to the task of each step, but not to their child processes."""
    process = slurm.start("train", "x.toml")
    slurm.wait_for(lambda: is_running(slurm))
    listing = ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)]
    children = subprocess.run(listing, check=True, capture_output=True, text=True)
    tasks = [int(line.split()[0]) for line in children.stdout.splitlines() if "run_node" in line]
    assert len(tasks) == 2
    for task in [*tasks, process.pid]:
        os.kill(task, signal.SIGTERM)
    assert process.wait(WAIT_S) == 143
    assert slurm.lines()[-1] == "driver saved with 2 nodes"
    assert slurm.is_cleaned_up(2)


def test_job_without_ray_on_first_node_is_an_error(slurm: Job) -> None:
    (slurm.folder / "no-ray").touch()
    status, errors = slurm.run("train", "x.toml")
    assert status == 1 and "no port is free" in errors
    assert errors.endswith("error: Ray's head did not start on 127.0.0.1\n")
    assert not is_running(slurm)


def test_job_on_one_node_starts_no_cluster(slurm: Job) -> None:
    """The run starts its own, which is closed to other machines and users."""
    assert slurm.run("train", "at-once", SLURM_JOB_NUM_NODES="1") == (0, "")
    (line,) = slurm.lines()
    assert line.startswith("driver -m job train") and " at none token 0" in line


def test_job_without_verb_is_refused(slurm: Job) -> None:
    status, errors = slurm.run()
    assert status == 2 and errors.startswith("error: the verb and its arguments are missing")


@pytest.mark.cluster
@pytest.mark.long
def test_job_with_real_ray_that_is_queued_again_resumes(slurm: Job, prose: Path) -> None:
    """Two nodes of Ray on this machine, two workers; the second start of the job finishes the run."""
    bin_folder = Path(sys.executable).parent
    slurm.install(**{name: f'#!/bin/bash\nexec {bin_folder}/{name} "$@"\n' for name in ("python", "ray")})
    runs = slurm.folder / "runs"
    words = ["train", "--corpus.source", str(prose), "--stream.batch_size", "8", "--stream.num_steps", "8",
             "--model.hidden_size", "16", "--train.epochs", "8", "--scale.workers", "2", "--run.storage", str(runs),
             "--run.name", "mine", "--train.checkpoint_every", "100"]  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT)}
    process = slurm.start(*words, **environment)
    slurm.wait_for(lambda: [*runs.glob("mine/checkpoints/*/manifest.json")])
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, output + errors
    assert "saved at step" in output and any("requeue" in line for line in slurm.lines())
    assert not slurm.ray_folder.exists()
    status, errors = slurm.run(*words, **environment)
    assert status == 0, errors
    result = json.loads((runs / "mine" / "result.json").read_text())
    assert result["restarts"] >= 1 and result["workers"] == 2
