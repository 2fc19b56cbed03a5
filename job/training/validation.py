"""Validation during a run: the loss over the validation text, when it is due, and the lowest so far."""

from job.config.training import TrainConfig
from job.distributed.collectives import broadcast_json, gather_json
from job.distributed.context import World
from job.distributed.tree_reduce import tree_sum
from job.nn.language_model import LanguageModel
from job.training.loop import evaluate_lanes
from job.training.progress import LossSum, Progress, finite_or_none
from job.training.run_spec import RunSpec
from job.training.train_state import TrainState


def is_validation_due(progress: Progress, train_config: TrainConfig) -> bool:
    """Whether ``train.validate_every`` asks for a validation after this step."""
    return bool(train_config.validate_every) and progress.step % train_config.validate_every == 0


def validate(spec: RunSpec, world: World, train_state: TrainState) -> tuple[LossSum, LossSum | None]:
    """Evaluates the validation text, split into as many lanes as the stream; all workers call it after the same step.

    The training lanes and their state are left as they are.

    Returns:
        The loss over all tokens of the text but the first, the same on all workers: of the averaged weights, and of the
        raw ones, or None if weights are not averaged.
    """
    average, model = train_state.average, train_state.model
    raw = _validate_model(model, spec, world, train_state)
    if not average:
        return raw, None
    is_raw = train_state.progress.averaged_steps <= 1
    return raw if is_raw else _validate_model(average.averaged, spec, world, train_state), raw


def _validate_model(model: LanguageModel, spec: RunSpec, world: World, train_state: TrainState) -> LossSum:
    groups, tokens = train_state.assignment.groups, spec.dataset.validation_tokens
    num_lanes, num_steps = spec.config.stream.batch_size, spec.config.stream.num_steps
    sums = evaluate_lanes(model, tokens, groups, num_lanes, num_steps, train_state.precision.autocast)
    if world.size > 1:
        sums = [nats for worker_sums in gather_json(sums) for nats in worker_sums]
    return LossSum(broadcast_json(tree_sum(sums)), len(tokens) - 1)  # of rank 0, so that all decide the same


def record_validation(progress: Progress, loss: LossSum, raw: LossSum | None) -> bool:
    """Stores what ``validate`` returned in the progress. Returns whether the loss is the lowest so far, and finite."""
    nats, best = finite_or_none(loss.nats_per_token), progress.best_validation_nats
    progress.last_validation_nats, progress.validated_step = nats, progress.step
    progress.last_validation_nats_raw = finite_or_none(raw.nats_per_token) if raw else None
    progress.best_validation_nats = min((x for x in (best, nats) if x is not None), default=None)
    return nats is not None and (best is None or nats < best)
