"""A run's folder: which run a configuration means, and what the folder contains."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from job.config.compatibility import config_differences
from job.config.config_file import read_config
from job.config.schema import Config
from job.data.dataset import Dataset
from job.documents import parse_record
from job.errors import UserError, report_os_error
from job.paths import is_uri
from job.storage import Folder
from job.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    LoadedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    read_manifest,
    read_progress,
    read_vocabulary,
)
from job.training.decisions import Decisions
from job.training.loop import has_done_all, is_done
from job.training.progress import Progress

Result = TypeVar("Result")

RESULT_FILE = "result.json"  # its presence marks a run as finished
SEARCH_FILE = "search.toml"  # the resolved configuration of a search
_MAX_FILE_BYTES = 1 << 20  # of a result
_RESULT_TYPES: dict[str, Any] = {
    **dict.fromkeys(("epochs", "steps", "workers"), int),
    **dict.fromkeys(("perplexity", "seconds"), float),
    **dict.fromkeys(("generated", "checkpoint"), str),
    **dict.fromkeys(("validation_perplexity", "best_validation_perplexity"), (float, NoneType)),
    **dict.fromkeys(("unknown_share", "validation_unknown_share"), (float, NoneType)),
    **dict.fromkeys((f"validation_bits_per_{unit}" for unit in ("character", "byte", "word")), (float, NoneType)),
    "best_checkpoint": (str, NoneType),
    "validations_without_improvement": (int, NoneType),
}
_VALIDATION_FIELDS = {"validation_perplexity", "best_validation_perplexity", "best_checkpoint"}  # all or none


@dataclass(frozen=True)
class ExistingRun:
    """A run that an earlier command has started."""

    config: Config
    result: dict[str, Any] | None  # None until the run is finished

    def is_finished(self, config: Config) -> bool:
        """Whether the run has done all the epochs and steps that a configuration requires."""
        result = self.result
        return bool(result and is_done(_progress_of(result), config.train))

    def limit_reached(self, config: Config) -> str:
        """Returns the field that must be raised to train a finished run longer."""
        assert self.result
        if not has_done_all(_progress_of(self.result), config.train):
            return "train.patience"
        return "train.epochs" if self.result["epochs"] >= config.train.epochs else "train.max_steps"

    def can_resume(self, config: Config) -> bool:
        """Whether the run is unfinished and a configuration may continue it."""
        same = not config_differences(self.config, with_resolved_fields(config, self.config))
        same = same and config.run.resume_from == self.config.run.resume_from
        return same and not self.is_finished(config)


def _progress_of(result: dict[str, Any]) -> Progress:
    """Returns of the progress at the end of a finished run what decides whether it is done."""
    decisions = Decisions(stale=result.get("validations_without_improvement", 0))
    return Progress(epoch=result["epochs"], step=result["steps"], decisions=decisions)


def resolve_run(config: Config, default_name: str, *, retry: bool = False) -> tuple[Folder, Config, ExistingRun | None]:
    """Finds the run that a configuration means: an existing one to resume, or a new one.

    Args:
        config: as the user gave it
        default_name: the name, without its number, of a run whose ``run.name`` is empty
        retry: retry failed requests to an object store

    Returns:
        the run's folder; the configuration with the run's name and, if the run exists, with what it resolved then;
        and the existing run or None

    Raises:
        UserError: the run exists with another configuration, or ``run.resume`` forbids to resume or to start it
    """
    storage = replace(resolve_storage(config.run.storage), retry=retry)
    if config.run.name:
        name, existing = config.run.name, read_existing_run(storage / config.run.name)
    else:
        name, existing = _last_or_next_run(storage, config, slugify(default_name))
    config = replace(config, run=replace(config.run, name=name))
    folder = storage / name
    if folder.has(SEARCH_FILE):
        raise UserError(f"{folder}: is a search and not a run", "choose another run.name")
    if config.run.resume_from and folder.contains(Folder.resolve(config.run.resume_from)):
        raise UserError(f"run.resume_from = {config.run.resume_from}: is this run itself", "choose another run.name")
    check_resume(config.run.resume, folder, "run", exists=existing is not None)
    if existing:
        config = with_resolved_fields(config, existing.config)
        check_same_config(folder, existing, config)
    return folder, config, existing


def _last_or_next_run(storage: Folder, config: Config, stem: str) -> tuple[str, ExistingRun | None]:
    """The last of the runs ``stem-1``, ``stem-2``, … if this configuration can resume it, otherwise the next one."""
    with report_os_error(f"run.storage = {storage}: cannot be read"):
        names = storage.names()
    numbers = [int(m[1]) for m in (re.fullmatch(rf"{re.escape(stem)}-(\d+)", name) for name in names) if m]
    last = max(numbers, default=0)
    if last and config.run.resume != "never":
        existing = read_existing_run(storage / f"{stem}-{last}")
        if existing and existing.can_resume(config):
            return f"{stem}-{last}", existing
    return f"{stem}-{last + 1}", None


def check_resume(resume: str, folder: Folder, kind: str, *, exists: bool) -> None:
    """Raises UserError if ``run.resume`` does not allow a new run or search, or an existing one to be resumed."""
    if resume == "must" and not exists:
        raise UserError(f"run.resume = must: there is no {kind} at {folder} to resume")
    if resume == "never" and exists:
        raise UserError(f"run.resume = never: {folder} exists", "choose another run.name or remove it")


def check_same_config(folder: Folder, existing: ExistingRun | None, config: Config) -> None:
    """Raises UserError if a configuration does not match that of the existing run in the folder."""
    if existing and (differences := config_differences(existing.config, config)):
        raise UserError(
            f"{folder}: exists with another configuration: {', '.join(differences)}", "choose another run.name"
        )


def resolve_storage(storage: str) -> Folder:
    """Returns the folder that contains runs.

    Raises UserError for HDFS, where a reader may see a file before it is complete, and for a relative path inside
    ``ray job submit``, whose working directory is temporary.
    """
    if re.match("(hdfs|viewfs)://", storage):
        raise UserError(f"run.storage = {storage}: HDFS has no atomic writes", "give a mounted folder, s3:// or gs://")
    if not is_uri(storage) and not Path(storage).is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(
            f"run.storage = {storage}: is in this job's session folder and would be lost with it",
            "give an absolute path that all nodes see, or an object store",
        )
    return Folder.resolve(storage)


def read_existing_run(folder: Folder) -> ExistingRun | None:
    """The run in a folder, or None if there is none. Raises UserError if its configuration cannot be read."""
    config = read_config(folder)
    return ExistingRun(config, read_result(folder)) if config else None


def read_result(folder: Folder) -> dict[str, Any] | None:
    """Reads the result of a finished run. Returns None if there is none or it is damaged."""
    try:
        record = parse_record(folder.read(RESULT_FILE, _MAX_FILE_BYTES), _RESULT_TYPES)
    except (OSError, ValueError):
        return None
    result = {name: value for name, value in record.items() if value is not None}
    is_valid = math.isfinite(result["seconds"]) and len(_VALIDATION_FIELDS & result.keys()) in (0, 3)
    return result if is_valid else None


def slugify(name: str) -> str:
    """Returns a name that is safe for a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "run"


