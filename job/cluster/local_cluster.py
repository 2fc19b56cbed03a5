"""Starts a cluster on this machine that belongs to one run: closed to others, and gone with the run."""

import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import ray

from job.cluster.ray_extensions import LOOPBACK, ended_processes, shutdown, start_private_cluster
from job.console import program
from job.errors import RunFailed, UserError

START_ATTEMPTS, RETRY_DELAY_S, CONNECT_TIMEOUT_S = 3, 2.0, 5.0
HEAD_TIMEOUT_S = 35.0  # after 60 s Ray's core ends this process without an error
REMOVE_ATTEMPTS, REMOVE_DELAY_S = 10, 0.2
MIN_OPEN_FILES = 128
MIN_FREE_BYTES = 64 << 20  # for Ray's logs
# The path of the socket with the longest name, which ends with the time and a process ID.
SESSION_PATH = "/r1/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"


def start_local_cluster(num_cpus: int, stack: ExitStack) -> None:
    """Starts a cluster with this number of CPUs. Removes its files when the stack is closed.

    Raises UserError if Ray cannot start on this machine.
    """
    check_machine()
    folder = create_ray_folder()
    stack.callback(_remove, folder)
    with keep_sigterm_handler(), suppress_stderr():
        _start_with_retries(num_cpus, folder)


@contextmanager
def keep_sigterm_handler() -> Iterator[None]:
    """Restores the handler after the block. Ray installs one that prints a stack trace or ends the process.

    Its core does that without Python, so ``getsignal`` does not show it. Outside the main thread Python cannot.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _start_with_retries(num_cpus: int, folder: str) -> None:
    """Starts it again if that fails: an overloaded machine refuses to start processes, or is too slow for Ray."""
    children = child_processes()
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            return start_private_cluster(num_cpus, f"{folder}/r{attempt}")
        except Exception as error:
            shutdown()
            for process in child_processes() - children:  # that Ray has started before it failed
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if attempt == START_ATTEMPTS:
                raise UserError(
                    f"Ray cannot start on this machine: {type(error).__name__}: {' '.join(str(error).split())}",
                    f"end other processes or raise the limits of ulimit -a; {program()} doctor checks what Ray needs",
                ) from None
            time.sleep(RETRY_DELAY_S)


def child_processes() -> set[int]:
    """Returns the child processes of this process, of all its threads. Empty where the system does not list them."""
    processes: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            processes |= set(map(int, task.read_text().split()))
    return processes


def _remove(folder: str) -> None:
    for _ in range(REMOVE_ATTEMPTS):  # Ray's last processes may still create files
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(REMOVE_DELAY_S)


def check_processes(remedy: str = "") -> None:
    """Raises RunFailed if a process of Ray that this process has started and needs has ended, or the cluster's head."""
    if ended := ended_processes():
        raise RunFailed(f"Ray's process {ended[0]} ended unexpectedly; it may have been killed for its memory", remedy)
    address = ray.get_runtime_context().gcs_address
    deadline = time.monotonic() + HEAD_TIMEOUT_S
    while not _accepts_connections(address):
        if time.monotonic() > deadline:
            raise RunFailed(f"the cluster's head at {address} has ended or cannot be reached", remedy)
        time.sleep(RETRY_DELAY_S)


def _accepts_connections(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def disconnect() -> None:
    """Ends the connection to the cluster, and a cluster that this process has started."""
    if not ended_processes():  # Ray would wait for them; the others end with this process
        shutdown()


def check_machine() -> None:
    """Raises UserError if something that Ray needs is missing on this machine."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"{LOOPBACK}: {error.strerror}", "Ray needs the loopback interface: ip link set lo up"
        ) from None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= limit < MIN_OPEN_FILES:
        raise UserError(f"a process may open only {limit} files", f"raise the limit: ulimit -n {MIN_OPEN_FILES}")


def create_ray_folder() -> str:
    """Creates a folder for Ray's files, which only this user can open. Raises UserError if none can be used.

    Paths of sockets are limited to about 100 bytes, and schedulers set TMPDIR to longer ones.
    """
    problems = []
    for parent in filter(None, (os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"), "/tmp", "/var/tmp")):  # noqa: S108
        folder = ""
        try:
            folder = tempfile.mkdtemp(prefix="ray-", dir=os.path.abspath(parent))
            _check_folder(folder)
            return folder
        except OSError as error:
            problems.append(f"{parent}: {error.strerror or error}")
            shutil.rmtree(folder, ignore_errors=True)
    raise UserError(
        f"no temporary folder can be used for Ray: {', '.join(problems)}",
        "set RAY_TMPDIR to a folder with a short path and free space",
    )


def _check_folder(folder: str) -> None:
    """Raises OSError if Ray could not create a socket and write its logs there."""
    path = Path(folder + SESSION_PATH)
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        raise OSError(f"less than {MIN_FREE_BYTES >> 20} MiB are free")
    shutil.rmtree(f"{folder}/r1")


@contextmanager
def suppress_stderr() -> Iterator[None]:
    """Discards what is written to standard error within the block, also by Ray's core, without Python."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(devnull)
        os.close(saved)
