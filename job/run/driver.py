"""Starts a run's workers through a launcher, waits for them, and finishes the run."""

import json
import logging
import math
import os
import sys
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from platform import python_version
from shutil import which
from socket import gethostname
from typing import Any, Protocol

import torch

from job.config.config_file import CONFIG_FILE
from job.config.field import format_value
from job.config.model import BUILTIN_CELLS
from job.config.run import TrackingConfig
from job.config.schema import FIELDS, Config
from job.config.toml import config_to_toml
from job.console import Console, format_duration, program_command
from job.data.content import Content
from job.data.dataset import Dataset
from job.data.text_size import bits_per_unit
from job.data.vocabulary import format_unknown_share
from job.errors import RunFailed, UserError
from job.inference.generate import generate_text
from job.paths import cache_notice
from job.run.driver_log import DriverLog, driver_log
from job.run.lease import Lease, acquire_lease, wait_until_expired
from job.run.metrics import TENSORBOARD, read_rows
from job.run.plot import plot_perplexity, to_png
from job.run.recorder import Recorder
from job.run.resume_from import (
    SourceCheckpoint,
    describe_changes,
    import_source_checkpoint,
    open_source_checkpoint,
    read_record,
)
from job.run.run_dir import (
    RESULT_FILE,
    check_same_config,
    check_same_text,
    open_checkpoint,
    read_existing_run,
    resolve_run,
)
from job.run.setup import MAX_DROPPED_SHARE, build_run_spec, format_dropped_share, run_warnings
from job.run.signals import EXIT_DELAY_S, ExitTimer, StopRequest
from job.run.text_cache import TextCache
from job.run.tracker_delivery import Trackers, check_trackers
from job.storage import Folder
from job.training.checkpoint import find_latest_valid, list_checkpoints, weights_sha256
from job.training.events import CheckpointCommitted, Event, EventSink, Finished
from job.training.loop import has_done_all
from job.training.progress import finite_or_none, perplexity
from job.training.run_spec import RunSpec

