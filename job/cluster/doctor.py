"""The ``doctor`` verb: checks configuration, search, storage and cluster; prints the remedy of each problem."""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ray
import torch

from job.cluster.connection import is_local, join_cluster, node_resources, query_autoscaler, ray_address
from job.cluster.local_cluster import check_machine, create_ray_folder
from job.cluster.node_probe import VERSIONS, NodeReport, probe, probe_nodes, storage_problem, version_problem
from job.cluster.ray_extensions import free_resources
from job.cluster.resources import cluster_placement, local_placement
from job.config.run import ScaleConfig
from job.config.schema import Config
from job.config.search_space import SearchConfig
from job.console import Console, format_bytes
from job.data.token_store import verify_store
from job.data.vocabulary import format_unknown_share
from job.distributed.context import available_cpus
from job.errors import UserError
from job.run.estimate import checkpoint_bytes, describe_needs
from job.run.resume_from import open_source_checkpoint
from job.run.run_dir import check_same_text, resolve_run, resolve_storage
from job.run.setup import build_run_spec, format_dropped_share, run_warnings
from job.run.text_cache import TextCache
from job.storage import Folder
from job.training.checkpoint import list_checkpoints
from job.training.run_spec import RunSpec
from job.tuning.setup import check_search, resolve_search

MAX_GPU_USE = 0.1  # share of a GPU's memory that other processes may use


@dataclass(frozen=True)
class Check:
    """What a check found; a problem has a remedy if one is known."""

    subject: str
    is_ok: bool
    text: str
    remedy: str


class _Checks(list[Check]):
    """The checks that have run; each is passed to ``report`` when it has."""

    def __init__(self, report: Callable[[Check], None]) -> None:
        super().__init__()
        self.report = report

    def check(self, subject: str, function: Callable[..., str], *arguments: Any) -> bool:
        """Calls a function that returns what it found, or raises UserError. Returns whether there is no problem."""
        try:
            check = Check(subject, True, function(*arguments), "")
        except UserError as error:
            check = Check(subject, False, error.problem, error.remedy)
        self.append(check)
        self.report(check)
        return check.is_ok


def print_check(console: Console, check: Check) -> None:
    """Prints a check as a row of a table, and its remedy below it."""
    console.print(f"{'ok' if check.is_ok else 'FAIL':<6}{check.subject:<20}{check.text}")
    if check.remedy:
        console.print(f"{'':<26}→ {check.remedy}")


def run_checks(
    config: Config, search: SearchConfig, default_name: str, console: Console, report: Callable[[Check], None]
) -> list[Check]:
    """Returns what all checks found.

    Args:
        config: as the user gave it
        search: of the same file; it is checked if its space is not empty
        default_name: the name, without its number, of a run or search whose ``run.name`` is empty
        console: shows warnings and progress
        report: called with each check as it completes
    """
    table, storage = _Checks(report), resolve_storage(config.run.storage)
    text_cache = TextCache(console, is_local(config.scale))
    table.check("versions", _describe_versions)
    resolve = cache(lambda: _resolve(config, search, default_name))
    build_spec = cache(lambda: build_run_spec(resolve()[1], resolve()[0], cache=text_cache))
    if table.check("name", lambda: str(resolve()[0])) and table.check(
        "text", lambda: _describe_text(build_spec(), resolve()[0])
    ):
        table.check("storage", lambda: _check_disk_space(storage, build_spec()))
        table.check("estimate", lambda: describe_needs(build_spec(), bool(ray_address())))
        if search.space.domains:
            table.check("search", lambda: _check_search(*resolve(), search, console, text_cache))
        else:
            for warning in run_warnings(build_spec()):
                console.warn(warning)
    if ray_address():
        _check_cluster(table, config, storage)
    else:
        _check_this_machine(table, config.scale)
    return table


def _describe_versions() -> str:
    local = probe(".")
    return ", ".join(f"{name} {local[name]}" for name in ("python", *VERSIONS))


def _resolve(config: Config, search: SearchConfig, default_name: str) -> tuple[Folder, Config]:
    """Returns the folder of the run, or of the search if there is one, and the configuration as it would be used."""
    if search.space.domains:
        return resolve_search(config, search, default_name)
    folder, config, _ = resolve_run(config, default_name)
    return folder, config


def _describe_text(spec: RunSpec, folder: Folder) -> str:
    check_same_text(list_checkpoints(folder / "checkpoints")[0], spec.dataset)
    open_source_checkpoint(spec.config, spec.dataset, folder)
    verify_store(spec.config.corpus.source)
    if spec.config.corpus.validation_source:
        verify_store(spec.config.corpus.validation_source, "corpus.validation_source")
    source, tokens = spec.dataset.metadata["source"], spec.dataset.metadata["tokens"]
    shares = format_dropped_share(spec) + format_unknown_share(spec.dataset.unknown_shares["training"])
    return f"{source}: {tokens:,} tokens, vocabulary of {len(spec.dataset.vocabulary):,}{shares}"


def _check_search(folder: Folder, config: Config, search: SearchConfig, console: Console, text_cache: TextCache) -> str:
    check_search(config, search, folder, console, text_cache)
    return f"{search.num_trials:,} trials can start"


