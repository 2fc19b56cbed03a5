"""Runs that exist: which one is meant, and what it holds."""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.config.schema import Config, config_differences
from job.config.toml import config_from_toml
from job.errors import UserError
from job.run.recorder import RESULT_FILE
from job.storage import Folder, expand_env, is_uri
from job.training.checkpoint import (
    MANIFEST,
    CorruptCheckpoint,
    LoadedCheckpoint,
    find_latest_valid,
    list_checkpoints,
    read_manifest,
    read_progress,
    verify_checkpoint,
)
from job.training.loop import is_done
from job.training.progress import Progress

CONFIG_FILE = "config.toml"
SEARCH_FILE = "search.toml"  # of a search: its configuration, as it was resolved
_MAX_FILE_BYTES = 1 << 20  # bytes of a result or a configuration


@dataclass(frozen=True)
class ExistingRun:
    """What an earlier start of a run left."""

    config: Config
    result: dict[str, Any] | None

    def is_finished(self, config: Config) -> bool:
        """Whether it has already done all that the configuration asks for."""
        if self.result is None:
            return False
        done = Progress(epoch=self.result["epochs"], step=self.result["steps"])
        return is_done(done, config.train)


def resolve_run(config: Config, stem: str) -> tuple[Folder, Config, ExistingRun | None]:
    """The run's folder, its configuration, and what is there already.

    What an earlier start resolved (``corpus.source = auto``) stays resolved. UserError where the
    name is taken by another configuration, or ``run.resume`` does not allow what is found.
    """
    check_storage_outlives_job(config.run.storage)
    storage = Folder.resolve(config.run.storage)
    name = config.run.name or _default_name(storage, config, stem)
    config = replace(config, run=replace(config.run, name=name))
    folder = storage / name
    if folder.has(SEARCH_FILE):
        raise UserError(f"{folder}: is a search and not a run", "choose another run.name")
    previous = read_existing_run(folder)
    check_resume(config.run.resume, folder, "run", exists=previous is not None)
    if previous is None:
        return folder, config, None
    config = with_resolved_corpus(config, previous.config)
    check_config_unchanged(folder, config)
    return folder, config, previous


def check_resume(resume: str, folder: Folder, kind: str, *, exists: bool) -> None:
    """Raises UserError if ``run.resume`` does not allow a new run or search, or an existing one to be resumed."""
    if resume == "must" and not exists:
        raise UserError(f"run.resume = must: there is no {kind} at {folder} to resume")
    if resume == "never" and exists:
        raise UserError(f"run.resume = never: {folder} exists", "choose another run.name or remove it")


def check_config_unchanged(folder: Folder, config: Config) -> None:
    """UserError where another run has come to be in the folder."""
    found = read_existing_run(folder)
    differing = config_differences(found.config, config) if found else []
    if differing:
        raise UserError(
            f"{folder}: exists with another configuration: {', '.join(differing)}", "choose another run.name"
        )


def check_storage_outlives_job(storage: str) -> None:
    """UserError for a relative path inside ``ray job submit``, whose working directory goes with it."""
    place = expand_env(storage)
    if not is_uri(place) and not Path(place).is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(
            f"run.storage = {storage}: lies in this job's session folder and would be lost with it",
            "give an absolute path that all nodes see, or an object store",
        )


def read_existing_run(folder: Folder) -> ExistingRun | None:
    """The run in a folder, or None if there is none. Raises UserError if its configuration cannot be read."""
    text = read_config_text(folder, CONFIG_FILE)
    if text is None:
        return None
    return ExistingRun(config_from_toml(text, f"{folder}/{CONFIG_FILE}"), read_result(folder))


def read_config_text(folder: Folder, name: str) -> str | None:
    """The text of a stored configuration, or None if the file does not exist."""
    try:
        return folder.read(name, _MAX_FILE_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/{name}: cannot be read: {error}") from None


def read_result(folder: Folder) -> dict[str, Any] | None:
    """A finished run's result."""
    try:
        found = json.loads(folder.read(RESULT_FILE, _MAX_FILE_BYTES))
        return found if type(found["epochs"]) is int and type(found["steps"]) is int else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def slugify(stem: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "run"


def _default_name(storage: Folder, config: Config, stem: str) -> str:
    """The stem and a number: the last one if it can go on with this configuration, else the next."""
    stem = slugify(stem)
    try:
        names = storage.names()
    except OSError as error:
        raise UserError(f"run.storage = {storage}: cannot be read: {error}") from None
    taken = [int(m[1]) for m in (re.fullmatch(rf"{re.escape(stem)}-(\d+)", name) for name in names) if m]
    last = max(taken, default=0)
    if last and config.run.resume != "never":
        previous = read_existing_run(storage / f"{stem}-{last}")
        if previous and not previous.is_finished(config):
            same = not config_differences(previous.config, with_resolved_corpus(config, previous.config))
            if same:
                return f"{stem}-{last}"
    return f"{stem}-{last + 1}"


def with_resolved_corpus(config: Config, earlier: Config) -> Config:
    """The configuration with what is ``auto`` of the corpus as it was resolved before."""
    corpus = config.corpus
    if corpus.source == "auto":
        corpus = replace(corpus, source=earlier.corpus.source)
    if corpus.cleaning == "auto" and corpus.source == earlier.corpus.source:
        corpus = replace(corpus, cleaning=earlier.corpus.cleaning)
    return replace(config, corpus=corpus)


def check_same_text(checkpoints: Folder, corpus: dict[str, Any]) -> None:
    """UserError where the run with these checkpoints began on another text."""
    valid, _ = list_checkpoints(checkpoints)
    for checkpoint in reversed(valid):
        try:
            _, metadata = read_progress(checkpoint)
            before = metadata["corpus"]
        except (CorruptCheckpoint, LookupError):
            continue
        if before["sha256"] != corpus["sha256"]:
            raise UserError(
                f"corpus.source = {corpus['source']}: the text is not the one this run began with "
                f"({before['tokens']:,} tokens then, {corpus['tokens']:,} now, or others): "
                "bring it back or choose another run.name"
            )
        return


def open_checkpoint(address: str) -> LoadedCheckpoint:
    """Loads the checkpoint in a folder, or the last valid one of the run in it; raises UserError if there is none."""
    folder = Folder.resolve(address)
    try:
        if folder.has(MANIFEST):
            return verify_checkpoint(read_manifest(folder.parent, folder.name))
        loaded, corrupt = find_latest_valid(folder / "checkpoints")
        if corrupt and not loaded:
            raise corrupt[0]
    except CorruptCheckpoint as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error}") from None
    if not loaded:
        raise UserError(f"{folder}: neither a run with a checkpoint nor a checkpoint")
    return loaded
