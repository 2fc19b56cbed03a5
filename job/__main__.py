"""The command line: ``python -m job VERB [CONFIG.toml | RUN] [--section.field VALUE …]``."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from job.config.schema import FIELDS, SECTIONS, format_value
from job.config.toml import (
    FILE_SECTIONS,
    ConfigValues,
    check_known_flag,
    closest,
    load_config,
    load_search_config,
    override_config,
    parse_flags,
)
from job.console import Console
from job.errors import RunFailed, UserError


@dataclass(frozen=True)
class Line:
    """A command line, taken apart."""

    target: str | None
    flags: dict[str, str]


def _train(line: Line) -> int:
    """Train a model, or go on with a run: train [CONFIG.toml] [--section.field VALUE …]"""
    from job.run.driver import Launcher, run_training

    config = load_config(line.target, line.flags)
    launch: Launcher
    if config.scale.max_workers:
        from job.cluster.launcher import launch_on_ray

        launch = launch_on_ray
    else:
        from job.run.local_launcher import launch_local

        launch = launch_local
    stem = Path(line.target).stem if line.target else "run"
    return run_training(config, stem, Console(), launch)


def _generate(line: Line) -> int:
    """Continue a prefix: generate RUN|CHECKPOINT [--generate.prefix TEXT …]"""
    from job.inference.generate import generate_text
    from job.run.run_dir import open_checkpoint

    values = _only(line, "generate", "run.seed")
    loaded = open_checkpoint(_required(line, "a run's folder or a checkpoint's"))
    print(generate_text(loaded, override_config(loaded.config, values)))
    return 0


def _evaluate(line: Line) -> int:
    """Perplexity of a text: evaluate RUN|CHECKPOINT [--corpus.source TEXT …]"""
    from job.inference.evaluate import evaluate_text
    from job.run.run_dir import open_checkpoint
    from job.training.progress import perplexity

    values = _only(line, "corpus.source", "corpus.cleaning", "corpus.max_tokens")
    if "corpus.source" in line.flags:
        values["corpus"].setdefault("max_tokens", 0)  # all of it, whatever was cut from the text that trained
    loaded = open_checkpoint(_required(line, "a run's folder or a checkpoint's"))
    corpus_config = override_config(loaded.config, values).corpus
    result = evaluate_text(loaded, corpus_config)
    unit = "byte" if loaded.vocabulary.kind == "byte" else "character"
    print(
        f"perplexity {perplexity(result.loss.nats_per_token):.6g}, {result.bits_per_character:.4f} bits per {unit}, "
        f"{result.loss.nats_per_token:.6f} nats per token over {result.loss.tokens:,} targets "
        f"(step {loaded.checkpoint.step:,}, {corpus_config.source})"
    )
    return 0


def _doctor(line: Line) -> int:
    """What would go wrong: doctor [CONFIG.toml] [--address HOST:PORT] [--section.field VALUE …]"""
    from job.cluster.doctor import run_doctor

    address = line.flags.pop("address", None)
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    return run_doctor(load_config(line.target, line.flags), Console())


def _tune(line: Line) -> int:
    """Search for the best configuration: tune CONFIG.toml with a [search] [--section.field VALUE …]"""
    from job.cluster.tune import run_search

    config, search = load_search_config(line.target, line.flags)
    return run_search(config, search, Path(line.target).stem if line.target else "search", Console())


VERBS: dict[str, Callable[[Line], int]] = {
    "train": _train,
    "tune": _tune,
    "generate": _generate,
    "evaluate": _evaluate,
    "doctor": _doctor,
}
# Flags of a verb that are no part of a configuration.
FLAGS = {"doctor": ("address",)}


def _required(line: Line, what: str) -> str:
    if line.target is None:
        raise UserError(f"{what} is missing, such as runs/seed-1")
    return line.target


def _only(line: Line, *allowed: str) -> ConfigValues:
    """The flags' values, where they are among those that the verb takes."""
    for name in line.flags:
        if name in FIELDS and name not in allowed and name.split(".")[0] not in allowed:
            raise UserError(f"--{name}: is of the checkpoint and cannot be changed here; {', '.join(allowed)} can")
    return parse_flags(line.flags)


def _split(verb: str, words: Sequence[str]) -> Line:
    """``[TARGET] [--name VALUE | --name=VALUE …]``."""
    target: str | None = None
    flags: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            if target is not None:
                raise UserError(f"{word}: one configuration or folder is enough, and {target} was given")
            target = word
            continue
        name, has_value, value = word[2:].partition("=")
        if name not in FLAGS.get(verb, ()):
            check_known_flag(name, searched=verb == "tune")
        if not has_value:
            try:
                value = next(rest)
            except StopIteration:
                raise UserError(f"--{name}: a value is missing") from None
        flags[name] = value
    return Line(target, flags)


def _help(verb: str | None) -> str:
    verbs = {verb: VERBS[verb]} if verb else VERBS
    lines = ["python -m job VERB …", ""]
    lines += [f"  {name:<10}{action.__doc__}" for name, action in verbs.items()]
    shown = {"generate": ("generate",), "evaluate": ("corpus",), "tune": ("search", *SECTIONS)}
    for section in shown.get(verb or "", tuple(SECTIONS)):
        kind = FILE_SECTIONS[section]
        lines += ["", f"[{section}] {kind.__doc__}"]
        for option in fields(kind):
            if option.name == "space":
                continue
            default = format_value(option.default)
            lines.append(f"  --{section}.{option.name:<20} {option.metadata['meaning']} ({default})")
    lines += ["", "  --debug                        show where an error came from"]
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """Runs a command line; the exit status."""
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(None))
        return 0 if words else 2
    verb, *rest = words
    if verb not in VERBS:
        raise UserError(f"{verb}: unknown verb{closest(verb, list(VERBS))}")
    if "-h" in rest or "--help" in rest:
        print(_help(verb))
        return 0
    return VERBS[verb](_split(verb, rest))


def command() -> int:
    """The whole command line, with one plain line for any error; the exit status."""
    debug = "--debug" in sys.argv
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed by whoever started it
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is a run that could save
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        status = _told(error, 2, debug)
    except RunFailed as error:
        status = _told(error, 1, debug)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 1
    except Exception as error:
        status = _told(
            error if debug else RuntimeError(f"{type(error).__name__}: {error} (--debug shows where)"), 1, debug
        )
    return status


def _told(error: Exception, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
        return status
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    STATUS = command()
    # Threads of Ray may still wait for a cluster that is gone; an orderly end would wait for them.
    os._exit(STATUS)
