"""Ray nodes on this machine, started with ``ray start`` as an administrator does."""

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
from chaos import MARK, command_line, marked_processes

RAY = Path(sys.executable).parent / "ray"
_MAPPINGS = ("auth", "docker", "file_mounts", "head_node", "worker_nodes")
_LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
_HEAD = "ray.head.default"  # the name of the head in Ray's fake_multinode provider
# All nodes have the same address, so the autoscaler must distinguish them by their names.
_PROVIDER = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RayNodes:
    """A head and the nodes that join it. ``close`` ends all their processes."""

    def __init__(
        self,
        *head: str,
        node_types: dict[str, dict[str, Any]] | None = None,
        namespace: Sequence[str] = (),
        ip: str = "",
    ) -> None:
        """Starts the head.

        Args:
            head: more options of ``ray start --head``
            node_types: what an autoscaler may add; None: no autoscaler
            namespace: a command that starts the head inside a namespace
            ip: the head's address in that namespace
        """
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
        self.mark = uuid.uuid4().hex
        self.port = free_port()
        self.ip = ip or ray.util.get_node_ip_address()
        path = os.pathsep.join([str(RAY.parent), os.environ["PATH"]])
        self.env = {**os.environ, "RAY_AUTH_MODE": "token", "PATH": path, MARK: self.mark}
        if node_types:
            self.env |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
            head = (*head, f"--autoscaling-config={self._write_autoscaling_config(node_types)}")
        ports = (f"--port={self.port}", f"--temp-dir={self.folder}")
        try:
            self.start("--head", *ports, *head, namespace=namespace, ip=self.ip)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return f"{self.ip}:{self.port}"

    def start(self, *options: str, namespace: Sequence[str] = (), ip: str = "") -> None:
        """Runs ``ray start``, in a namespace if one is given."""
        command = [*namespace, str(RAY), "start", *options, "--disable-usage-stats"]
        if ip:
            command.append(f"--node-ip-address={ip}")
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self) -> list[int]:
        """All processes that were started here."""
        return marked_processes(self.mark)

    def num_raylets(self) -> int:
        """The number of running nodes."""
        return sum("/raylet " in command_line(process) for process in self.processes())

    def close(self) -> None:
        deadline = time.monotonic() + 20
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_autoscaling_config(self, node_types: dict[str, dict[str, Any]]) -> Path:
        """Writes the configuration of an autoscaler with Ray's fake provider, which starts nodes on this machine."""
        types = {name: {"node_config": {}, "min_workers": 0, **node_type} for name, node_type in node_types.items()}
        types[_HEAD] = {"node_config": {}, "resources": {"CPU": 1}, "max_workers": 0}
        config = {
            **{name: {} for name in _MAPPINGS},
            **{name: [] for name in _LISTS},
            "cluster_name": "fake",
            "max_workers": 4,
            "upscaling_speed": 20,
            "idle_timeout_minutes": 0.2,
            "file_mounts_sync_continuously": False,
            "provider": {"type": "fake_multinode", "gcs_address": self.address, **dict.fromkeys(_PROVIDER, True)},
            "available_node_types": types,
            "head_node_type": _HEAD,
        }
        path = self.folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        return path
