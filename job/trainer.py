"""One worker's whole run, from a plan and a place in the world to events; Ray is not needed.

What a worker has to tell goes out as events, what is asked of it comes in as signals.
"""

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from job import checkpoint, cudagraph, kernel, loop, model, neighbours, optimizer
from job.checkpoint import Checkpoint, Unsound
from job.config import CELLS, Config
from job.errors import Diverged, RunFailed, UserError
from job.events import Event, Failed, Finished, Part, Post, Pulse, Row, Started
from job.gradients import Ordered, Share, Signals, Summed
from job.lanes import groups_of
from job.loop import Learner, Mean, Progress, perplexity
from job.model import map_state
from job.storage import Folder
from job.stream import Stream
from job.tree import tree_sum
from job.update import Direct
from job.vocabulary import Vocabulary
from job.world import World, device_name, keep_memory, precision_of

PULSE = 0.5  # seconds between two signs of life
LONGEST_LOOK = 1800.0  # seconds in which one worker finds the last sound checkpoint for all
LOOK = 5.0  # seconds between two looks for nodes that are about to go


@dataclass(frozen=True)
class Plan:
    """What all workers of a run share."""

    config: Config
    vocabulary: Vocabulary
    checkpoints: Folder
    corpus: dict[str, Any]  # what a checkpoint records of the text
    init: bytes | None  # a safetensors file with the first weights


class Link(Protocol):
    """What ties a worker to its driver."""

    def post(self, event: Event) -> None:
        """Tells the driver; events of one worker arrive in order."""

    def signals(self) -> Signals:
        """What this worker asks of all at the step that comes."""

    def leaving(self) -> bool:
        """Whether a node is about to be taken away; all workers ask at the same step."""


def train(plan: Plan, tokens: np.ndarray, world: World, link: Link) -> None:
    """Trains this worker's lanes to the end, to a stop, or to a failure, and tells which.

    ``tokens`` are those of the whole text.
    """
    try:
        _Worker(plan, tokens, world, link).run()
    except (RunFailed, UserError, Unsound) as error:
        link.post(Failed(world.attempt, str(error), isinstance(error, Diverged)))
    except OSError as error:
        link.post(Failed(world.attempt, f"{plan.checkpoints}: a checkpoint cannot be written or read: {error}"))