_logger = logging.getLogger(__name__)
_HYPERPARAMETERS = ("vocabulary", "stream", "model", "optimizer", "train")  # sections


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Args:
        folder: the run's folder
        config: its configuration, complete
        result: the content of ``result.json``; None if the run was stopped
        exit_code: of the command: 0, or 128 + the number of the signal that stopped the run
        dataset: what was trained on; None if nothing was trained, as the run had been finished before
    """

    folder: Folder
    config: Config
    result: dict[str, Any] | None
    exit_code: int = 0
    dataset: Dataset | None = None


class Launcher(Protocol):
    """Starts a run's workers: in this process, or by Ray on a cluster.

    Attributes:
        is_local: whether all workers are known to be on this machine, before ``connect``
    """

    is_local: bool

    def connect(self, spec: RunSpec, console: Console) -> None:
        """Makes sure that the workers can be placed. Raises UserError if not; nothing has been written by then."""

    def run(self, spec: RunSpec, recorder: Recorder, stop_request: StopRequest) -> None:
        """Starts the workers and passes their events to the recorder until the run is over.

        Raises RunFailed if the workers end before.
        """

    def close(self) -> None:
        """Releases the workers and the cluster; called once, whatever happened."""


def run_training(
    config: Config,
    default_name: str,
    console: Console,
    launcher: Launcher,
    stop_request: StopRequest | None = None,
    on_event: EventSink | None = None,
    *,
    retry: bool = False,
    content: Content | None = None,
    in_python: bool = False,
    in_trial: bool = False,
) -> RunOutcome:
    """Trains a run, or resumes it if it exists.

    Args:
        config: as the user gave it
        default_name: the run's name, without its number, if ``run.name`` is empty
        console: shows progress
        launcher: starts the workers; closed at the end
        stop_request: lets the caller stop the run; signals do so anyway
        on_event: called after each event that was recorded, and after each commit of a checkpoint
        retry: retry failed requests to an object store from the first on, because it is known to be reachable
        content: the text or token ids that ``corpus.source`` names, if they are in no file
        in_python: the caller is a program, whose messages name a call instead of a command
        in_trial: the run belongs to a search: it samples no text and is not tracked

    Raises:
        UserError: the input is invalid; nothing was started
        RunFailed: the run failed; the error says what was saved
    """
    check_trackers(config.tracking)
    with _exit_timer(in_python):
        folder, config, existing = resolve_run(config, default_name, retry=retry)
        if existing and existing.result and existing.is_finished(config):
            console.print(f"{folder} is finished; to train longer, raise {existing.limit_reached(config)}")
            return RunOutcome(folder, config, existing.result)
        folder = replace(folder, retry=True)
        observer = wait_until_expired(folder, console.print)
    stop_request = stop_request or StopRequest()
    with driver_log() as log, stop_request.installed():
        stop_request.can_save = False
        with suppress(KeyboardInterrupt), _exit_timer(in_python):
            spec, source = _prepare(config, folder, content, TextCache(console, launcher.is_local))
            spec = replace(spec, in_trial=in_trial)
        stop_request.can_save = True
        if stop_request.exit_code:
            return RunOutcome(folder, config, None, stop_request.exit_code)
        _announce(spec, source, config.corpus.source, folder, console)
        with closing(launcher):
            launcher.connect(spec, console)
            with (
                acquire_lease(folder, observer) as lease,
                closing(_trackers(spec, lease, console, stop_request)) as trackers,
                closing(_recorder(spec, lease, console, partial(_handle_event, log, trackers, on_event))) as recorder,
                log.opened(lease, recorder.status.attempts),
            ):
                if observer.owner:
                    _logger.warning("took the run over from %s", observer.describe_owner())
                result = _run(launcher, spec, source, recorder, stop_request, in_python)
                trackers.finish(result["checkpoint"] if result else "")
                return RunOutcome(folder, spec.config, result, 0 if result else stop_request.exit_code, spec.dataset)


def _exit_timer(in_python: bool) -> AbstractContextManager[object]:
    """Ends the command if it is interrupted while a bucket does not answer, but not a program that has called this."""
    return nullcontext() if in_python else ExitTimer(EXIT_DELAY_S, sys.stdout.flush)


def _prepare(
    config: Config, folder: Folder, content: Content | None, cache: TextCache
) -> tuple[RunSpec, SourceCheckpoint | None]:
    """Returns the run and the checkpoint that it starts from, after all input was read and checked."""
    spec = build_run_spec(config, folder, content, cache)
    check_same_text(list_checkpoints(spec.checkpoints)[0], spec.dataset)
    source = open_source_checkpoint(spec.config, spec.dataset, folder)
    folder.check_writable()
    return spec, source


def _announce(
    spec: RunSpec, source: SourceCheckpoint | None, requested_source: str, folder: Folder, console: Console
) -> None:
    """Shows what is trained on, and warnings; logs the configuration."""
    _logger.info(
        "process %d on %s, Python %s, torch %s", os.getpid(), gethostname(), python_version(), torch.__version__
    )
    changed = {name: value for name, value in spec.config.values().items() if value != FIELDS[name].default}
    _logger.info("configuration %s", ", ".join(f"{name} = {format_value(value)}" for name, value in changed.items()))
    if notice := cache_notice():
        console.warn(notice)
    console.print(_run_banner(spec, requested_source))
    if source:
        changes = describe_changes(source.record(spec.config)["changed"])
        console.print(f"from {source.checkpoint.path}, {f'changed: {changes}' if changes else 'nothing changed'}")
    if folder.local_path and which("tensorboard"):
        console.print(f"TensorBoard: tensorboard --logdir {(folder / TENSORBOARD).shell_quoted}", wrap=False)
    for warning in run_warnings(spec):
        console.warn(warning)


def _recorder(spec: RunSpec, lease: Lease, console: Console, on_event: EventSink) -> Recorder:
    """Returns the run's recorder; of a trial, the search shows the hyperparameters."""
    values = {} if spec.in_trial else spec.config.values()
    hyperparameters = {name: value for name, value in values.items() if _is_hyperparameter(name)}
    return Recorder(spec.config, lease, console, on_event, hyperparameters)


def _is_hyperparameter(name: str) -> bool:
    return name.partition(".")[0] in _HYPERPARAMETERS and not FIELDS[name].is_path


def _trackers(spec: RunSpec, lease: Lease, console: Console, stop_request: StopRequest) -> Trackers:
    """Returns the run's trackers; a trial has none."""
    config = replace(spec.config, tracking=TrackingConfig()) if spec.in_trial else spec.config
    return Trackers(config, lease.folder, console, stop_request)


def _handle_event(log: DriverLog, trackers: Trackers, on_event: EventSink | None, event: Event) -> None:
    trackers.handle(event)
    if isinstance(event, CheckpointCommitted):
        log.sync()
    if on_event:
        on_event(event)