def with_resolved_fields(config: Config, old_config: Config) -> Config:
    """Replaces ``auto`` in the corpus section, and an empty ``run.resume_from``, by what they were before."""
    fields = ("source", "cleaning")  # cleaning of another source too, so that only the source is reported as changed
    resolved = {name: getattr(old_config.corpus, name) for name in fields if getattr(config.corpus, name) == "auto"}
    run = replace(config.run, resume_from=config.run.resume_from or old_config.run.resume_from)
    return replace(config, run=run, corpus=replace(config.corpus, **resolved))


def check_same_text(checkpoints: list[Checkpoint], dataset: Dataset) -> None:
    """Raises UserError if the run that wrote these checkpoints was started on another text."""
    for checkpoint in reversed(checkpoints):
        try:
            corpus, vocabulary = read_progress(checkpoint)[1]["corpus"], read_vocabulary(checkpoint)
            old_texts = _texts(corpus)
        except (LookupError, TypeError, ValueError, AttributeError):  # it is damaged, or of an early version
            continue
        for field, (source, tokens, sha256) in _texts(dataset.metadata).items():
            _, old_tokens, old_sha256 = old_texts.get(field, (source, tokens, sha256))
            if (old_sha256, vocabulary) != (sha256, dataset.vocabulary):
                difference = "as many, but others, now" if old_tokens == tokens else f"{tokens} now"
                raise UserError(
                    f"{field} = {source}: is not the text that this run was started with "
                    f"({old_tokens} tokens then, {difference})",
                    "restore the text or choose another run.name",
                )
        return


def _texts(metadata: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Returns the source, number of tokens and digest of each text of a dataset, by the field that names it."""
    parts = {"corpus.source": metadata}
    if "validation" in metadata:
        parts["corpus.validation_source"] = metadata["validation"]
    return {field: (part["source"], f"{part['tokens']:,}", part["sha256"]) for field, part in parts.items()}


def open_checkpoint(folder: Folder) -> LoadedCheckpoint:
    """Loads what generation and evaluation need of a checkpoint, and verifies that; as ``find_checkpoint``."""
    return find_checkpoint(folder, load_checkpoint)


def find_checkpoint(folder: Folder, load: Callable[[Checkpoint], Result]) -> Result:
    """Loads a checkpoint.

    Args:
        folder: a checkpoint's folder, or a run's, whose last valid checkpoint is loaded
        load: returns its content; raises CorruptCheckpoint if that is not valid

    Raises:
        UserError: there is no valid checkpoint, or it cannot be read
    """
    try:
        if folder.has(MANIFEST):
            return load(read_manifest(folder.parent, folder.name))
        loaded, corrupt = load_latest(*list_checkpoints(folder / "checkpoints"), load)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error}") from None
    if not loaded:
        raise UserError(str(corrupt[0]) if corrupt else f"{folder}: neither a run with a checkpoint nor a checkpoint")
    return loaded
