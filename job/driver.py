"""Starts a run's workers, follows them, and finishes the run.

How workers are started is the launcher's affair: in this process, or by Ray on a cluster.
"""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from job import checkpoint, generate, lease, model, parse, report, runs
from job.config import Config
from job.errors import Diverged, Hopeless, RunFailed, UserError
from job.loop import perplexity
from job.prepare import prepare
from job.record import RESULT, Recorder
from job.screen import Screen, duration
from job.storage import Folder
from job.trainer import Plan, latest_sound


class Wishes:
    """What signals ask of the run: SIGINT or SIGTERM once, to save and stop; again, to stop at once.

    SIGUSR1 asks for a checkpoint. SIGHUP is ignored: a terminal may go away.
    """

    def __init__(self) -> None:
        self.status = 0  # the exit status of a stop, once one is wanted
        self.save = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listens for signals within; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._hear) for number in heard}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif self.status:
            raise KeyboardInterrupt
        else:
            self.status = 128 + number


# Workers take the plan and the tokens; the recorder gets their events until the run is over.
Follow = Callable[[Plan, np.ndarray, Recorder, Wishes], None]
# Makes sure, before anything is written, that the workers have a place.
Launcher = Callable[[Config, Screen], AbstractContextManager[Follow]]


def run(options: Config, stem: str, screen: Screen, launch: Launcher) -> int:
    """Trains as configured, or goes on with what is there; gives the exit status."""
    folder, options, previous = runs.choose(options, stem)
    if previous and previous.is_finished(options):
        assert previous.result
        bound = "train.epochs" if previous.result["epochs"] >= options.train.epochs else "train.max_steps"
        screen.line(f"{folder} is finished; to train longer, raise {bound}")
        _show(previous.result, folder, screen)
        return 0
    lease.refuse_unless_dead(folder, screen.line)
    wishes = Wishes()
    with wishes.heard():
        plan, tokens = prepare(options, folder)
        runs.check_same_text(plan.checkpoints, plan.corpus)
        folder.check_writable()
        if wishes.status:
            return wishes.status
        folder = replace(folder, patient=True)
        plan = replace(plan, checkpoints=folder / plan.checkpoints.name)
        screen.line(_about(plan, options.corpus.source))
        # Heard anew within: Ray, once it is connected, has handlers of its own.
        with launch(plan.config, screen) as follow, wishes.heard():
            return _run(follow, plan, tokens, folder, wishes, screen)


def _run(follow: Follow, plan: Plan, tokens: np.ndarray, folder: Folder, wishes: Wishes, screen: Screen) -> int:
    owned = lease.acquire(folder)
    recorder = None
    try:
        runs.refuse_if_changed(folder, plan.config)  # between the look at it and the lease
        folder.write(runs.CONFIG, parse.to_toml(plan.config).encode())
        recorder = Recorder(folder, plan.config, owned, screen)
        follow(plan, tokens, recorder, wishes)
        if recorder.failed:
            raise (Diverged if recorder.diverged else Hopeless)(recorder.failed)
        if not recorder.finished:
            raise RunFailed("the workers ended without a word")
        if recorder.finished.stopped:
            screen.line(f"stopped at step {recorder.finished.progress.step:,}; {_what_is_kept(folder)}")
            return wishes.status
        owned.check()
        _show(_finish(plan, recorder, folder), folder, screen)
        return 0
    except KeyboardInterrupt:
        screen.line(f"stopped; {_what_is_kept(folder)}")
        return wishes.status
    except RunFailed as error:
        raise type(error)(
            "; ".join(filter(None, (str(error), _what_is_kept(folder, closely=True))))
        ) from error.__cause__
    except OSError as error:
        raise RunFailed(f"{folder}: cannot be read or written: {error}; {_what_is_kept(folder)}") from None
    finally:
        if recorder:
            recorder.close()
        owned.release()