def _run(
    launcher: Launcher,
    spec: RunSpec,
    source: SourceCheckpoint | None,
    recorder: Recorder,
    stop_request: StopRequest,
    in_python: bool,
) -> dict[str, Any] | None:
    """Runs the workers under the lease and finishes the run. Returns its result, or None if it was stopped."""
    folder, console = recorder.folder, recorder.status.console
    describe_last_checkpoint = partial(_describe_last_checkpoint, folder, spec.config.model.cell, in_python)
    try:
        # Another driver may have changed it before the lease was acquired.
        check_same_config(folder, read_existing_run(folder), spec.config)
        folder.write(CONFIG_FILE, _config_text(spec, source, folder).encode())
        if source:
            import_source_checkpoint(source, spec.config, folder)
        launcher.run(spec, recorder, stop_request)
        if recorder.status.failed:
            raise recorder.status.failed
        finished = recorder.status.finished
        if not finished:
            raise RunFailed("the workers exited without reporting a result")
        if finished.stopped:
            _logger.info("stopped on request, exit status %d", stop_request.exit_code)
            console.print(f"stopped at step {finished.progress.step:,}; {describe_last_checkpoint()}")
            return None
        stop_request.can_save = False
        return _finish(spec, recorder, finished)
    except KeyboardInterrupt:
        console.print(f"stopped; {describe_last_checkpoint()}")
        return None
    except RunFailed as error:
        remedies = (error.remedy, describe_last_checkpoint(verify=True))
        raise type(error)(error.problem, "; ".join(filter(None, remedies))) from error.__cause__
    except OSError as error:
        raise RunFailed(f"{folder}: cannot be read or written: {error}", describe_last_checkpoint()) from None


def _config_text(spec: RunSpec, source: SourceCheckpoint | None, folder: Folder) -> str:
    """Returns the run's configuration; a comment names the checkpoint that it started from, and what was changed."""
    record = source.record(spec.config) if source else read_record(folder)
    if not record or not spec.config.run.resume_from:
        return config_to_toml(spec.config)
    changed = describe_changes(record["changed"]) or "nothing"
    return f"# From {format_value(record['checkpoint'])}, changed: {changed}.\n{config_to_toml(spec.config)}"


def _finish(spec: RunSpec, recorder: Recorder, finished: Finished) -> dict[str, Any]:
    """Generates a sample, plots the perplexity, and writes the result, which marks the run as finished."""
    folder, progress, best = recorder.folder, finished.progress, recorder.committer.best
    loaded = open_checkpoint(recorder.committer.folder / finished.checkpoint)
    text = generate_text(loaded, spec.config)
    folder.write("sample.txt", (text + "\n").encode())
    recorder.metrics.merge()
    folder.write("perplexity.png", to_png(plot_perplexity(read_rows(folder), spec.config.run.name)))
    nats = progress.last_epoch_nats
    assert nats is not None
    shares = spec.dataset.unknown_shares
    result: dict[str, Any] = {"perplexity": perplexity(nats), "nats": nats, "unknown_share": shares["training"]}
    if best and best.validation_nats is not None:
        last_nats = math.inf if progress.last_validation_nats is None else progress.last_validation_nats
        bits = bits_per_unit(last_nats * (len(spec.dataset.validation_tokens) - 1), spec.dataset.validation_size)
        result["validation_perplexity"] = perplexity(last_nats)
        result |= {f"validation_{name}": finite_or_none(value) for name, value in bits.items()}
        if spec.config.optimizer.averaging != "none":
            result["validation_nats"] = progress.last_validation_nats
            result["validation_nats_raw"] = progress.last_validation_nats_raw
        result["best_validation_perplexity"] = perplexity(best.validation_nats)
        result["best_checkpoint"] = f"checkpoints/{best.name}"
        result["validation_unknown_share"] = shares["validation"]
    result |= {
        "epochs": progress.epoch,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "workers": finished.workers,
        "restarts": max(progress.restarts, len(recorder.status.attempts) - 1),
        "checkpoint": f"checkpoints/{loaded.checkpoint.name}",
        "weights_sha256": weights_sha256(loaded.weights),
        "generated": text,
        "corpus": spec.dataset.metadata,
    }
    if spec.config.train.patience:
        result["stopped_early"] = not has_done_all(progress, spec.config.train)
        result["validations_without_improvement"] = progress.decisions.stale
    if spec.config.run.resume_from and (record := read_record(folder)):
        result["resumed_from"] = record
    _logger.info("finished: %s", {name: result[name] for name in ("perplexity", "epochs", "steps", "restarts")})
    folder.write(RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False).encode())
    return result


