"""Shows in one command what a GPU must show: ``scripts/gpu-run [--device cpu] [--quick] [--only PART …]``.

Runs the GPU tests, the GPU benchmarks and a training of tiny Shakespeare, each in a process with a time limit, and
writes ``gpu-report.json`` and ``gpu-report.md`` after each of them. Uses a bundle of ``scripts/gpu-bundle`` for
packages that are not installed. Imports only what every machine with torch has. If it is itself killed by SIGKILL, the
part that runs is not ended.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_packages import Bundle, BundleError, installed_version, unpack
from benchmarks.gpu_report import TARGET_NATS, Report, time_to_target
from benchmarks.pytest_results import RESULTS_ENV_VAR

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / ".gpu-bundle" / "bundle.tar"
TAIL_LINES = 30
RUN_ID_ENV_VAR = "LANES_GPU_RUN_ID"
END_SECONDS = 5.0  # between SIGTERM and SIGKILL
QUICK_TRAINING = ["--model.hidden_size", "64", "--train.max_steps", "60"]


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    status: str  # ok, failed or timeout
    exit_status: int | None  # None: killed at its limit
    seconds: float
    output: str  # its last lines

    def facts(self) -> dict[str, Any]:
        """What the report stores."""
        output = {} if self.status == "ok" else {"output": self.output}
        return {"status": self.status, "exit_status": self.exit_status, "seconds": round(self.seconds, 1)} | output


@dataclass(frozen=True)
class Session:
    """What all parts share."""

    device: str
    quick: bool
    folder: Path  # for files that are removed at the end
    environment: dict[str, str]
    text: Path | None  # tiny Shakespeare
    has_ray: bool

    @property
    def source(self) -> str:
        """The corpus of the trainings."""
        return str(self.text or "embedded")


def run_process(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Runs a command, its output in a file; kills it and its children at its limit of seconds."""
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            exit_status = process.wait(limit)
        except subprocess.TimeoutExpired:
            exit_status = None
        finally:
            end_group(process)
            end_marked(environment.get(RUN_ID_ENV_VAR, ""))
    status = "timeout" if exit_status is None else "failed" if exit_status else "ok"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
    return Outcome(status, exit_status, time.monotonic() - start, tail)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def end_marked(run_id: str) -> None:
    """Ends the processes of this run that have left their group, as Ray's do: their environment has its identifier."""
    entry = f"{RUN_ID_ENV_VAR}={run_id}".encode()
    for path in Path("/proc").glob("[0-9]*/environ") if run_id else ():
        with suppress(OSError):  # it has ended, or is another user's
            if entry in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may have been cut off, none if it does not exist."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def refuse(problem: str) -> NoReturn:
    """Ends the program with one line before any part has run."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def describe_device(session: Session) -> dict[str, Any]:
    """Device and versions. Ends the program with one line if torch or the device is missing."""
    log = session.folder / "device.log"
    command = python("-m", "benchmarks.gpu_device", "--device", session.device)
    outcome = run_process(command, 120, log, session.environment)
    rows = [row for row in read_json_lines(log) if isinstance(row, dict)]
    if outcome.status == "ok" and rows:
        return rows[-1]
    problem = outcome.output.splitlines()[-1] if outcome.output else outcome.status
    refuse(problem.removeprefix("error: "))


def run_smoke(session: Session, limit: float) -> dict[str, Any]:
    """A training of twenty steps with the seed's model, and the seconds from its command to the first step."""
    steps = ["--train.max_steps", "20", "--train.log_every", "1"]
    outcome, rows, start = train(session, "configs/seed.toml", "smoke", steps, limit)
    first = [row["time"] - start for row in rows if row["split"] == "train"][:1]
    return outcome.facts() | {
        "steps": rows[-1]["step"] if rows else 0,
        "seconds_to_first_step": first[0] if first else None,
    }


