"""What would go wrong with a run, found out before it: a table with a remedy for each failed row."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch

from job.cluster.autoscaler import query_autoscaler
from job.cluster.connection import join_cluster, living_nodes, ray_address
from job.cluster.node_probe import (
    VERSIONS,
    NodeReport,
    ProbeRequest,
    Problem,
    probe_local,
    probe_nodes,
    storage_problem,
    version_problem,
)
from job.cluster.ray_extensions import free_resources
from job.cluster.resources import Placement, cluster_placement, local_placement
from job.config.schema import Config
from job.console import Console
from job.distributed.context import available_cpus
from job.errors import UserError
from job.nn.language_model import build_model
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.run_spec import RunSpec

IN_USE = 0.1  # share of a GPU's memory that others may use


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at."""

    subject: str
    found: str
    remedy: str = ""  # where it failed


def run_doctor(config: Config, console: Console) -> int:
    """Prints a row for each thing as it is looked at; 1 where one failed."""
    failed = 0
    for row in _rows(config):
        console.print(f"{'FAIL' if row.remedy else 'ok':<6}{row.subject:<20}{row.found}")
        if row.remedy:
            failed += 1
            console.print(f"{'':<26}→ {row.remedy}")
    console.print()
    console.print("nothing stands in the way" if not failed else f"{failed} to mend before a run")
    return int(failed > 0)


def _rows(config: Config) -> Iterator[CheckResult]:
    folder = Folder.resolve(config.run.storage)
    yield _versions(folder)
    spec: list[RunSpec] = []
    yield _run_check("text", lambda: _text(config, folder, spec))
    if spec:
        yield _run_check("storage", lambda: _disk_space(config, folder, spec[0]))
    yield from _cluster_rows(config, folder) if ray_address() else _own_rows(config)


def _run_check(subject: str, look: Callable[[], CheckResult]) -> CheckResult:
    """The row, or what the user can mend as a failed one."""
    try:
        return look()
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        return CheckResult(subject, found, remedy or "mend what it names")


def _versions(folder: Folder) -> CheckResult:
    mine = probe_local(ProbeRequest(folder.address, "", ()))
    return CheckResult("versions", ", ".join(f"{name} {mine[name]}" for name in ("python", *VERSIONS)))


def _text(config: Config, folder: Folder, spec: list[RunSpec]) -> CheckResult:
    spec.append(build_run_spec(config, folder))
    metadata = spec[0].dataset.metadata
    return CheckResult(
        "text", f"{metadata['source']}: {metadata['tokens']:,} tokens of {len(spec[0].dataset.vocabulary):,} kinds"
    )


def _disk_space(config: Config, folder: Folder, spec: RunSpec) -> CheckResult:
    """Whether the checkpoints that are kept at one time find room."""
    with folder.probe_file():
        pass
    model = build_model(config.model, len(spec.dataset.vocabulary), config.run.seed)
    copies = 3 if config.optimizer.name == "adamw" else 1
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    need = weights * copies * (config.train.keep_checkpoints + 2)
    if folder.local_path is None:
        return CheckResult("storage", f"{folder} can be written to; a run's checkpoints need {_bytes(need)}")
    standing = next(place for place in (folder.local_path, *folder.local_path.parents) if place.exists())
    free = shutil.disk_usage(standing).free
    found = f"{folder} can be written to; {_bytes(free)} free, a run's checkpoints need {_bytes(need)}"
    return CheckResult("storage", found, "" if free > need else "make room, or choose another run.storage")


# --- this machine alone ---


def _own_rows(config: Config) -> Iterator[CheckResult]:
    gpus = torch.cuda.device_count()
    yield CheckResult("cluster", f"one of this job's own: {available_cpus()} cores, {gpus} GPUs")
    if config.scale.max_workers or config.scale.gpu_requirement:
        yield _run_check("workers", lambda: _on_this_machine(config, gpus))
    if gpus:
        yield _gpu_row([NodeReport("this machine", {}, probe_local(ProbeRequest(".", "", (), gpus=True)))])


def _on_this_machine(config: Config, gpus: int) -> CheckResult:
    scale = config.scale if config.scale.max_workers else replace(config.scale, workers=1)  # this process is one
    found = local_placement(scale, available_cpus(), gpus)
    return CheckResult(
        "workers", f"{found.max_workers} of {found.describe()}{f'; {found.notice}' if found.notice else ''}"
    )


