"""The lease of a run: only one live driver may write into its folder.

``owner.json`` names the driver that holds the lease: its host, its process and a random token. The driver rewrites
``heartbeat.json`` every ten seconds. A driver whose process has ended on this host, or whose host is this one and has
been rebooted, is dead at once; any other is dead when neither file has changed for ``LEASE_TIMEOUT_S``. The observer
measures that by its own monotonic clock, since the clocks of two hosts may differ.

The driver writes through ``Lease.folder``, which checks the lease before each attempt of each request that changes
something. Object stores have no conditional writes, so an attempt starts only if the last heartbeat is recent, which
leaves it at least ``LEASE_TIMEOUT_S`` less ``_MAX_HEARTBEAT_AGE_S`` until another driver may take the run over.
Heartbeats have a file of their own, so that a slow one cannot overwrite the lease of a new owner.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from job.errors import RunFailed, UserError, report_os_error
from job.storage import Folder

OWNER_FILE = "owner.json"
HEARTBEAT_FILE = "heartbeat.json"
LOCK_FILE = ".lock"
HEARTBEAT_INTERVAL_S = 10.0
LEASE_TIMEOUT_S = 60.0  # without a heartbeat
_MAX_HEARTBEAT_AGE_S = 20.0  # at the start of a write
POLL_INTERVAL_S = 0.5
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True)
class Owner:
    """The driver that holds a lease, as ``owner.json`` names it."""

    host: str
    machine: str
    boot: str
    pid: int
    started_at: str
    token: str

    @classmethod
    def this_process(cls) -> "Owner":
        """Returns this process, with a new token."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine_id(), _boot_id(), pid, _process_start_time(pid), uuid.uuid4().hex)

    @property
    def is_alive(self) -> bool | None:
        """Whether the driver is alive. None if it is on another host or in another container."""
        if (self.host, self.machine) != (socket.gethostname(), _machine_id()):
            return None
        return self.boot == _boot_id() and _is_running(self.pid, self.started_at)


class Lease(AbstractContextManager["Lease"]):
    """The right to write into a run's folder, until it is released or another driver takes it over.

    As a context manager it is released at the end of the block.

    Attributes:
        folder: the run's folder; each change through it raises RunFailed once another driver has taken the run over
    """

    def __init__(self, folder: Folder, token: str) -> None:
        self.folder = replace(folder, before_change=self.check)
        self.token = token
        self.unchecked_folder = replace(folder, retry=False)
        self.renewed_at = time.time()  # unlike the monotonic clock, it does not stop while the machine is suspended
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._send_heartbeats, daemon=True)

    def _send_heartbeats(self) -> None:
        while not self.released.wait(HEARTBEAT_INTERVAL_S):
            with suppress(OSError, RunFailed):  # if it lasts, the next change of the folder raises it
                self.check()
                self._renew()

    def _renew(self) -> None:
        started_at = time.time()
        self.unchecked_folder.write(HEARTBEAT_FILE, json.dumps({"time": started_at}).encode())
        self.renewed_at = started_at

    @property
    def _is_stale(self) -> bool:
        return abs(time.time() - self.renewed_at) > _MAX_HEARTBEAT_AGE_S

    def check(self) -> None:
        """Raises RunFailed if another driver has taken the run over, OSError if the lease cannot be read or renewed."""
        if self._is_stale:
            self._renew()
        owner = _parse_owner(_read(self.unchecked_folder, OWNER_FILE))
        if owner is None or owner.token != self.token:
            raise RunFailed(f"{self.folder}: another driver has taken this run over; this one stops writing")
        if self._is_stale:
            raise TimeoutError(f"{HEARTBEAT_FILE} could not be written within {_MAX_HEARTBEAT_AGE_S:.0f} s")

    def check_if_stale(self) -> None:
        """Raises RunFailed as ``check``, which it calls only if there was no heartbeat for some time."""
        if self._is_stale:
            with suppress(OSError):  # if it lasts, the next change of the folder raises it
                self.check()

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lease up, so that the next driver can acquire it at once."""
        self.released.set()
        self.thread.join()
        with suppress(OSError, RunFailed):
            self.folder.remove(HEARTBEAT_FILE)
            self.folder.remove(OWNER_FILE)


class LeaseObserver:
    """Watches the lease of a run, to find out whether the driver that holds it is alive.

    Args:
        folder: the run's folder
        subject: what is in it, for messages
        field: the field that names it
    """

    def __init__(self, folder: Folder, subject: str = "this run", field: str = "run.name") -> None:
        self.folder, self.subject, self.field = folder, subject, field
        self.files: tuple[bytes | None, bytes | None] | None = None  # owner and heartbeat, since the first reading
        self.unchanged_since = 0.0  # by time.monotonic

    @property
    def owner(self) -> Owner | None:
        """The driver that holds the lease. None if there is none, or if the file is damaged."""
        return _parse_owner(self.files[0] if self.files else None)

    def is_held(self) -> bool | None:
        """Reads the lease. Returns whether a live driver holds it, and None if it must be watched for longer.

        Raises UserError if the lease cannot be read, since it may be that of a live driver.
        """
        with report_os_error(f"{self.folder}/{OWNER_FILE}: cannot be read"):
            files = _read(self.folder, OWNER_FILE), _read(self.folder, HEARTBEAT_FILE)
        has_changed = self.files is not None and files != self.files
        if files != self.files:
            self.files, self.unchanged_since = files, time.monotonic()
        is_alive = self.owner.is_alive if self.owner else None
        if files[0] is None or is_alive is False or (is_alive is None and self.remaining_s <= 0):
            return False
        return is_alive or has_changed or None

    @property
    def remaining_s(self) -> float:
        """Seconds after which the driver counts as dead if it writes no heartbeat."""
        return self.unchanged_since + LEASE_TIMEOUT_S - time.monotonic()

    def describe_owner(self) -> str:
        """Returns the driver's process and host, for messages."""
        return f"process {self.owner.pid} on {self.owner.host}" if self.owner else f"an unknown driver ({OWNER_FILE})"

    def in_use(self) -> UserError:
        """Returns the error that another driver holds the lease."""
        is_local = self.owner and self.owner.is_alive
        remedy = "stop it" if is_local else f"if it is dead, retry in {max(1.0, self.remaining_s):.0f} s"
        problem = f"{self.folder}: {self.subject} is in use by {self.describe_owner()}"
        return UserError(problem, f"{remedy}, or choose another {self.field}")


