"""Runs the tasks of a preparation on a cluster, by Ray Data."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import ray.data

from job.cluster import set_environment_defaults
from job.cluster.connection import connect
from job.cluster.launcher import check_placement
from job.cluster.local_cluster import disconnect
from job.cluster.train_worker import one_line
from job.config.run import ScaleConfig
from job.console import Console
from job.errors import RunFailed, UserError
from job.run.prepare import Result, Task

# Ray Data starts the next task up to 0.1 s after the end of one, which is long for pieces of characters or bytes.
_PIECES_PER_TASK, _MIN_TASKS_PER_CPU = 8, 4
_TASK = ScaleConfig(workers=1, accelerator="cpu", cpus_per_worker=1)  # as many tasks run at a time as there are CPUs


@contextlib.contextmanager
def cluster_tasks(store: str, console: Console) -> Iterator[Any]:
    """Connects to the cluster at ``RAY_ADDRESS``, or starts one on this machine, and yields its ``RunTasks``.

    Args:
        store: ``corpus.store``, which the nodes must be able to write
        console: shows a notice of the cluster

    Raises:
        UserError: the cluster cannot be used
        RunFailed: Ray failed
    """
    set_environment_defaults()
    is_connected = ray.is_initialized()
    with contextlib.ExitStack() as stack:
        placement, _ = connect(_TASK, stack)
        if not is_connected:
            stack.callback(disconnect)
        check_placement(placement, console, store, is_connected=is_connected, field="corpus.store")
        devnull = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(devnull))  # Ray Data prints its plan
        try:
            yield _run_tasks
        except ray.exceptions.RayError as error:
            raise RunFailed(f"Ray ended: {one_line(error)}", "the same command continues") from None


def _run_tasks(function: Callable[[int, int | None], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """See ``RunTasks``."""
    if not tasks:
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    rows = [{"piece": piece, "num_tokens": num_tokens} for piece, num_tokens in tasks]
    dataset = ray.data.from_items(
        rows, override_num_blocks=_num_blocks(len(rows), int(ray.cluster_resources().get("CPU", 1)))
    )
    for row in dataset.map(partial(_run_task, function), num_cpus=1).iter_rows():
        value = ray.cloudpickle.loads(row["value"])  # of a task of this cluster, never of a file
        if isinstance(value, UserError):
            raise value
        yield value


def _num_blocks(pieces: int, cpus: int) -> int:
    """The number of tasks of Ray Data: one for each piece, or for several where that leaves each CPU many tasks."""
    return min(pieces, max(_MIN_TASKS_PER_CPU * cpus, math.ceil(pieces / _PIECES_PER_TASK)))


def _run_task(function: Callable[[int, int | None], Any], row: dict[str, Any]) -> dict[str, bytes]:
    """Returns what the function returns, or the UserError that it raises."""
    try:
        value = function(row["piece"], row["num_tokens"])
    except UserError as error:
        value = error
    return {"value": ray.cloudpickle.dumps(value)}
