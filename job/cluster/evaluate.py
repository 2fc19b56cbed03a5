"""Evaluation on the workers of a Ray cluster, each of which evaluates some groups of lanes."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import ray

from job.cluster.connection import connect, ray_address
from job.cluster.local_cluster import disconnect
from job.cluster.ray_extensions import free_resources
from job.config.run import ScaleConfig
from job.config.schema import Config
from job.console import Console
from job.data.lanes import split_evenly
from job.data.tokens import Tokens
from job.distributed.context import local_device
from job.distributed.tree_reduce import tree_sum
from job.errors import RunFailed, UserError
from job.inference.evaluate import GROUP_LANES, count_groups, evaluate_groups, load_models
from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.training.checkpoint import LoadedCheckpoint


def evaluate_on_cluster(
    scale: ScaleConfig, checkpoints: Sequence[LoadedCheckpoint], config: Config, tokens: Tokens
) -> float:
    """Returns the loss of all tokens but the first in nats, summed: on CPUs the same bits as in one process.

    Args:
        scale: the workers
        checkpoints: of the models; their folders must be on storage that all nodes can read
        config: its section ``evaluate``, and the cell of ``model`` as the user gave it
        tokens: token ids (N,); those of a store are read by the workers

    Raises:
        UserError: there are fewer groups of lanes than workers, or a worker cannot read a checkpoint
        RunFailed: a worker failed
    """
    num_groups = count_groups(len(tokens) - 1, config.evaluate)
    if scale.max_workers > num_groups:
        problem = f"scale.workers = {scale.workers}: each worker needs {GROUP_LANES} lanes, and there are fewer"
        raise UserError(problem, f"set evaluate.lanes = {scale.max_workers * GROUP_LANES}, or evaluate.context")
    folders = [loaded.checkpoint.path for loaded in checkpoints]
    with ExitStack() as stack:
        placement, _ = connect(scale, stack)
        stack.callback(disconnect)
        console, workers = Console(sys.stderr), placement.max_workers
        if placement.notice:
            console.print(placement.notice)
        if ray_address() and (missing := workers - placement.capacity(free_resources())) > 0:
            waiting = f"waiting for {missing} of {workers} workers ({placement.describe()})"
            console.print(f"{waiting}: not enough resources are free")
        resources = {"num_cpus": placement.cpus_per_worker, "num_gpus": placement.resources.get("GPU", 0)}
        task, inputs = ray.remote(_evaluate_groups).options(**resources), ray.put(tokens)
        task_scale = replace(scale, accelerator="auto" if placement.use_gpu else "cpu")
        parts = split_evenly(num_groups, workers)
        calls = [task.remote(task_scale, folders, config, inputs, numbers) for numbers in parts]
        try:
            sums: list[list[float]] = ray.get(calls)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise RunFailed(f"a worker failed: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise RunFailed(f"a worker failed: {error}") from error
    return tree_sum([nats for part in sums for nats in part])


def _evaluate_groups(
    scale: ScaleConfig, folders: list[Folder], config: Config, tokens: Tokens, numbers: range
) -> list[float]:
    # Ray lets the process see only the GPU that it has assigned to it.
    models = load_models([open_checkpoint(folder) for folder in folders], config, local_device(scale))
    return evaluate_groups(models, tokens, config.evaluate, numbers)