def parts_of_text(tokens: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The tokens to train on, and the text's last part, kept to validate."""
    kept = len(tokens) - round(len(tokens) * validation_fraction)
    return tokens[:kept], tokens[kept:]


def latest_sound(folder: Folder) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The last checkpoint of which every byte is right, and what is wrong with any after it."""
    passed_over: list[str] = []
    for found in reversed(checkpoint.committed(folder)):
        if isinstance(found, str):
            passed_over.append(found)
            continue
        try:
            checkpoint.verify(found)
        except Unsound as error:
            passed_over.append(str(error))
        else:
            return found, tuple(passed_over)
    return None, tuple(passed_over)


def _refuse_to_begin_again(folder: Folder, passed_over: tuple[str, ...]) -> None:
    """Unsound where all that a run has is damaged: to start anew, and over it, is for a person to decide."""
    if passed_over:
        raise Unsound(f"{folder}: no checkpoint is sound: {passed_over[0]}; to start anew remove the folder")


def learner_of(
    plan: Plan, stream: Stream, world: World, found: Checkpoint | None, precision_name: str
) -> tuple[Learner, str]:
    """This worker's share of the run as the checkpoint has it, or new; and the precision's name."""
    options, device = plan.config, world.device
    restored = checkpoint.restore(found) if found else None
    if restored:  # a run keeps its precision wherever it goes on
        precision_name = restored.facts["precision"]
    precision = precision_of(precision_name, device)
    net = model.build(options.model, len(plan.vocabulary), options.run.seed).to(device, precision.weights)
    if restored:
        model.load_weights(net, restored.weights, str(plan.checkpoints))
    elif plan.init:
        model.load_weights(net, checkpoint.tensors(plan.init, options.model.init), options.model.init)
    updates = optimizer.build(options.optimizer, net)
    if restored:
        optimizer.load_state_tensors(updates, net, restored.optimizer)
    share = _share(options, stream, world, precision.autocast)
    gradients = (Ordered if options.train.reproducible else Summed)(net, share)
    direct = Direct(gradients, updates, options.optimizer.grad_clip_norm, device)
    update = cudagraph.Graphed(direct) if cudagraph.is_possible(net, share) else direct
    progress = restored.progress if restored else Progress()
    learner = Learner(net, updates, update, stream, stream.total_steps(options.train), share, progress)
    if found:
        progress.restarts += 1
        state = checkpoint.lane_state(found, share.lanes)
        learner.state = map_state(lambda part: part.to(device), state)
    return learner, precision.name


def _share(options: Config, stream: Stream, world: World, autocast: torch.dtype | None) -> Share:
    reproducible = options.train.reproducible
    split = options.train.lane_groups if reproducible else 0
    groups = groups_of(options.stream.batch_size, split, world.rank, world.size)
    on_processors = world.size > 1 and world.device.type == "cpu"
    near = neighbours.meet(options.scale.hang_timeout) if on_processors else None
    return Share(groups, world.size, stream.tokens_of_window, autocast, options.model.dropout, near)


class _Worker:
    """The run as one worker sees it: the epochs, and what is reported and saved on the way."""

    def __init__(self, plan: Plan, tokens: np.ndarray, world: World, link: Link) -> None:
        self.options, self.world, self.link = plan.config, world, link
        keep_memory()
        torch.set_num_threads(1 if self.options.train.reproducible else world.threads)
        torch.use_deterministic_algorithms(self.options.train.reproducible)
        training, self.validation = parts_of_text(tokens, self.options.corpus.validation_fraction)
        stream = Stream(training, self.options.stream, self.options.run.seed)
        found, self.passed_over, precision = self._agreed(plan.checkpoints)
        self.learner, self.precision = learner_of(plan, stream, world, found, precision)
        self.writer = _Writer(plan, world, link.post, self.precision)
        self.rate = self.options.optimizer.learning_rate
        self.report_lap = self.pulse_lap = _Lap(self.progress.tokens)
        self.epoch_lap = _Lap(self.progress.tokens)
        self.clock = self.saved_at = self.looked_at = time.monotonic()

    def _agreed(self, folder: Folder) -> tuple[Checkpoint | None, tuple[str, ...], str]:
        """The last sound checkpoint, what is wrong with later ones, and the precision for a new run.

        One worker looks and chooses, so that all do the same on whatever they run.
        """
        chosen: list[Any] = [None]
        if self.world.rank == 0:
            found, passed_over = latest_sound(folder)
            if not found:
                _refuse_to_begin_again(folder, passed_over)
            chosen = [(found, passed_over, precision_of(self.options.train.precision, self.world.device).name)]
        if self.world.size > 1:  # of many parts in a slow store it takes longer than any step may
            patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=LONGEST_LOOK))
            dist.broadcast_object_list(chosen, group=patient)
            dist.destroy_process_group(patient)
        agreed: tuple[Checkpoint | None, tuple[str, ...], str] = chosen[0]
        return agreed

    @property
    def progress(self) -> Progress:
        return self.learner.progress

    def run(self) -> None:
        self._announce()
        stopped = False
        try:
            self._close_what_was_cut()
            while not stopped and not loop.is_done(self.progress, self.options.train):
                stopped = self._epoch()
            if self.writer.last != self.progress.step:
                self._save()
            if self.writer.last != self.progress.step:
                raise Diverged(f"weights are no longer finite after step {self.progress.step}")
        except Exception as error:
            self.writer.finish()  # what was good is kept
            if isinstance(error, Diverged) and self.world.size > 1:  # all workers see it at the same step
                dist.barrier()
            raise
        self.writer.finish()
        last = copy.deepcopy(self.progress)
        name = checkpoint.name_of(last.step, self.world.attempt)
        self._tell(Finished(self.world.attempt, stopped, last, name, self.world.size))

    def _epoch(self) -> bool:
        """Takes the epoch's windows to its end, or to a stop: then True."""
        progress, stopped = self.progress, False
        for step in loop.steps(self.learner, self.options, self._signals):
            self.rate, stopped = step.learning_rate, step.tally.signals.stop
            self._report(step)
            if stopped or step.ends_run:
                break
            if not step.ends_epoch and self._due(step.tally.signals):
                self._save()
        if self.learner.at_epochs_end:
            self._close(progress.epoch + 1, loop.end_epoch(self.learner))
        self._close_what_was_cut()
        self._save()
        return stopped

    def _close_what_was_cut(self) -> None:
        """Closes, once, an epoch inside which ``max_steps`` has ended the run."""
        progress, mean = self.progress, self.progress.epoch_mean
        is_closed = not mean.tokens or progress.last_epoch_nats == mean.nats_per_token
        if loop.is_done(progress, self.options.train) and not is_closed:
            progress.last_epoch_nats = mean.nats_per_token
            self._close(progress.epoch + 1, mean)

    def _close(self, epoch: int, mean: Mean) -> None:
        """Reports an epoch, and what the model makes of the text kept to validate."""
        self._row("epoch", epoch, mean, self.epoch_lap.speed(self.progress.tokens))
        if len(self.validation) > 1:
            begun = time.monotonic()
            mean = self._validate()
            took = time.monotonic() - begun
            self.report_lap.since += took  # the speed is that of training
            nats, best = mean.nats_per_token, self.progress.best_validation_nats
            self.progress.last_validation_nats, self.progress.validated_step = nats, self.progress.step
            self.progress.best_validation_nats = nats if best is None else min(best, nats)
            self._row("validation", epoch, mean, mean.tokens / took)
        self.epoch_lap = _Lap(self.progress.tokens)

    def _validate(self) -> Mean:
        """The mean over the kept text, its lanes shared out like the stream's."""
        share, stream = self.learner.share, self.options.stream
        sums = loop.evaluate(
            self.learner.model, self.validation, share.groups, stream.batch_size, stream.num_steps, share.autocast
        )
        if self.world.size > 1:
            gathered: list[Any] = [None] * self.world.size
            dist.all_gather_object(gathered, sums)
            sums = [nats for part in gathered for nats in part]
        return Mean(tree_sum(sums), len(self.validation) - 1)

    # --- what is asked, saved and told ---

    def _signals(self) -> Signals:
        asked = self.link.signals()
        if self.world.rank:
            return asked
        now = time.monotonic()
        look = now - self.looked_at >= LOOK
        if look:
            self.looked_at = now
        due = now - self.saved_at >= self.options.train.checkpoint_seconds and not self.writer.busy
        return asked._replace(checkpoint=asked.checkpoint or due, look=look)

    def _due(self, asked: Signals) -> bool:
        every = self.options.train.checkpoint_steps
        by_steps = bool(every) and self.progress.step % every == 0
        return by_steps or asked.checkpoint or (asked.look and self.link.leaving())

    def _save(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.clock
        self.clock = self.saved_at = now
        self.writer.save(self.learner)

    def _tell(self, event: Event) -> None:
        """Posts, once, what all workers could say alike."""
        if self.world.rank == 0:
            self.link.post(event)

    def _announce(self) -> None:
        self._tell(
            Started(
                self.world.attempt,
                self.progress.step,
                self.progress.epoch,
                self.world.size,
                self._device(),
                self.precision,
                sum(weight.numel() for weight in self.learner.model.parameters()),
                self.learner.total_steps,
                self.passed_over,
            )
        )

    def _device(self) -> str:
        """What the worker computes on, whether all share a memory, and why it is slower than it might be."""
        missing = kernel.missing_on(self.world.device) if self.options.model.cell in CELLS else ""
        together = " in one memory" if self.learner.share.near else ""
        slowly = f" without the compiled kernel ({missing})" if missing else ""
        return device_name(self.world.device) + together + slowly

    def _report(self, step: loop.Step) -> None:
        progress, every = self.progress, self.options.train.log_every
        if (progress.step % every == 0) if every else step.ends_epoch:
            mean, progress.report_mean = progress.report_mean, Mean()
            self._row("train", progress.epoch + 1, mean, self.report_lap.speed(progress.tokens))
            self.report_lap = _Lap(progress.tokens)
        if time.monotonic() - self.pulse_lap.since >= PULSE:
            speed, nats = self.pulse_lap.speed(progress.tokens), progress.epoch_mean.nats_per_token
            self.pulse_lap = _Lap(progress.tokens)
            self._tell(Pulse(self.world.attempt, progress.epoch + 1, progress.step, nats, speed))

    def _row(self, split: str, epoch: int, mean: Mean, speed: float) -> None:
        row = {
            "split": split,
            "epoch": epoch,
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "nats": mean.nats_per_token,
            "perplexity": perplexity(mean.nats_per_token),
            "learning_rate": self.rate,
            "tokens_per_second": round(speed, 1),
            "workers": self.world.size,
        }
        self._tell(Row(self.world.attempt, row))


class _Lap:
    """Tokens per second since a moment."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.since = tokens, time.monotonic()

    def speed(self, tokens: int) -> float:
        return (tokens - self.tokens) / max(time.monotonic() - self.since, 1e-9)


class _Writer:
    """Writes this worker's parts in the background; the loop waits for a copy in memory only."""

    def __init__(self, plan: Plan, world: World, post: Post, precision: str) -> None:
        self.plan, self.world, self.post = plan, world, post
        self.facts = {"precision": precision, "corpus": plan.corpus}
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        self.last = -1  # the step of the last save

    def save(self, learner: Learner) -> None:
        """Copies what is to be saved and has it written; waits for the save before, if it still runs."""
        self.finish()
        weights = {name: weight.detach().clone() for name, weight in learner.model.state_dict().items()}
        if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
            return  # the next step's loss ends the run, which keeps the checkpoint before
        state = map_state(lambda part: part.to("cpu", copy=True), learner.state)
        moments = optimizer.state_tensors(learner.optimizer, learner.model)
        moments = {name: tensor.to("cpu", copy=True) for name, tensor in moments.items()}
        progress = copy.deepcopy(learner.progress)
        self.last = progress.step

        def write() -> None:
            files = checkpoint.lanes_part(learner.share.lanes, state)
            if self.world.rank == 0:
                on_cpu = {name: weight.cpu() for name, weight in weights.items()}
                files |= checkpoint.model_part(
                    self.plan.config, self.plan.vocabulary, on_cpu, moments, progress, self.facts
                )
            name = checkpoint.name_of(progress.step, self.world.attempt)
            receipt = checkpoint.write_part(
                self.plan.checkpoints, name, files, self.world.size, None if self.world.rank else progress
            )
            self.post(Part(self.world.attempt, receipt))

        self.pending = self.thread.submit(write)

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return bool(self.pending and not self.pending.done())

    def finish(self) -> None:
        """Waits for the save that runs; OSError if it failed."""
        if self.pending:
            self.pending.result()
            self.pending = None
