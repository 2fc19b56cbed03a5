"""Starts a run's workers through a launcher, waits for them, and finishes the run."""

import json
from dataclasses import replace
from typing import Any, Protocol

from job.config.schema import Config
from job.config.toml import config_to_toml
from job.console import Console, format_duration, python_command
from job.errors import RunFailed, UserError
from job.inference.generate import generate_text
from job.run.lease import acquire_lease, wait_until_expired
from job.run.metrics import plot_perplexity
from job.run.recorder import RESULT_FILE, Recorder
from job.run.run_dir import CONFIG_FILE, check_config_unchanged, check_same_text, open_checkpoint, resolve_run
from job.run.setup import build_run_spec
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.checkpoint import find_latest_valid, list_checkpoints, weights_sha256
from job.training.events import EventSink
from job.training.progress import perplexity
from job.training.run_spec import RunSpec


class Launcher(Protocol):
    """Starts a run's workers: in this process, or by Ray on a cluster."""

    def connect(self, config: Config, console: Console) -> None:
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
) -> int:
    """Trains a run, or resumes it if it exists.

    Args:
        config: as the user gave it
        default_name: the run's name, without its number, if ``run.name`` is empty
        console: shows progress and the result
        launcher: starts the workers; closed at the end
        stop_request: lets the caller stop the run; signals do so anyway
        on_event: called after each event of the current attempt, and after each commit of a checkpoint

    Returns:
        The exit status: 0, or 128 + the signal's number if the run was stopped.

    Raises:
        UserError: the input is invalid; nothing was started
        RunFailed: the run failed; the error says what was saved
    """
    folder, config, previous = resolve_run(config, default_name)
    if previous and previous.is_finished(config):
        assert previous.result
        bound = "train.epochs" if previous.result["epochs"] >= config.train.epochs else "train.max_steps"
        console.print(f"{folder} is finished; to train longer, raise {bound}")
        _print_result(previous.result, folder, console)
        return 0
    wait_until_expired(folder, console.print)
    stop_request = stop_request or StopRequest()
    with stop_request.installed():
        spec = build_run_spec(config, folder)
        check_same_text(spec.checkpoints, spec.dataset.metadata)
        folder.check_writable()
        if stop_request.exit_code:
            return stop_request.exit_code
        folder = replace(folder, retry=True)
        spec = replace(spec, checkpoints=folder / spec.checkpoints.name)
        console.print(_run_banner(spec, config.corpus.source))
        try:
            launcher.connect(spec.config, console)
            return _run(launcher, spec, folder, stop_request, console, on_event)
        finally:
            launcher.close()


def _run(
    launcher: Launcher,
    spec: RunSpec,
    folder: Folder,
    stop_request: StopRequest,
    console: Console,
    on_event: EventSink | None,
) -> int:
    lease = acquire_lease(folder)
    recorder = None
    try:
        check_config_unchanged(folder, spec.config)  # between the look at it and the lease
        folder.write(CONFIG_FILE, config_to_toml(spec.config).encode())
        recorder = Recorder(folder, spec.config, lease, console, on_event)
        launcher.run(spec, recorder, stop_request)
        if recorder.failed:
            raise recorder.failed
        if not recorder.finished:
            raise RunFailed("the workers ended without a word")
        if recorder.finished.stopped:
            console.print(f"stopped at step {recorder.finished.progress.step:,}; {_describe_last_checkpoint(folder)}")
            return stop_request.exit_code
        lease.check()
        _print_result(_finish(spec, recorder, folder), folder, console)
        return 0
    except KeyboardInterrupt:
        console.print(f"stopped; {_describe_last_checkpoint(folder)}")
        return stop_request.exit_code
    except RunFailed as error:
        remedies = (error.remedy, _describe_last_checkpoint(folder, closely=True))
        raise type(error)(error.problem, "; ".join(filter(None, remedies))) from error.__cause__
    except OSError as error:
        raise RunFailed(f"{folder}: cannot be read or written: {error}; {_describe_last_checkpoint(folder)}") from None
    finally:
        if recorder:
            recorder.close()
        lease.release()


