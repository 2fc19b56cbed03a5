"""What would go wrong with a run, found out before it: a table with a remedy for each failed row."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from job import cluster  # isort: skip  first: it sets what Ray reads when it is imported
import ray
import torch
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel

from job import autoscaler, model, placement, probe
from job.config import Config
from job.errors import UserError
from job.placement import Placement
from job.prepare import prepare
from job.probe import Node, Question, Trouble
from job.screen import Screen
from job.storage import Folder
from job.trainer import Plan
from job.world import cores

SMALL = 256 << 20  # bytes of a working directory that Ray warns of
IN_USE = 0.1  # share of a GPU's memory that others may use


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    subject: str
    found: str
    remedy: str = ""  # where it failed


def examine(options: Config, screen: Screen) -> int:
    """Prints a row for each thing as it is looked at; 1 where one failed."""
    failed = 0
    for row in _rows(options):
        screen.line(f"{'FAIL' if row.remedy else 'ok':<6}{row.subject:<20}{row.found}")
        if row.remedy:
            failed += 1
            screen.line(f"{'':<26}→ {row.remedy}")
    screen.line()
    screen.line("nothing stands in the way" if not failed else f"{failed} to mend before a run")
    return int(failed > 0)


def _rows(options: Config) -> Iterator[Row]:
    folder = Folder.at(options.run.storage)
    yield _versions(folder)
    plan: list[Plan] = []
    yield _tried("text", lambda: _text(options, folder, plan))
    if plan:
        yield _tried("storage", lambda: _room(options, folder, plan[0]))
    yield _working_directory(Path.cwd())
    yield from _cluster_rows(options, folder) if cluster.address() else _own_rows(options)


def _tried(subject: str, look: Callable[[], Row]) -> Row:
    """The row, or what the user can mend as a failed one."""
    try:
        return look()
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        return Row(subject, found, remedy or "mend what it names")


def _versions(folder: Folder) -> Row:
    mine = probe.here(Question(folder.address, "", ()))
    return Row("versions", ", ".join(f"{name} {mine[name]}" for name in ("python", *probe.VERSIONS)))


def _text(options: Config, folder: Folder, plan: list[Plan]) -> Row:
    plan.append(prepare(options, folder)[0])
    facts = plan[0].corpus
    return Row("text", f"{facts['source']}: {facts['tokens']:,} tokens of {len(plan[0].vocabulary):,} kinds")


def _room(options: Config, folder: Folder, plan: Plan) -> Row:
    """Whether the checkpoints that are kept at one time find room."""
    with folder.marked():
        pass
    net = model.build(options.model, len(plan.vocabulary), options.run.seed)
    copies = 3 if options.optimizer.name == "adamw" else 1
    weights = sum(weight.numel() * weight.element_size() for weight in net.parameters())
    need = weights * copies * (options.train.keep_checkpoints + 2)
    if folder.local is None:
        return Row("storage", f"{folder} can be written to; a run's checkpoints need {_bytes(need)}")
    standing = next(place for place in (folder.local, *folder.local.parents) if place.exists())
    free = shutil.disk_usage(standing).free
    found = f"{folder} can be written to; {_bytes(free)} free, a run's checkpoints need {_bytes(need)}"
    return Row("storage", found, "" if free > need else "make room, or choose another run.storage")


def _working_directory(folder: Path) -> Row:
    """What ``ray job submit --working-dir .`` would send."""
    sizes: list[int] = []

    def weigh(path: Path) -> None:
        if path.is_file():
            sizes.append(path.stat().st_size)

    _dir_travel(folder, [], weigh, include_gitignore=True, logger=logging.getLogger(__name__))
    found = f"{_bytes(sum(sizes))} in {len(sizes):,} files would go with ray job submit --working-dir ."
    if sum(sizes) > GCS_STORAGE_MAX_SIZE:
        return Row("working directory", found, f"Ray takes {_bytes(GCS_STORAGE_MAX_SIZE)}: name the rest in .rayignore")
    return Row("working directory", found + ("; name what is not needed in .rayignore" * (sum(sizes) > SMALL)))


# --- this machine alone ---


def _own_rows(options: Config) -> Iterator[Row]:
    gpus = torch.cuda.device_count()
    yield Row("cluster", f"one of this job's own: {cores()} cores, {gpus} GPUs")
    if options.scale.max_workers or options.scale.gpu_wish:
        yield _tried("workers", lambda: _on_this_machine(options, gpus))
    if gpus:
        yield _gpu_row([Node("this machine", {}, probe.here(Question(".", "", (), gpus=True)))])


def _on_this_machine(options: Config, gpus: int) -> Row:
    scale = options.scale if options.scale.max_workers else replace(options.scale, workers=1)  # this process is one
    found = placement.on_this_machine(scale, cores(), gpus)
    return Row("workers", f"{found.max_workers} of {found.each}{f'; {found.notice}' if found.notice else ''}")


# --- a cluster ---


def _cluster_rows(options: Config, folder: Folder) -> Iterator[Row]:
    yield _token()
    joined = _tried("cluster", _join)
    yield joined
    if joined.remedy:
        return
    try:
        with _marked(folder) as marker:
            question = Question(folder.address, marker, (options.model.cell,), gpus=True)
            answers = probe.ask(question)
        speaking = [node for node in answers if not node.silent]
        with_package = [node for node in speaking if node.facts["package"]]
        mine = probe.here(question)
        yield _of_all("nodes", answers, lambda node: _silence(node) or probe.versions_trouble(node, mine))
        yield _of_all(
            "storage of nodes", with_package, lambda node: probe.storage_trouble(node, str(folder)), _free(with_package)
        )
        yield _gpu_row(speaking)
        if options.scale.max_workers:
            yield _tried("workers", lambda: _on_cluster(options))
    finally:
        ray.shutdown()


def _token() -> Row:
    """The word without which a cluster lets nobody in."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return Row(
            "token",
            "RAY_AUTH_MODE is not token: anyone who reaches the cluster may use it",
            "export RAY_AUTH_MODE=token",
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Row("token", "from RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        return Row("token", f"no {path}", "copy the cluster's there (ray get-auth-token on its head shows it)")
    if path.stat().st_mode & 0o044 and all(folder.stat().st_mode & 0o011 for folder in path.parents):
        return Row("token", f"{path} can be read by others", f"chmod 600 {path}")
    return Row("token", str(path))


def _join() -> Row:
    cluster.join(cluster.address())
    grows = "no autoscaler" if autoscaler.growth() == [] else "an autoscaler brings more"
    return Row("cluster", f"{cluster.address()}: {len(cluster.nodes())} nodes, {grows}")


@contextmanager
def _marked(folder: Folder) -> Iterator[str]:
    """A file for the nodes to look for; none where the storage cannot be written, which its own row tells."""
    try:
        with folder.marked() as marker:
            yield marker
    except UserError:
        yield ""


def _silence(node: Node) -> Trouble:
    return (f"{node.name} {node.silent}", "see ray status, or remove the node") if node.silent else None


def _of_all(subject: str, nodes: list[Node], look: Callable[[Node], Trouble], more: str = "") -> Row:
    troubles = [trouble for trouble in map(look, nodes) if trouble]
    if troubles:
        others = f" (and {len(troubles) - 1} more)" if len(troubles) > 1 else ""
        return Row(subject, troubles[0][0] + others, troubles[0][1])
    return Row(subject, f"all {len(nodes)} alike{more}")


def _free(nodes: list[Node]) -> str:
    least = min((node.facts["free"] for node in nodes if node.facts.get("free") is not None), default=None)
    return "" if least is None else f", at least {_bytes(least)} free"


def _gpu_row(nodes: list[Node]) -> Row:
    gpus = [(node, *gpu) for node in nodes for gpu in node.facts["gpus"]]
    if not gpus:
        return Row("GPUs", "none: workers use processors")
    facts = gpus[0][0].facts
    found = f"{len(gpus)} × {gpus[0][1]}, driver {facts['driver']}, NCCL {facts['nccl']}"
    busy = [(node, name) for node, name, free, total in gpus if free < (1 - IN_USE) * total]
    if busy:
        return Row(
            "GPUs", f"{found}; {len(busy)} in use", f"see nvidia-smi on {busy[0][0].name}: another process holds memory"
        )
    return Row("GPUs", f"{found}, free")


def _on_cluster(options: Config) -> Row:
    wanted: Placement = placement.on_cluster(options.scale, cluster.nodes(), autoscaler.growth())
    need = wanted.min_workers
    if wanted.room(cluster.free()) >= need:
        when = "can be placed now"
    elif wanted.room(cluster.nodes()) >= need:
        when = "can be placed once others have ended"
    else:
        when = "can be placed once the autoscaler has brought nodes"
    return Row("workers", f"{options.scale.workers} of {wanted.each} {when}")


def _bytes(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
