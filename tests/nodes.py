"""Ray nodes on this machine, started as an administrator starts them, each known by a mark."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.util
from storm import MARK, marked, title

RAY = Path(sys.executable).parent / "ray"
_MAPPINGS = ("auth", "docker", "file_mounts", "head_node", "worker_nodes")
_LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
_HEAD = "ray.head.default"  # as Ray's pretended provider calls the head
# All nodes have one address, so the autoscaler must tell them apart by their names.
_PROVIDER = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """A head and what joins it, ended with all their processes on ``close``."""

    def __init__(
        self,
        *head: str,
        kinds: dict[str, dict[str, Any]] | None = None,
        inside: Sequence[str] = (),
        ip: str = "",
    ) -> None:
        """``kinds`` of nodes may be brought by an autoscaler; the head may be ``inside`` a namespace."""
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
        self.mark = uuid.uuid4().hex
        self.port = free_port()
        self.ip = ip or ray.util.get_node_ip_address()
        path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])
        self.env = {**os.environ, "RAY_AUTH_MODE": "token", "PATH": path, MARK: self.mark}
        if kinds:
            self.env |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
            head = (*head, f"--autoscaling-config={self._autoscaling(kinds)}")
        try:
            self.start("--head", f"--port={self.port}", f"--temp-dir={self.folder}", *head, inside=inside, ip=self.ip)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return f"{self.ip}:{self.port}"

    def start(self, *words: str, inside: Sequence[str] = (), ip: str = "") -> None:
        """``ray start``, perhaps inside a namespace of its own."""
        line = [
            *inside,
            str(RAY),
            "start",
            *words,
            "--disable-usage-stats",
            *([f"--node-ip-address={ip}"] if ip else []),
        ]
        done = subprocess.run(line, env=self.env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self) -> list[int]:
        """All that was started here."""
        return marked(MARK, self.mark)

    def raylets(self) -> int:
        """Nodes that run."""
        return sum("/raylet " in title(process) for process in self.processes())

    def close(self) -> None:
        until = time.monotonic() + 20
        while left := self.processes():
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            assert time.monotonic() < until
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _autoscaling(self, kinds: dict[str, dict[str, Any]]) -> Path:
        """A file for the autoscaler, with Ray's own pretended provider of nodes."""
        types = {name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in kinds.items()}
        types[_HEAD] = {"node_config": {}, "resources": {"CPU": 1}, "max_workers": 0}
        configuration = {
            **{name: {} for name in _MAPPINGS},
            **{name: [] for name in _LISTS},
            "cluster_name": "pretended",
            "max_workers": 4,
            "upscaling_speed": 20,
            "idle_timeout_minutes": 0.2,
            "file_mounts_sync_continuously": False,
            "provider": {"type": "fake_multinode", "gcs_address": self.address, **dict.fromkeys(_PROVIDER, True)},
            "available_node_types": types,
            "head_node_type": _HEAD,
        }
        path = self.folder / "autoscaling.json"
        path.write_text(json.dumps(configuration))
        return path