def _finish(spec: RunSpec, recorder: Recorder, folder: Folder) -> dict[str, Any]:
    """Lets the model speak, draws the curve, and writes the result, which marks the run as finished."""
    assert recorder.finished
    done = recorder.finished
    loaded = open_checkpoint((recorder.checkpoints / done.checkpoint).address)
    text = generate_text(loaded, spec.config)
    folder.write("sample.txt", (text + "\n").encode())
    folder.write("perplexity.png", plot_perplexity(recorder.rows(), spec.config.run.name))
    nats = done.progress.last_epoch_nats
    assert nats is not None
    result: dict[str, Any] = {"perplexity": perplexity(nats), "nats": nats}
    if done.progress.last_validation_nats is not None and recorder.best:
        result["validation_perplexity"] = perplexity(done.progress.last_validation_nats)
        result["best_validation_perplexity"] = perplexity(recorder.best.validation_nats or 0.0)
        result["best_checkpoint"] = f"checkpoints/{recorder.best.name}"
    result |= {
        "epochs": done.progress.epoch,
        "steps": done.progress.step,
        "tokens": done.progress.tokens,
        "seconds": round(done.progress.seconds, 3),
        "workers": done.workers,
        "restarts": max(done.progress.restarts, recorder.starts - 1),
        "checkpoint": f"checkpoints/{loaded.checkpoint.name}",
        "weights_sha256": weights_sha256(loaded.weights),
        "generated": text,
        "corpus": spec.dataset.metadata,
    }
    folder.write(RESULT_FILE, json.dumps(result, indent=1, ensure_ascii=False).encode())
    return result


def _run_banner(spec: RunSpec, asked: str) -> str:
    metadata, options = spec.dataset.metadata, spec.config
    source = metadata["source"]
    if source == "embedded" and asked == "auto":
        source = "the text embedded in Python (The Time Machine is neither cached nor to be had within seconds)"
    unit = "bytes" if options.vocabulary.kind == "byte" else "characters"
    return (
        f"run {options.run.name}: {source}, {metadata['characters']:,} {unit}, "
        f"{metadata['tokens']:,} tokens of {len(spec.dataset.vocabulary):,} kinds"
    )


def _describe_last_checkpoint(folder: Folder, closely: bool = False) -> str:
    """The last checkpoint, by its manifest, or by every byte; empty where all are damaged."""
    place = folder / "checkpoints"
    try:
        if closely:
            loaded, damaged = find_latest_valid(place)
            found = loaded.checkpoint if loaded else None
        else:
            checkpoints, _ = list_checkpoints(place)
            found, damaged = (checkpoints[-1] if checkpoints else None), ()
    except (OSError, UserError) as error:
        return f"the checkpoints cannot be read now: {error}"
    if not found:
        return "" if damaged else "no checkpoint was written yet: the same command starts anew"
    return (
        f"step {found.step:,} is kept: the same command with --run.name {folder.name} "
        f"goes on, {python_command()} -m job generate {folder.shell_quoted} lets it speak"
    )


def _print_result(result: dict[str, Any], folder: Folder, console: Console) -> None:
    workers = f"{result['workers']} worker{'s' * (result['workers'] != 1)}"
    console.print(
        f"perplexity {result['perplexity']:.4g} after {result['epochs']} epochs, {result['steps']:,} steps, "
        f"{format_duration(result['seconds'])} on {workers}"
    )
    if "validation_perplexity" in result:
        console.print(
            f"validation {result['validation_perplexity']:.4g}, at best {result['best_validation_perplexity']:.4g} "
            f"in {folder / result['best_checkpoint']}"
        )
    console.print()
    console.print(f"    {result['generated']}")
    console.print()
    for name, file in (("curve", "perplexity.png"), ("metrics", "metrics.jsonl"), ("checkpoint", result["checkpoint"])):
        console.print(f"{name:<11}{folder / file}")
    console.print(f"{'continue':<11}{python_command()} -m job generate {folder.shell_quoted} --generate.prefix '…'")