def train(
    session: Session, config: str, name: str, flags: list[str], limit: float
) -> tuple[Outcome, list[dict[str, Any]], float]:
    """Trains in one process; returns its outcome, its metrics, and when the command started in Unix seconds."""
    accelerator = "gpu" if session.device == "cuda" else "cpu"
    command = python("-m", "job", "train", config, "--corpus.source", session.source, *flags, "--scale.workers", "0")
    command += ["--scale.accelerator", accelerator, "--run.storage", str(session.folder / "runs"), "--run.name", name]
    start = time.time()
    outcome = run_process(command, limit, session.folder / f"{name}.log", session.environment)
    return outcome, read_json_lines(session.folder / "runs" / name / "metrics.jsonl"), start


def run_tests(session: Session, limit: float) -> dict[str, Any]:
    """The tests that are marked ``gpu``; without Ray those that are also marked ``cluster`` are left out."""
    left_out = ["slow", "long", "cluster"] if session.quick else [] if session.has_ray else ["cluster"]
    marked = " and ".join(["gpu", *(f"not {marker}" for marker in left_out)])
    file = session.folder / "tests.jsonl"
    # Other files may import packages that this machine lacks.
    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    command = python("-m", "pytest", "-m", marked, "-p", "benchmarks.pytest_results", "-p", "no:cacheprovider")
    command += ["--continue-on-collection-errors", *files]
    environment = session.environment | {RESULTS_ENV_VAR: str(file)}
    outcome = run_process(command, limit, session.folder / "tests.log", environment)
    return facts_of_tests(outcome, read_json_lines(file), left_out, session.has_ray)


def facts_of_tests(outcome: Outcome, rows: list[dict[str, Any]], left_out: list[str], has_ray: bool) -> dict[str, Any]:
    """The results of the tests as the report stores them."""
    if not has_ray:  # files that import Ray are as little run as tests that start it
        unavailable = [row for row in rows if row["outcome"] == "error" and "No module named 'ray" in row["reason"]]
        rows = [row | {"outcome": "not run", "reason": "Ray is missing"} if row in unavailable else row for row in rows]
    counts = {name: sum(row["outcome"] == name for row in rows) for name in ("passed", "failed", "error", "skipped")}
    facts = outcome.facts()
    only_unavailable = not counts["failed"] and not counts["error"] and counts["passed"]
    if outcome.exit_status == 1 and only_unavailable:
        facts = {"status": "ok", "exit_status": 1, "seconds": facts["seconds"]}
    if outcome.exit_status == 5 and not rows:
        facts["status"] = "none selected"
    reasons = {"cluster": "Ray is missing" if not has_ray else "left out by --quick"}
    not_run = [f"tests marked {marker}: {reasons.get(marker, 'left out by --quick')}" for marker in left_out]
    return facts | counts | {"not_run": not_run, "results": rows}


def run_benchmarks(session: Session, limit: float) -> dict[str, Any]:
    """The benchmarks of ``benchmarks/gpu.py``, which ends by itself within its limit."""
    file = session.folder / "benchmarks.json"
    command = python("-m", "benchmarks.gpu", "--device", session.device, "--json", str(file))
    command += ["--seconds", str(round(limit * 0.75)), *(["--quick"] if session.quick else [])]
    outcome = run_process(command, limit, session.folder / "benchmarks.log", session.environment)
    results = json.loads(file.read_text()) if file.exists() else {}
    return outcome.facts() | results


def run_training(session: Session, limit: float) -> dict[str, Any]:
    """Tiny Shakespeare until the validation loss of nanoGPT's recipe."""
    quick = QUICK_TRAINING if session.quick else []
    outcome, rows, start = train(session, "benchmarks/shakespeare_gpu.toml", "shakespeare", quick, limit)
    validations = [row for row in rows if row["split"] == "validation"]
    return training_facts(outcome, validations, start, session)