def _run_banner(spec: RunSpec, requested_source: str) -> str:
    metadata, config = spec.dataset.metadata, spec.config
    source = metadata["source"]
    if source == "embedded" and requested_source == "auto":
        source = "Python's built-in help text (The Time Machine is not cached and could not be downloaded)"
    unit = "bytes" if config.vocabulary.kind == "byte" else "characters"
    return (
        f"run {config.run.name}: {source}, {metadata['characters']:,} {unit}, "
        f"{metadata['tokens']:,} tokens, {len(spec.dataset.vocabulary):,} distinct"
        f"{format_dropped_share(spec, MAX_DROPPED_SHARE)}"
        f"{format_unknown_share(spec.dataset.unknown_shares['training'])}{_describe_validation(spec.dataset)}"
    )


def _describe_validation(dataset: Dataset) -> str:
    """Describes another text for validation; empty without one."""
    text, share = dataset.metadata.get("validation"), dataset.unknown_shares.get("validation", 0)
    return f"; validation: {text['source']}, {text['tokens']:,} tokens{format_unknown_share(share)}" if text else ""


def _describe_last_checkpoint(folder: Folder, cell: str, in_python: bool, verify: bool = False) -> str:
    """Describes what was saved and how to resume it. Empty if all checkpoints are corrupt.

    Args:
        folder: the run's folder
        cell: ``model.cell``
        in_python: name a call instead of a command
        verify: check every byte of the checkpoint, not only that it has a manifest
    """
    try:
        if verify:
            checkpoint, corrupt = find_latest_valid(folder / "checkpoints")
        else:
            checkpoints, _ = list_checkpoints(folder / "checkpoints")
            checkpoint, corrupt = (checkpoints[-1] if checkpoints else None), ()
    except (OSError, UserError) as error:
        return f"the checkpoints cannot be read now: {error}"
    if not checkpoint:
        return (
            "" if corrupt else f"no checkpoint was written: the same {'call' if in_python else 'command'} starts over"
        )
    resume, sample = f"the same command with --run.name {folder.name}", _generate_command(folder, cell)
    if in_python:
        resume = f'the same call with run={{"name": "{folder.name}"}}'
        sample = f'job.load("{folder}"{"" if cell in BUILTIN_CELLS else ", cell=…"}).generate()'
    return f"saved at step {checkpoint.step:,}. Resume: {resume}. Sample: {sample}"


def _generate_command(folder: Folder, cell: str) -> str:
    """Returns the command that continues a text with a run's model; a custom cell must be named again."""
    cell_flag = "" if cell in BUILTIN_CELLS else f" --model.cell {cell}"
    return f"{program_command()} generate {folder.shell_quoted}{cell_flag}"


def _format_bits(result: dict[str, Any]) -> str:
    """Returns the last validation loss in bits per character, byte and word, in parentheses; empty if none is known."""
    bits = {unit: result.get(f"validation_bits_per_{unit}") for unit in ("character", "byte", "word")}
    texts = [f"{value:.4g} per {unit}" for unit, value in bits.items() if value is not None]
    return f" (bits: {', '.join(texts)})" if texts else ""


def print_result(outcome: RunOutcome, console: Console) -> None:
    """Prints the result of a finished run: its perplexity, the sample, the paths, and how to generate more."""
    result, folder = outcome.result, outcome.folder
    assert result
    workers = f"{result['workers']} worker{'s' * (result['workers'] != 1)}"
    console.print(
        f"perplexity {result['perplexity']:.4g} after {result['epochs']:,} epochs, {result['steps']:,} steps, "
        f"{format_duration(result['seconds'])} on {workers}{format_unknown_share(result.get('unknown_share', 0))}"
    )
    if "validation_perplexity" in result:
        console.print(
            f"validation {result['validation_perplexity']:.4g}{_format_bits(result)}, "
            f"at best {result['best_validation_perplexity']:.4g} in {folder / result['best_checkpoint']}"
            f"{format_unknown_share(result.get('validation_unknown_share', 0))}"
        )
    if result.get("stopped_early"):
        console.print(f"stopped early: no improvement in {result['validations_without_improvement']} validations")
    console.print()
    console.print(f"    {result['generated']}", wrap=False)
    console.print()
    for name, file in (("curve", "perplexity.png"), ("metrics", "metrics.jsonl"), ("checkpoint", result["checkpoint"])):
        console.print(f"{name:<11}{folder / file}", wrap=False)
    console.print(
        f"{'continue':<11}{_generate_command(folder, outcome.config.model.cell)} --generate.prefix '…'", wrap=False
    )
