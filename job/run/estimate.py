"""Estimates what a run needs, and refuses what this machine cannot have."""

import time
from dataclasses import replace
from itertools import islice

import torch

from job.config.model import ModelConfig
from job.config.schema import Config
from job.config.training import OptimizerConfig
from job.console import format_bytes, format_count, format_duration
from job.data.stream import Stream
from job.distributed.context import World, available_cpus, device_name, machine_memory, resolve_precision
from job.distributed.gradient_sync import ControlFlags
from job.errors import UserError
from job.nn.adaptive_softmax import head_size, resolve_cutoffs, tail_sizes
from job.nn.language_model import reference_state_dict
from job.training.loop import train_steps
from job.training.run_spec import RunSpec
from job.training.train_state import build_train_state
from job.training.trainer import configure_process

# Weights of a layer in units of inputs times hidden units, their square, and hidden units.
_LAYER_WEIGHTS = {
    "rnn": (1, 1, 2), "gru": (3, 3, 6), "lstm": (4, 4, 8),
    "mingru": (2, 0, 2), "minlstm": (3, 0, 3), "mlstm": (5, 5, 4), "mogrifier": (9, 4, 4),
}  # fmt: skip
_PROCESS_BYTES = 200 << 20  # of a worker without its model: Python, torch and Ray
_NUM_MEASURED_STEPS = 3


def count_weights(model_config: ModelConfig, vocabulary_size: int) -> int:
    """Returns the number of weights without building the model; of a custom cell's, only those outside the cell."""
    sizes, embedding = model_config.layer_sizes, model_config.embedding_size
    input_sizes = (embedding or vocabulary_size, *sizes[:-1])
    a, b, c = _LAYER_WEIGHTS.get(model_config.cell, (0, 0, 0))
    recurrent = sum(hidden * (a * inputs + b * hidden + c) for inputs, hidden in zip(input_sizes, sizes, strict=True))
    cutoffs = resolve_cutoffs(model_config, vocabulary_size)
    output = head_size(cutoffs, vocabulary_size) * (sizes[-1] + 1) + sum(
        num_features * (sizes[-1] + len(cluster)) + len(cluster)
        for cluster, num_features in tail_sizes(cutoffs, vocabulary_size, sizes[-1])
    )
    return recurrent + output + (0 if model_config.tied else vocabulary_size * embedding)