def acquire_lease(folder: Folder, observer: LeaseObserver | None = None) -> Lease:
    """Acquires the lease of the run in a folder.

    Args:
        folder: the run's folder
        observer: has watched the lease so far

    Raises:
        UserError: another driver holds the lease and is not known to be dead, or the lease cannot be read
        RunFailed: the lease cannot be written
    """
    observer = observer or LeaseObserver(folder)
    owner = Owner.this_process()
    lease = Lease(folder, owner.token)

    def check_free() -> None:
        if observer.is_held() is not False and observer.owner != owner:
            raise observer.in_use()

    try:
        with _lock(observer):
            replace(folder, before_change=check_free).write(OWNER_FILE, json.dumps(asdict(owner)).encode())
    except OSError as error:
        problem = f"{folder}/{OWNER_FILE}: cannot be written: {error.strerror or error}"
        raise RunFailed(problem, "grant write access or free space there, and start the run again") from None
    lease.thread.start()
    return lease


def wait_until_expired(
    folder: Folder, notify: Callable[[str], None], subject: str = "this run", field: str = "run.name"
) -> LeaseObserver:
    """Waits until it is known whether a live driver holds the lease of the run in a folder.

    Args:
        folder: the run's folder
        notify: called once with a message if it has to wait
        subject, field: as for ``LeaseObserver``

    Returns:
        the observer, for ``acquire_lease``

    Raises:
        UserError: a live driver holds the lease, or the lease cannot be read
    """
    observer = LeaseObserver(folder, subject, field)
    is_held = observer.is_held()
    if is_held is None:
        driver = f"{folder}'s driver, {observer.describe_owner()}"
        notify(f"waiting for a heartbeat of {driver}, for at most {LEASE_TIMEOUT_S:.0f} s")
    while is_held is None:
        time.sleep(POLL_INTERVAL_S)
        is_held = observer.is_held()
    if is_held:
        raise observer.in_use()
    return observer


def _lock(observer: LeaseObserver) -> AbstractContextManager[object]:
    """Keeps two drivers on one disk from acquiring the lease at the same moment.

    No other user can open the lock file, and so keep it locked. Nobody waits for the lock.
    """
    folder = observer.folder
    if folder.local_path is None:
        return nullcontext()
    folder.local_path.mkdir(parents=True, exist_ok=True)
    try:
        file = open(folder.local_path / LOCK_FILE, "ab", opener=partial(os.open, mode=0o600))  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        problem = f"{folder}: another driver is just starting {observer.subject}"
        raise UserError(problem, f"choose another {observer.field}") from None
    except OSError:  # the lock file of another user, or a file system without locks
        return nullcontext()
    return file


def _read(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read(name, _MAX_FILE_BYTES)
    except FileNotFoundError:
        return None


def _parse_owner(data: bytes | None) -> Owner | None:
    try:
        values = json.loads(data or b"")
        is_valid = all(type(values[name]) is cls for name, cls in Owner.__annotations__.items())
        is_valid = is_valid and values["host"].isprintable()  # it is shown on the terminal
        return Owner(**{name: values[name] for name in Owner.__annotations__}) if is_valid else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _machine_id() -> str:
    """Identifies the machine and the container, within which alone a process id means anything."""
    machine = _read_line("/etc/machine-id") or _boot_id()  # a container may have none
    with suppress(OSError):
        return f"{machine} {os.readlink('/proc/self/ns/pid')}"
    return machine


def _boot_id() -> str:
    """Identifies the boot: changes when the host is restarted. Empty if unknown."""
    return _read_line("/proc/sys/kernel/random/boot_id")


def _read_line(path: str) -> str:
    """Returns a small file's content, empty if it cannot be read."""
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _is_running(pid: int, started_at: str) -> bool:
    """Whether a process is running. One that ``/proc`` hides, such as another user's, counts as the same."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return _process_start_time(pid) in ("", started_at)


def _process_start_time(pid: int) -> str:
    """When a process started, to distinguish it from a later one with the same id. Empty if it cannot be read."""
    stat = _read_line(f"/proc/{pid}/stat")
    state, *fields = stat[stat.rfind(")") + 2 :].split() or [""]
    return "ended" if state in ("Z", "X") else "".join(fields[18:19])
