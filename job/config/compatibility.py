"""Which fields may differ when a run is resumed, or begins with a checkpoint of another run."""

from dataclasses import replace
from typing import Any

from job.config.field import format_value
from job.config.schema import FIELDS, Config


def config_differences(old: Config, new: Config) -> list[str]:
    """Returns the fields that prevent ``new`` from resuming a run of ``old``, as ``field (old → new)``."""
    new_values = new.fixed_values()
    notes = {"train.epochs": ", the schedule's length unless optimizer.schedule_steps is set"}
    return [
        f"{name} ({format_value(value)} → {format_value(new_values[name])})"
        f"{notes.get(name, '') if old.optimizer.spans_epochs else ''}"
        for name, value in old.fixed_values().items()
        if value != new_values[name] and not _is_compatible(name, old, new)
    ]


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the values, by full name, that a new run does not have from the run whose checkpoint it starts from."""
    new_values = new.fixed_values()
    return {
        name: (value, new_values[name])
        for name, value in old.fixed_values().items()
        if name != "run.resume_from" and value != new_values[name]
    }


def may_change(name: str, old: Config, new: Config) -> bool:
    """Returns whether a new run of ``new`` that starts from a checkpoint of ``old`` may have another value."""
    option = FIELDS[name]
    return option.is_free_in_new_run or option.is_mutable or _is_compatible(name, old, new)


def _is_compatible(name: str, old: Config, new: Config) -> bool:
    if name == "run.resume_from":  # not needed any more
        return not new.run.resume_from
    if name == "train.validate_every":
        return not replace(old, train=replace(old.train, validate_every=0)).validation_user
    return _only_adds_epochs(name, old, new)


def _only_adds_epochs(name: str, old: Config, new: Config) -> bool:
    if name == "stream.offset":
        offset, new_offset = old.stream.offset, new.stream.offset
        return isinstance(offset, tuple) and isinstance(new_offset, tuple) and new_offset[: len(offset)] == offset
    return name == "train.epochs" and new.train.epochs > old.train.epochs and not old.optimizer.spans_epochs
