"""Workers of a reproducible run compute in the same way, or the run is refused."""

import multiprocessing
import os
import platform
import socket
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from job.distributed.context import World, resolve_precision
from job.errors import UnrecoverableError
from job.training.implementation import (
    Implementation,
    check_devices,
    check_same_implementation,
    describe_missing_kernel,
    gather_implementations,
)

CPU = torch.device("cpu")
WITH = Implementation("node-a", "cpu (x86_64) AVX512", True, "")
WITHOUT = Implementation("node-b", "cpu (x86_64) AVX512", False, "there is no C compiler")


def test_check_same_implementation_of_equal_workers_passes() -> None:
    check_same_implementation([WITH, replace(WITH, node="node-b")])
    check_same_implementation([WITHOUT, replace(WITHOUT, kernel_unavailable="LANES_KERNEL is off")])


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (
            [WITH, WITH, WITHOUT],
            "worker 2 on node-b would compute without the compiled kernel (there is no C compiler)",
        ),
        ([WITHOUT, WITH], "worker 1 on node-a would compute with the compiled kernel on cpu (x86_64) AVX512"),
        (
            [WITH, replace(WITH, processor="cpu (x86_64) AVX2")],
            "worker 1 on node-a would compute with the compiled kernel",
        ),
        (
            [WITH, replace(WITH, processor="NVIDIA H100", uses_kernel=False)],
            "without the compiled kernel on NVIDIA H100",
        ),
    ],
)
def test_check_same_implementation_of_different_workers_names_one(workers: list[Implementation], message: str) -> None:
    with pytest.raises(UnrecoverableError) as raised:
        check_same_implementation(workers)
    assert message in raised.value.problem
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("devices", "requirement", "message"),
    [
        (["cuda", "cpu", "cuda"], "", "worker 1 on node-1 has no GPU that torch can use, but others have one"),
        (["cpu", "cuda"], "scale.accelerator = gpu", "scale.accelerator = gpu: worker 0 on node-0 has no GPU"),
        (["cpu", "cpu"], "scale.accelerator = gpu", "worker 0 on node-0 has no GPU that torch can use"),
        (["cpu", "cpu"], "", ""),
        (["cuda", "cuda"], "scale.accelerator = gpu", ""),
    ],
)
def test_check_devices_refuses_mixed_workers_and_those_without_required_gpu(
    devices: list[str], requirement: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [(f"node-{rank}", device) for rank, device in enumerate(devices)]
    monkeypatch.setattr("job.training.implementation.gather_json", lambda _: workers)
    world = World(0, len(devices), CPU, 1, "a")
    if not message:
        return check_devices(world, requirement)
    with pytest.raises(UnrecoverableError) as raised:
        check_devices(world, requirement)
    assert message in raised.value.problem
    assert "scale.accelerator = cpu" in raised.value.remedy


def test_describe_missing_kernel_names_worker_only_if_others_have_it() -> None:
    assert describe_missing_kernel([WITH, WITH]) == ""
    assert describe_missing_kernel([WITHOUT, WITHOUT]) == "there is no C compiler"
    assert describe_missing_kernel([WITH, WITHOUT]) == "worker 1 on node-b: there is no C compiler"


def compare_on_worker(rank: int, port: int, results: SimpleQueue[Any]) -> None:
    """Worker 1 is on a node without the kernel."""
    os.environ["LANES_KERNEL"] = "off" if rank else ""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = World(rank, 2, CPU, 1, "a")
    for name in ("fp32", "fp64"):  # without a kernel for fp64, all workers compute in the same way
        try:
            check_same_implementation(gather_implementations(world, resolve_precision(name, CPU)))
            results.put((rank, name, "equal"))
        except UnrecoverableError as error:
            results.put((rank, name, error.problem))
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_workers_raise_the_same_error_without_the_kernel_on_one() -> None:
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn(compare_on_worker, (port, results), nprocs=2)
    messages = {(rank, name): message for rank, name, message in (results.get() for _ in range(4))}
    assert messages[0, "fp64"] == messages[1, "fp64"] == "equal"
    assert messages[0, "fp32"] == messages[1, "fp32"]
    if "there is no C compiler" not in messages[0, "fp32"]:
        where = f"worker 1 on {platform.node()}"
        expected = f"{where} would compute without the compiled kernel (LANES_KERNEL is off)"
        assert messages[0, "fp32"].startswith(f"train.reproducible: {expected}")
