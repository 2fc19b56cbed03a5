"""Everything that changes while a worker trains, and how it is built."""

from dataclasses import dataclass, field, replace
from io import BytesIO

import torch

from job.data.read_ahead import WindowReader
from job.data.stream import Stream
from job.distributed.context import Precision, World, resolve_precision
from job.distributed.gradient_sync import (
    AllReduceGradients,
    DeterministicGradients,
    LaneAssignment,
    LossModule,
    assign_lanes,
)
from job.distributed.shared_memory import SharedMemoryGroup, create_group
from job.nn.language_model import LanguageModel, build_model, build_model_with_weights
from job.nn.state import State, map_state
from job.training.averaging import WeightAverage
from job.training.checkpoint import CorruptCheckpoint, load_lane_state
from job.training.cuda_graph import CudaGraphTrainStep, supports_cuda_graph
from job.training.optimizer import build_optimizer, load_optimizer_tensors
from job.training.progress import Progress
from job.training.resume import ResumePoint
from job.training.run_spec import RunSpec
from job.training.schedule import Schedule
from job.training.tensor_file import read_tensors
from job.training.train_step import EagerTrainStep, TrainStep


@dataclass
class TrainState:
    """One worker's model, optimizer, lanes and progress."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    train_step: TrainStep
    stream: Stream
    windows: WindowReader
    schedule: Schedule
    assignment: LaneAssignment
    shared_memory: SharedMemoryGroup | None  # of all workers, if they run on CPUs of one machine
    precision: Precision
    learning_rate: float  # of the last step
    progress: Progress = field(default_factory=Progress)
    lane_state: State = None

    @property
    def is_epoch_done(self) -> bool:
        """Whether all windows of the current epoch are processed."""
        return self.progress.window == self.stream.partition(self.progress.epoch).num_windows


def build_train_state(
    spec: RunSpec, world: World, precision_name: str, resume_point: ResumePoint | None = None
) -> TrainState:
    """Builds a worker's training state; all workers of a run must call it.

    Args:
        spec: the run
        world: this worker's place among the workers
        precision_name: precision of the run; a resumed run must keep that of its checkpoint
        resume_point: where to resume, whose tensors become those of the state; None starts a new run

    Raises:
        UserError: the initial weights do not match the model, or a custom cell cannot be used
        CorruptCheckpoint: the checkpoint's position is not in the text, or it has no valid state of this worker's lanes
    """
    config, device = spec.config, world.device
    stream = Stream(spec.dataset.train_tokens, config.stream, config.run.seed)
    precision = resolve_precision(precision_name, device)
    model = _build_model(spec, resume_point, precision.weights).to(device)
    model.reset_token = spec.dataset.vocabulary.reset_token(config.corpus)
    optimizer = build_optimizer(config.optimizer, model)
    num_groups = config.train.lane_groups if config.train.reproducible else 0
    assignment = assign_lanes(config.stream.batch_size, num_groups, world.rank, world.size)
    windows = WindowReader(stream, assignment.lanes, config.train.epochs)
    if resume_point:
        load_optimizer_tensors(optimizer, model, resume_point.optimizer)
    shared_memory = create_group(config.scale.hang_timeout) if world.size > 1 and device.type == "cpu" else None
    loss_module = LossModule(model, stream.tokens_per_step, config.model, precision.autocast)
    use_graph = supports_cuda_graph(model, world.size) and (world.size == 1 or not config.train.reproducible)
    gradients = (
        DeterministicGradients(loss_module, assignment, shared_memory)
        if config.train.reproducible
        else AllReduceGradients(loss_module, assignment, shared_memory, use_graph, config.train.accumulate)
    )
    average = _build_average(spec, resume_point, model) if config.optimizer.averaging != "none" else None
    eager_step = EagerTrainStep(gradients, optimizer, config.optimizer.grad_clip_norm, device, average)
    train_step = CudaGraphTrainStep(eager_step) if use_graph else eager_step
    schedule_steps = config.optimizer.schedule_steps or stream.total_steps(replace(config.train, max_steps=0))
    schedule = Schedule(config.optimizer, schedule_steps, config.stream.batch_size)
    parts = model, optimizer, average, train_step, stream, windows, schedule, assignment, shared_memory, precision
    train_state = TrainState(*parts, schedule.peak)
    if resume_point:
        if not 0 <= resume_point.progress.window <= stream.partition(resume_point.progress.epoch).num_windows:
            raise CorruptCheckpoint(resume_point.checkpoint.path, "its window is not one of the text")
        progress = resume_point.progress
        averaged_steps = progress.averaged_steps if resume_point.average else 0
        train_state.progress = replace(progress, restarts=progress.restarts + 1, averaged_steps=averaged_steps)
        lane_state = load_lane_state(resume_point.checkpoint, assignment.lanes)
        train_state.lane_state = map_state(lambda tensor: tensor.to(device), lane_state)
    return train_state


def _build_model(spec: RunSpec, resume_point: ResumePoint | None, dtype: torch.dtype) -> LanguageModel:
    config, vocabulary_size = spec.config, len(spec.dataset.vocabulary)
    if resume_point:
        weights, source = resume_point.weights, str(resume_point.checkpoint.path)
    elif spec.init:
        weights, source = read_tensors(BytesIO(spec.init), len(spec.init))[0], config.model.init
    else:
        return build_model(config.model, vocabulary_size, config.run.seed).to(dtype)
    return build_model_with_weights(config.model, vocabulary_size, config.run.seed, weights, dtype, source)


def _build_average(spec: RunSpec, resume_point: ResumePoint | None, model: LanguageModel) -> WeightAverage:
    """Returns the average so far: the checkpoint's if it has one, else the model's own weights."""
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    source = "average"
    if resume_point and resume_point.average:
        weights, source = resume_point.average, str(resume_point.checkpoint.path)
    config, parameter = spec.config, model.linear.weight
    arguments = config.model, len(spec.dataset.vocabulary), config.run.seed, weights, parameter.dtype, source
    averaged = build_model_with_weights(*arguments).to(parameter.device)
    averaged.reset_token = model.reset_token
    return WeightAverage(model, averaged)