def _check_disk_space(folder: Folder, spec: RunSpec) -> str:
    """Whether the checkpoints that exist at the same time fit."""
    folder.check_writable()
    needed = checkpoint_bytes(spec) * (spec.config.train.keep_checkpoints + 2)
    if folder.local_path is None:
        return f"{folder} is writable; checkpoints need {format_bytes(needed)}"
    existing = next(path for path in (folder.local_path, *folder.local_path.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{folder} is writable; {format_bytes(free)} free, checkpoints need {format_bytes(needed)}"
    if free <= needed:
        raise UserError(text, "free disk space, or choose another run.storage")
    return text


# --- this machine ---


def _check_this_machine(table: _Checks, scale: ScaleConfig) -> None:
    gpus = torch.cuda.device_count()
    table.check("cluster", _check_local_cluster, scale, gpus)
    if scale.max_workers or scale.gpu_requirement or scale.cpus_per_worker:
        table.check("workers", _check_local_placement, scale, gpus)
    if gpus:
        table.check("GPUs", _check_gpus, [NodeReport("this machine", {}, probe(".", gpus=True))])


def _check_local_cluster(scale: ScaleConfig, gpus: int) -> str:
    if scale.max_workers:
        check_machine()
        shutil.rmtree(create_ray_folder())
    return f"starts one on this machine: {available_cpus()} cores, {gpus} GPUs"


def _check_local_placement(scale: ScaleConfig, gpus: int) -> str:
    # Without workers this process trains, like a single worker.
    placement = local_placement(scale if scale.max_workers else replace(scale, workers=1), available_cpus(), gpus)
    return f"{placement.max_workers} of {placement.describe()}{'; ' * bool(placement.notice)}{placement.notice}"


# --- a cluster ---


def _check_cluster(table: _Checks, config: Config, folder: Folder) -> None:
    table.check("token", _check_auth_token)
    if not table.check("cluster", _join):
        return
    try:
        with ExitStack() as stack:
            marker = ""
            with suppress(UserError):  # the storage check has reported it
                marker = stack.enter_context(folder.probe_file())
            nodes = probe_nodes(folder.address, marker, (config.model.cell,), True)
        reachable = [node for node in nodes if not node.error]
        table.check("nodes", _check_all_versions, nodes, probe("."))
        table.check("storage of nodes", _check_all_storage, reachable, folder)
        table.check("GPUs", _check_gpus, reachable)
        if config.scale.max_workers:
            table.check("workers", _check_cluster_placement, config.scale)
    finally:
        ray.shutdown()


def _check_auth_token() -> str:
    """Whether this machine has a token for the cluster that other users of the machine cannot read."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise UserError(
            "RAY_AUTH_MODE is not token: anyone who can connect to the cluster may use it",
            "export RAY_AUTH_MODE=token",
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "from RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        raise UserError(f"{path} does not exist", "copy the cluster's (ray get-auth-token on its head prints it)")
    if path.stat().st_mode & 0o044 and all(parent.stat().st_mode & 0o011 for parent in path.parents):
        raise UserError(f"{path} can be read by other users", f"chmod 600 {path}")
    return str(path)


def _join() -> str:
    join_cluster(ray_address())
    autoscaler = "an autoscaler adds more" if query_autoscaler() != [] else "no autoscaler"
    return f"{ray_address()}: {len(node_resources())} nodes, {autoscaler}"


def _raise_first(errors: Iterable[UserError | None]) -> None:
    """Raises the first error, with the number of the others."""
    raised = [error for error in errors if error]
    if raised:
        others = f" (and {len(raised) - 1} more)" if len(raised) > 1 else ""
        raise UserError(raised[0].problem + others, raised[0].remedy)


def _check_all_versions(nodes: list[NodeReport], local: dict[str, object]) -> str:
    _raise_first(version_problem(node, local) for node in nodes)
    return f"all {len(nodes)} have the versions of this machine"


def _check_all_storage(nodes: list[NodeReport], folder: Folder) -> str:
    nodes = [node for node in nodes if node.metadata["package"]]
    _raise_first(storage_problem(node, str(folder)) for node in nodes)
    free = [node.metadata["free"] for node in nodes if node.metadata["free"] is not None]
    return f"writable on all {len(nodes)}{f', at least {format_bytes(min(free))} free' if free else ''}"


def _check_gpus(nodes: list[NodeReport]) -> str:
    gpus = [(node, *gpu) for node in nodes for gpu in node.metadata["gpus"]]
    if not gpus:
        return "none: workers use CPUs"
    metadata = gpus[0][0].metadata
    text = f"{len(gpus)} × {gpus[0][1]}, driver {metadata['driver']}, NCCL {metadata['nccl']}"
    in_use = [node for node, _, free, total in gpus if free < (1 - MAX_GPU_USE) * total]
    if in_use:
        raise UserError(f"{text}, {len(in_use)} in use by other processes", f"see nvidia-smi on {in_use[0].name}")
    return f"{text}, free"


def _check_cluster_placement(scale: ScaleConfig) -> str:
    placement = cluster_placement(scale, node_resources(), query_autoscaler())
    if placement.capacity(free_resources()) >= placement.min_workers:
        when = "can be placed now"
    elif placement.capacity(node_resources()) >= placement.min_workers:
        when = "can be placed once other jobs have ended"
    else:
        when = "can be placed once the autoscaler has added nodes"
    return f"{scale.workers} of {placement.describe()} {when}"
