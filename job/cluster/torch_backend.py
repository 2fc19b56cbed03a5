"""The network between workers: gloo on the interface by which their node joined the cluster.

Left to itself gloo takes the address of the host's own name, which on many machines is loopback:
workers on other hosts cannot reach that, and on one machine it may be the open network.
"""

import fcntl
import os
import socket
import struct
from typing import Any

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from job.cluster import connection

assert connection
_SIOCGIFADDR = 0x8915  # netdevice(7), Linux


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None where none has it or that cannot be asked."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # without an address, or not Linux
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def _set_gloo_interface() -> None:
    """Runs on each worker before it meets the others."""
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _GlooInterfaceBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        try:
            worker_group.execute(_set_gloo_interface)
            super().on_start(worker_group, backend_config)
        except ray.exceptions.RayTaskError as error:
            # One may have died as they met. Ray tries again only where it hears of it by this name, and then
            # leaves the group that never began where it is, in the next one's place.
            worker_group.abort()
            raise WorkerGroupStartupFailedError("the workers did not meet") from (error.cause or error)


class GlooInterfaceTorchConfig(TorchConfig):
    """Ray's own configuration of torch, after each worker has chosen its interface."""

    @property
    def backend_cls(self) -> type[_GlooInterfaceBackend]:
        """What Ray runs at the start of a group of workers."""
        return _GlooInterfaceBackend
