"""Sections of the configuration: frozen dataclasses whose values are converted and checked when they are made."""

import difflib
from collections.abc import Iterable
from dataclasses import Field, dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar

from job.config.field import FREE, ConfigField, format_name, format_value
from job.errors import UserError
from job.paths import escape_dollars


def unknown_name(noun: str, name: str, names: Iterable[str]) -> UserError:
    """Returns the error for a name that is none of ``names``; its remedy is the nearest of them."""
    (nearest,) = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)
    return UserError(f"unknown {noun} {format_name(name)}", f"did you mean {nearest}?")


@dataclass(frozen=True)
class Section:
    """A section of the configuration. ``ModelConfig`` is ``[model]``.

    Raises:
        UserError: if a value does not have the field's type, or fails its check
    """

    section_name: ClassVar[str]
    on_resume: ClassVar[str]

    def __init_subclass__(cls, on_resume: str = "fixed") -> None:
        cls.section_name = cls.__name__.removesuffix("Config").lower()
        cls.on_resume = on_resume

    def __post_init__(self) -> None:
        for option in self.config_fields().values():
            object.__setattr__(self, option.key, option.validate(getattr(self, option.key)))

    @classmethod
    @cache
    def config_fields(cls) -> dict[str, ConfigField]:
        """Returns the fields declared with ``config_field``, by full name: ``model.cell``."""
        declared = [cls._complete(option) for option in fields(cls) if option.metadata]
        return {option.name: option for option in declared}

    @classmethod
    def _complete(cls, option: Field[Any]) -> ConfigField:
        """Returns a field's declaration with its name, its type and the ``on_resume`` of its section."""
        declared: ConfigField = option.metadata["declaration"]
        name, on_resume = f"{cls.section_name}.{option.name}", declared.on_resume or cls.on_resume
        return replace(declared, name=name, type=option.type, on_resume=on_resume)

    def values(self) -> dict[str, Any]:
        """Returns the values of all fields, by full name."""
        return {name: getattr(self, option.key) for name, option in self.config_fields().items()}

    def fixed_values(self) -> dict[str, Any]:
        """Returns the values that decide the result, by full name. They cannot change freely on resume."""
        options = self.config_fields()
        return {name: value for name, value in self.values().items() if options[name].on_resume != FREE}

    def to_toml(self) -> str:
        """Returns the section as TOML."""
        lines = [f"[{self.section_name}]\n"]
        for option in self.config_fields().values():
            value = getattr(self, option.key)
            lines.append(f"{option.key} = {format_value(escape_dollars(value) if option.is_path else value)}\n")
        return "".join(lines)