def _finish(plan: Plan, recorder: Recorder, folder: Folder) -> dict[str, Any]:
    """Lets the model speak, draws the curve, and writes the result, which marks the run as finished."""
    assert recorder.finished
    done = recorder.finished
    found, restored = runs.open_checkpoint((recorder.checkpoints / done.checkpoint).address)
    text = sample(restored, plan.config)
    folder.write("sample.txt", (text + "\n").encode())
    folder.write("perplexity.png", report.curve(recorder.rows(), plan.config.run.name))
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
        "checkpoint": f"checkpoints/{found.name}",
        "weights_sha256": checkpoint.weights_sha256(restored.weights),
        "generated": text,
        "corpus": plan.corpus,
    }
    folder.write(RESULT, json.dumps(result, indent=1, ensure_ascii=False).encode())
    return result


def sample(restored: checkpoint.Restored, options: Config) -> str:
    """The prefix and its continuation by a checkpoint's model."""
    prefix = generate.prefix_ids(options.generate.prefix, restored.config.corpus.cleaning, restored.vocabulary)
    net = load_model(restored)
    continued = generate.continuation(net, prefix, options.generate, options.run.seed)
    return generate.text_of(restored.vocabulary, prefix, continued)


def load_model(restored: checkpoint.Restored) -> model.LanguageModel:
    """A checkpoint's model, on the CPU, in the precision of its weights."""
    net = model.build(restored.config.model, len(restored.vocabulary), restored.config.run.seed)
    net = net.to(next(weight.dtype for weight in restored.weights.values() if weight.is_floating_point()))
    model.load_weights(net, restored.weights, "checkpoint")
    return net


def _about(plan: Plan, asked: str) -> str:
    facts, options = plan.corpus, plan.config
    source = facts["source"]
    if source == "embedded" and asked == "auto":
        source = "the text embedded in Python (The Time Machine is neither cached nor to be had within seconds)"
    unit = "bytes" if options.vocabulary.kind == "byte" else "characters"
    return (
        f"run {options.run.name}: {source}, {facts['characters']:,} {unit}, "
        f"{facts['tokens']:,} tokens of {len(plan.vocabulary):,} kinds"
    )


def _what_is_kept(folder: Folder, closely: bool = False) -> str:
    """The last checkpoint, by its manifest, or by every byte; empty where all are damaged."""
    place = folder / "checkpoints"
    damaged: tuple[str, ...] = ()
    try:
        entries = [entry for entry in checkpoint.committed(place) if not isinstance(entry, str)]
        found = entries[-1] if entries else None
        if closely:
            found, damaged = latest_sound(place)
    except (OSError, UserError) as error:
        return f"the checkpoints cannot be read now: {error}"
    if not found:
        return "" if damaged else "no checkpoint was written yet: the same command starts anew"
    return (
        f"step {found.step:,} is kept: the same command with --run.name {folder.name} "
        f"goes on, {python()} -m job generate {folder.typed} lets it speak"
    )


def python() -> str:
    """This Python, as one would type it here."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(sys.executable).relative_to(Path.cwd()))
    return "python"


def _show(result: dict[str, Any], folder: Folder, screen: Screen) -> None:
    workers = f"{result['workers']} worker{'s' * (result['workers'] != 1)}"
    screen.line(
        f"perplexity {result['perplexity']:.4g} after {result['epochs']} epochs, {result['steps']:,} steps, "
        f"{duration(result['seconds'])} on {workers}"
    )
    if "validation_perplexity" in result:
        screen.line(
            f"validation {result['validation_perplexity']:.4g}, at best {result['best_validation_perplexity']:.4g} "
            f"in {folder / result['best_checkpoint']}"
        )
    screen.line()
    screen.line(f"    {result['generated']}")
    screen.line()
    for name, file in (("curve", "perplexity.png"), ("metrics", "metrics.jsonl"), ("checkpoint", result["checkpoint"])):
        screen.line(f"{name:<11}{folder / file}")
    screen.line(f"{'continue':<11}{python()} -m job generate {folder.typed} --generate.prefix '…'")