def worker_bytes(config: Config, num_weights: int) -> int:
    """Returns the memory that one worker needs at least: its process, weights, gradients, moments, hidden states."""
    num_lanes, is_double = config.stream.batch_size, config.train.precision == "fp64"
    num_parts = max(1, config.scale.max_workers) * config.train.accumulate
    num_parts = config.train.lane_groups if config.train.reproducible else num_parts
    num_hidden = config.stream.num_steps * -(-num_lanes // num_parts) * sum(config.model.layer_sizes)
    copies = 2 + _num_moments(config.optimizer)
    return _PROCESS_BYTES + num_weights * copies * (8 if is_double else 4) + num_hidden * (8 if is_double else 2)


def checkpoint_bytes(spec: RunSpec) -> int:
    """Returns the size of a checkpoint, without the lanes' state: weights, their average and moments."""
    shapes = reference_state_dict(spec.config.model, len(spec.dataset.vocabulary))
    optimizer_config = spec.config.optimizer
    num_moments, num_averages = 2 * (optimizer_config.name == "adamw"), int(optimizer_config.averaging != "none")
    num_stored = sum(map(torch.numel, shapes.values()))
    num_weights = num_stored - (shapes["linear.weight"].numel() if spec.config.model.tied else 0)  # stored twice
    num_values = num_stored * (1 + num_averages) + num_weights * num_moments
    return num_values * (8 if spec.config.train.precision == "fp64" else 4)


def _num_moments(optimizer_config: OptimizerConfig) -> int:
    """Returns the tensors per weight that the optimizer and the average store."""
    moments = 2 if optimizer_config.name == "adamw" else int(optimizer_config.momentum > 0)
    return moments + (optimizer_config.averaging != "none")


def check_weights(model_config: ModelConfig, vocabulary_size: int) -> None:
    """Raises UserError, without building the model, if this machine cannot even hold its weights."""
    num_weights = count_weights(model_config, vocabulary_size)
    _check_memory(f"{format_count(num_weights)} weights", 4 * num_weights, "make it smaller")


def check_workers(spec: RunSpec) -> None:
    """Raises UserError if the workers of a run on CPUs of this machine need more cores or memory than it has."""
    scale, workers = spec.config.scale, max(1, spec.config.scale.max_workers)
    check_cpus(scale.cpus_per_worker, available_cpus())
    if scale.accelerator == "cpu" or not torch.cuda.is_available():
        num_weights = count_weights(spec.config.model, len(spec.dataset.vocabulary))
        description = f"{format_count(num_weights)} weights on scale.workers = {scale.workers}"
        required = workers * worker_bytes(spec.config, num_weights)
        _check_memory(description, required, "lower scale.workers, or make the model or stream.num_steps smaller")


def check_cpus(cpus_per_worker: int, cores: int) -> None:
    """Raises UserError if this machine has fewer cores than one worker is to use."""
    if cpus_per_worker > cores:
        raise UserError(f"scale.cpus_per_worker = {cpus_per_worker}: this machine has {cores} cores", "lower it")


def _check_memory(description: str, required: int, remedy: str) -> None:
    if required > machine_memory():
        problem = f"{description} need at least {format_bytes(required)}, and this machine has"
        raise UserError(f"model: does not fit into memory: {problem} {format_bytes(machine_memory())}", remedy)


def describe_needs(spec: RunSpec, on_cluster: bool) -> str:
    """Measures some steps of one worker on this machine; returns the memory, checkpoint size and time of the run.

    Raises UserError if a step fails, and, unless the run is to be on a cluster, as ``check_workers``.
    """
    if not on_cluster:
        check_workers(spec)
    config = spec.config
    workers = max(1, config.scale.max_workers)
    stream_config = replace(config.stream, batch_size=-(-config.stream.batch_size // workers))
    optimizer_config = replace(config.optimizer, learning_rate=1e-9)  # so that no loss diverges
    scale = replace(config.scale, workers=0)
    train_config = replace(config.train, log_every=1)  # so that each step is waited for
    alone_config = replace(config, stream=stream_config, optimizer=optimizer_config, scale=scale, train=train_config)
    alone = replace(spec, config=alone_config)
    device = torch.device("cuda" if torch.cuda.is_available() and scale.accelerator != "cpu" else "cpu")
    threads = min(scale.cpus_per_worker or max(1, available_cpus() // workers), available_cpus())
    world = World(0, 1, device, threads, "estimate")
    configure_process(config, world)
    seconds: list[float] = []
    try:
        train_state = build_train_state(alone, world, resolve_precision(config.train.precision, device).name)
        started_at = time.monotonic()
        for _ in islice(train_steps(train_state, alone.config, ControlFlags), _NUM_MEASURED_STEPS):
            seconds.append(time.monotonic() - started_at)
            started_at = time.monotonic()
    except UserError:
        raise
    except torch.OutOfMemoryError:
        problem = f"model: a training step does not fit into the memory of {device_name(device)}"
        raise UserError(problem, "lower stream.batch_size, stream.num_steps or model.hidden_size") from None
    except Exception as error:  # of the user's cell, for example
        raise UserError(f"a training step fails: {type(error).__name__}: {error}") from None
    num_weights = sum(map(torch.numel, train_state.model.parameters()))
    num_windows = Stream(spec.dataset.train_tokens, config.stream, config.run.seed).partition(0).num_windows
    return (
        f"{num_weights:,} weights; each worker needs at least {format_bytes(worker_bytes(config, num_weights))} "
        f"of memory, a checkpoint {format_bytes(checkpoint_bytes(spec))}, "
        f"an epoch about {format_duration(min(seconds) * num_windows)} at the speed of this machine"
    )