def run_transformer(session: Session, limit: float) -> dict[str, Any]:
    """The same text by a transformer with nanoGPT's recipe, as a program of our own."""
    if not session.text:
        return {"status": "not run", "reason": "tiny Shakespeare is missing"}
    file = session.folder / "transformer.jsonl"
    command = python("-m", "benchmarks.transformer", str(session.text), "--device", session.device, "--json", str(file))
    start = time.time()
    command += ["--target", str(TARGET_NATS), *(["--quick"] if session.quick else [])]
    outcome = run_process(command, limit, session.folder / "transformer.log", session.environment)
    return training_facts(outcome, read_json_lines(file), start, session)


def training_facts(outcome: Outcome, rows: list[dict[str, Any]], start: float, session: Session) -> dict[str, Any]:
    """The losses of a training, and when it reached the target, in seconds from its command."""
    keys = ("step", "nats", "evaluation_seconds")
    curve = [{key: row[key] for key in keys if key in row} | {"seconds": round(row["time"] - start, 2)} for row in rows]
    return outcome.facts() | {
        "corpus": "tiny Shakespeare" if session.text else "embedded",
        "target_nats": TARGET_NATS,
        "seconds_to_target": time_to_target(curve) if session.text else None,
        "validation": curve,
    }


# Part, its seconds on a GPU and with --quick, its function; in the order of importance, within 10 minutes together.
PARTS = [
    ("smoke", 60, 60, run_smoke),
    ("tests", 220, 110, run_tests),
    ("benchmarks", 170, 80, run_benchmarks),
    ("training", 70, 50, run_training),
    ("transformer", 110, 50, run_transformer),
]
TOTAL_SECONDS, QUICK_TOTAL_SECONDS = 570.0, 175.0


def run_parts(session: Session, report: Report, names: list[str], deadline: float) -> None:
    """Runs the parts of these names until the deadline and writes the report after each."""
    for name, seconds, quick_seconds, run_part in (part for part in PARTS if part[0] in names):
        limit = min(quick_seconds if session.quick else seconds, deadline - time.monotonic())
        print(f"{name}: at most {limit:.0f} s", flush=True)
        facts = run_part(session, limit) if limit >= 20 else {"status": "not run", "reason": "no time left"}
        report.add(name, facts)
        print(f"{name}: {facts['status']}", flush=True)


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[tuple[Session, dict[str, Any]]]:
    """A folder with the unpacked packages and texts, and the environment of the child processes."""
    with tempfile.TemporaryDirectory(prefix="lanes-gpu-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        packages: dict[str, list[str]] = {"unpacked": [], "missing": []}
        texts, site = folder / "corpora", folder / "packages"
        if args.bundle.is_file():
            try:
                bundle = Bundle(args.bundle)
                packages = unpack(bundle, site)
                bundle.unpack_corpora(texts)
            except BundleError as error:
                packages = {"not used": [str(error)]}
                shutil.rmtree(site, ignore_errors=True)  # half of the packages are worse than none
        paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        has_ray = "ray" in packages.get("unpacked", []) or installed_version("ray") is not None
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), RUN_ID_ENV_VAR: uuid.uuid4().hex}
        candidates = [texts / "tinyshakespeare.txt", ROOT.parent / "shared" / "corpora" / "tinyshakespeare.txt"]
        text = next((path for path in candidates if path.exists()), None)
        yield Session(args.device, args.quick or args.device == "cpu", folder, environment, text, has_ray), packages


def stop(number: int, _: object) -> None:
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small sizes, as always on a CPU: checks the programs")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-report", metavar="DIR")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="FILE")
    names = [name for name, *_ in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    args, start = parser.parse_args(), time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if args.bundle != BUNDLE and not args.bundle.is_file():
        refuse(f"--bundle {args.bundle}: no such file")
    with prepared(args) as (session, packages):
        described = describe_device(session)
        try:
            report = Report(args.output, session.quick, packages, described)
        except OSError as error:
            refuse(f"--output {args.output}: {error.strerror}")
        run_parts(session, report, args.only, start + (QUICK_TOTAL_SECONDS if session.quick else TOTAL_SECONDS))
        report.finish()
    print(f"report {args.output / 'gpu-report.md'}")
    sys.exit(report.exit_status)
