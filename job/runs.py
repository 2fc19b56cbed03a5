"""Runs that exist: which one is meant, and what it holds."""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job import checkpoint, config, parse
from job.checkpoint import Checkpoint, Restored, Unsound
from job.config import Config
from job.errors import UserError
from job.loop import Progress, is_done
from job.record import RESULT
from job.storage import Folder, is_address, written_out
from job.trainer import latest_sound

CONFIG = "config.toml"
SEARCH = "search.toml"  # of a search: its configuration, as it was resolved
_LARGEST = 1 << 20  # bytes of a result or a configuration


@dataclass(frozen=True)
class Previous:
    """What an earlier start of a run left."""

    config: Config
    result: dict[str, Any] | None

    def is_finished(self, options: Config) -> bool:
        """Whether it has already done all that the configuration asks for."""
        if self.result is None:
            return False
        done = Progress(epoch=self.result["epochs"], step=self.result["steps"])
        return is_done(done, options.train)


def choose(options: Config, stem: str) -> tuple[Folder, Config, Previous | None]:
    """The run's folder, its configuration, and what is there already.

    What an earlier start resolved (``corpus.source = auto``) stays resolved. UserError where the
    name is taken by another configuration, or ``run.resume`` does not allow what is found.
    """
    refuse_storage_that_a_job_loses(options.run.storage)
    storage = Folder.at(options.run.storage)
    name = options.run.name or _default_name(storage, options, stem)
    options = replace(options, run=replace(options.run, name=name))
    folder = storage / name
    if folder.has(SEARCH):
        raise UserError(f"{folder}: is a search and not a run; choose another run.name")
    previous = read(folder)
    if previous is None:
        if options.run.resume == "must":
            raise UserError(f"run.resume = must: there is no run at {folder} to go on with")
        return folder, options, None
    if options.run.resume == "never":
        raise UserError(f"run.resume = never: {folder} exists; choose another run.name or remove it")
    options = as_resolved(options, previous.config)
    refuse_if_changed(folder, options)
    return folder, options, previous


def refuse_if_changed(folder: Folder, options: Config) -> None:
    """UserError where another run has come to be in the folder."""
    found = read(folder)
    differing = config.differences(found.config, options) if found else []
    if differing:
        raise UserError(f"{folder}: exists with another configuration: {', '.join(differing)}; choose another run.name")


def refuse_storage_that_a_job_loses(storage: str) -> None:
    """UserError for a relative path inside ``ray job submit``, whose working directory goes with it."""
    place = written_out(storage)
    if not is_address(place) and not Path(place).is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(
            f"run.storage = {storage}: lies in this job's session folder and would be lost with it; "
            "give an absolute path that all nodes see, or an object store"
        )


def read(folder: Folder) -> Previous | None:
    """What is known of the run in a folder; None where there is none."""
    try:
        text = folder.read(CONFIG, _LARGEST).decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{CONFIG}: cannot be read: {error}") from None
    return Previous(parse.from_toml(text, f"{folder}/{CONFIG}"), read_result(folder))


def read_result(folder: Folder) -> dict[str, Any] | None:
    """A finished run's result."""
    try:
        found = json.loads(folder.read(RESULT, _LARGEST))
        return found if type(found["epochs"]) is int and type(found["steps"]) is int else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def plain(stem: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"


def _default_name(storage: Folder, options: Config, stem: str) -> str:
    """The stem and a number: the last one if it can go on with this configuration, else the next."""
    stem = plain(stem)
    try:
        names = storage.names()
    except OSError as error:
        raise UserError(f"run.storage = {storage}: cannot be read: {error}") from None
    taken = [int(m[1]) for m in (re.fullmatch(rf"{re.escape(stem)}-(\d+)", name) for name in names) if m]
    last = max(taken, default=0)
    if last and options.run.resume != "never":
        previous = read(storage / f"{stem}-{last}")
        if previous and not previous.is_finished(options):
            same = not config.differences(previous.config, as_resolved(options, previous.config))
            if same:
                return f"{stem}-{last}"
    return f"{stem}-{last + 1}"


def as_resolved(options: Config, earlier: Config) -> Config:
    """The configuration with what is ``auto`` of the corpus as it was resolved before."""
    corpus = options.corpus
    if corpus.source == "auto":
        corpus = replace(corpus, source=earlier.corpus.source)
    if corpus.cleaning == "auto" and corpus.source == earlier.corpus.source:
        corpus = replace(corpus, cleaning=earlier.corpus.cleaning)
    return replace(options, corpus=corpus)


def check_same_text(checkpoints: Folder, corpus: dict[str, Any]) -> None:
    """UserError where the run with these checkpoints began on another text."""
    for found in reversed(checkpoint.committed(checkpoints)):
        if isinstance(found, str):
            continue
        try:
            before = checkpoint.restore(found).facts["corpus"]
        except (Unsound, LookupError):
            continue
        if before["sha256"] != corpus["sha256"]:
            raise UserError(
                f"corpus.source = {corpus['source']}: the text is not the one this run began with "
                f"({before['tokens']:,} tokens then, {corpus['tokens']:,} now, or others): "
                "bring it back or choose another run.name"
            )
        return


def open_checkpoint(address: str) -> tuple[Checkpoint, Restored]:
    """The checkpoint in a folder, or the last sound one of the run in it; UserError where there is none."""
    folder = Folder.at(address)
    try:
        if folder.has(checkpoint.MANIFEST):
            found: Checkpoint | None = checkpoint.read_manifest(folder.parent, folder.name)
            problems: tuple[str, ...] = ()
        else:
            found, problems = latest_sound(folder / "checkpoints")
        if found is None:
            raise UserError(problems[0] if problems else f"{folder}: neither a run with a checkpoint nor a checkpoint")
        return found, checkpoint.verify(found)
    except Unsound as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error}") from None