# --- a cluster ---


def _cluster_rows(config: Config, folder: Folder) -> Iterator[CheckResult]:
    yield _check_auth_token()
    joined = _run_check("cluster", _join)
    yield joined
    if joined.remedy:
        return
    try:
        with _marked(folder) as marker:
            question = ProbeRequest(folder.address, marker, (config.model.cell,), gpus=True)
            answers = probe_nodes(question)
        speaking = [node for node in answers if not node.silent]
        with_package = [node for node in speaking if node.metadata["package"]]
        mine = probe_local(question)
        yield _check_all_nodes("nodes", answers, lambda node: _silence(node) or version_problem(node, mine))
        yield _check_all_nodes(
            "storage of nodes", with_package, lambda node: storage_problem(node, str(folder)), _free(with_package)
        )
        yield _gpu_row(speaking)
        if config.scale.max_workers:
            yield _run_check("workers", lambda: _on_cluster(config))
    finally:
        ray.shutdown()


def _check_auth_token() -> CheckResult:
    """The word without which a cluster lets nobody in."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return CheckResult(
            "token",
            "RAY_AUTH_MODE is not token: anyone who reaches the cluster may use it",
            "export RAY_AUTH_MODE=token",
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return CheckResult("token", "from RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        return CheckResult("token", f"no {path}", "copy the cluster's there (ray get-auth-token on its head shows it)")
    if path.stat().st_mode & 0o044 and all(folder.stat().st_mode & 0o011 for folder in path.parents):
        return CheckResult("token", f"{path} can be read by others", f"chmod 600 {path}")
    return CheckResult("token", str(path))


def _join() -> CheckResult:
    join_cluster(ray_address())
    grows = "an autoscaler adds more" if query_autoscaler().can_add_nodes else "no autoscaler"
    return CheckResult("cluster", f"{ray_address()}: {len(living_nodes())} nodes, {grows}")


@contextmanager
def _marked(folder: Folder) -> Iterator[str]:
    """A file for the nodes to look for; none where the storage cannot be written, which its own row tells."""
    try:
        with folder.probe_file() as marker:
            yield marker
    except UserError:
        yield ""


def _silence(node: NodeReport) -> Problem:
    return (f"{node.name} {node.silent}", "see ray status, or remove the node") if node.silent else None


def _check_all_nodes(
    subject: str, nodes: list[NodeReport], look: Callable[[NodeReport], Problem], more: str = ""
) -> CheckResult:
    troubles = [trouble for trouble in map(look, nodes) if trouble]
    if troubles:
        others = f" (and {len(troubles) - 1} more)" if len(troubles) > 1 else ""
        return CheckResult(subject, troubles[0][0] + others, troubles[0][1])
    return CheckResult(subject, f"all {len(nodes)} alike{more}")


def _free(nodes: list[NodeReport]) -> str:
    least = min((node.metadata["free"] for node in nodes if node.metadata.get("free") is not None), default=None)
    return "" if least is None else f", at least {_bytes(least)} free"


def _gpu_row(nodes: list[NodeReport]) -> CheckResult:
    gpus = [(node, *gpu) for node in nodes for gpu in node.metadata["gpus"]]
    if not gpus:
        return CheckResult("GPUs", "none: workers use processors")
    metadata = gpus[0][0].metadata
    found = f"{len(gpus)} × {gpus[0][1]}, driver {metadata['driver']}, NCCL {metadata['nccl']}"
    busy = [(node, name) for node, name, free, total in gpus if free < (1 - IN_USE) * total]
    if busy:
        return CheckResult(
            "GPUs", f"{found}; {len(busy)} in use", f"see nvidia-smi on {busy[0][0].name}: another process holds memory"
        )
    return CheckResult("GPUs", f"{found}, free")


def _on_cluster(config: Config) -> CheckResult:
    wanted: Placement = cluster_placement(config.scale, living_nodes(), query_autoscaler())
    need = wanted.min_workers
    if wanted.capacity(free_resources()) >= need:
        when = "can be placed now"
    elif wanted.capacity(living_nodes()) >= need:
        when = "can be placed once others have ended"
    else:
        when = "can be placed once the autoscaler has brought nodes"
    return CheckResult("workers", f"{config.scale.workers} of {wanted.describe()} {when}")


def _bytes(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
