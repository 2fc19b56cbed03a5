"""Sections of the configuration: frozen dataclasses whose values are converted and checked when they are made."""

import difflib
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, get_args

from job.errors import UserError
from job.paths import escape_dollars

Check = Callable[[Any], str | None]  # returns what is wrong with a value, None if it is valid


def at_least(low: float) -> Check:
    """Returns a check that a value is at least ``low``."""
    return lambda value: None if value >= low else f"must be at least {low}"


def between(low: float, high: float) -> Check:
    """Returns a check that a value is at least ``low`` and at most ``high``."""
    return lambda value: None if low <= value <= high else f"must be at least {low} and at most {high:,}"


def unknown_name(noun: str, name: str, names: Iterable[str]) -> UserError:
    """Returns the error for a name that is none of ``names``; its remedy is the nearest of them."""
    (nearest,) = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return UserError(f"unknown {noun} {name}", f"did you mean {nearest}?")


def format_value(value: Any) -> str:
    """Returns a value as TOML."""
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {format_value(inner)}' for key, inner in value.items())} }}"
    return repr(value)


def config_field(default: Any, meaning: str, check: Check | None = None) -> Any:
    """Returns a dataclass field of a section.

    Args:
        default: its default value
        meaning: its help text
        check: applied to the converted value
    """
    return field(default=default, metadata={"meaning": meaning, "check": check})


def path_field(default: str, meaning: str) -> Any:
    """Returns a field for a path or URI, in which ``$NAME`` and ``~`` are expanded when it is read from the user."""
    return field(default=default, metadata={"meaning": meaning, "check": _check_path, "is_path": True})


def _check_path(value: str) -> str | None:
    return "contains a NUL character" if "\0" in value else None


def choice_field(default: str, *others: str, meaning: str = "") -> Any:
    """Returns a field that has one of some values; they are its help text if there is no ``meaning``."""
    names = (default, *others)
    problem = f"must be one of {', '.join(names)}"
    meaning = meaning or f"{', '.join(names[:-1])} or {names[-1]}"
    return config_field(default, meaning, lambda value: None if value in names else problem)


@dataclass(frozen=True)
class Section:
    """A section of the configuration. ``ModelConfig`` is ``[model]``.

    Raises:
        UserError: if a value does not have the field's type, or fails its check
    """

    section_name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.section_name = cls.__name__.removesuffix("Config").lower()

    def __post_init__(self) -> None:
        for name, option in self.config_fields().items():
            value = _convert(getattr(self, option.name), option.type, name)
            object.__setattr__(self, option.name, value)
            problem = option.metadata["check"] and option.metadata["check"](value)
            if problem:
                raise UserError(f"{name} = {format_value(value)}: {problem}")

    @classmethod
    def config_fields(cls) -> dict[str, Field[Any]]:
        """Returns the fields declared with ``config_field``, by full name: ``model.cell``."""
        return {f"{cls.section_name}.{option.name}": option for option in fields(cls) if option.metadata}

    def values(self) -> dict[str, Any]:
        """Returns the fields' values, by full name."""
        return {name: getattr(self, option.name) for name, option in self.config_fields().items()}

    def to_toml(self) -> str:
        """Returns the section as TOML."""
        lines = [f"[{self.section_name}]\n"]
        for option in self.config_fields().values():
            value = getattr(self, option.name)
            text = escape_dollars(value) if option.metadata.get("is_path") else value
            lines.append(f"{option.name} = {format_value(text)}\n")
        return "".join(lines)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Returns the value as its declared type; integers convert to float, lists to tuples."""
    allowed_types = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for cls in allowed_types:
        if cls is float:
            if type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max:
                return float(value)
        elif get_args(cls):
            if isinstance(value, list | tuple) and all(type(item) is int for item in value):
                return tuple(value)
        elif type(value) is cls:
            if cls is str and re.search("[\ud800-\udfff]", value):
                raise UserError(f"{name} = {value!a}: contains bytes that are not UTF-8")
            return value
    type_names = {str: "text", int: "an integer", float: "a finite number", bool: "true or false"}
    expected = " or ".join(type_names.get(cls, "a list of integers") for cls in allowed_types)
    raise UserError(f"{name} = {format_value(value)}: must be {expected}")
