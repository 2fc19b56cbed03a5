"""TOML and flags to a configuration, and back."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from job.config import OPTIONS, SECTIONS, Config, shown
from job.errors import UserError

Values = dict[str, dict[str, Any]]


def _parsed(text: str, hint: Any) -> Any:
    """A flag's text as the value it would be in a TOML file; bare words are text."""
    if hint is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def nearest(name: str, known: Sequence[str]) -> str:
    """What the user may have meant, as the end of an error line."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {found[0]}?" if found else ""


def _unknown_section(name: str, where: str) -> UserError:
    return UserError(f"{where}: unknown section [{name}]{nearest(name, list(SECTIONS))}")


def _unknown_option(name: str, where: str) -> UserError:
    section, _, option = name.partition(".")
    known = OPTIONS
    if section in SECTIONS:
        known = [key for key in OPTIONS if key.startswith(section + ".")]
    by_option = [key for key in OPTIONS if key.endswith("." + (option or section))]
    close = by_option[0] if by_option else nearest(name, known).removeprefix("; did you mean ")[:-1]
    return UserError(f"{where}: unknown option {name}; did you mean {close}?")


def read_toml(text: str, where: str) -> Values:
    """Sections of a TOML text, every key known; ``where`` names the place in errors."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not TOML: {error}") from None
    for name, section in document.items():
        if name not in SECTIONS:
            raise _unknown_section(name, where)
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} must be a section, written [{name}]")
        for key in section:
            if f"{name}.{key}" not in OPTIONS:
                raise _unknown_option(f"{name}.{key}", where)
    return document


def read_flags(flags: Mapping[str, str]) -> Values:
    """``{"section.field": text}`` of the command line as sections."""
    values: Values = {}
    for name, text in flags.items():
        if name not in OPTIONS:
            raise _unknown_option(name, f"--{name}")
        section, key = name.split(".")
        hint = next(option.type for option in fields(SECTIONS[section]) if option.name == key)
        values.setdefault(section, {})[key] = _parsed(text, hint)
    return values


def override(config: Config, values: Values) -> Config:
    """The configuration with some values replaced."""
    sections = {name: replace(getattr(config, name), **section) for name, section in values.items()}
    return replace(config, **sections)


def load(path: str | None, flags: Mapping[str, str]) -> Config:
    """A configuration from a file (None: the defaults) and flags, which have the last word."""
    values: Values = {}
    if path is not None:
        values = read_toml(_read_text(path), path)
        _made(values, path)
    from_flags = read_flags(flags)
    _made(from_flags, "command line")
    merged = {name: {**values.get(name, {}), **from_flags.get(name, {})} for name in SECTIONS}
    return override(Config(), merged)


def _made(values: Values, where: str) -> None:
    """Makes each section by itself, so that an error names the file or line it came from."""
    for name, section in values.items():
        try:
            SECTIONS[name](**section)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration: {error}") from None


def to_toml(config: Config) -> str:
    """The configuration as TOML that ``load`` reads back to the same one."""
    lines = []
    for name, section in asdict(config).items():
        lines += [f"[{name}]", *(f"{key} = {shown(value)}" for key, value in section.items()), ""]
    return "\n".join(lines)


def from_toml(text: str, where: str) -> Config:
    """A configuration from the text that ``to_toml`` wrote."""
    try:
        return override(Config(), read_toml(text, where))
    except UserError as error:
        raise UserError(f"{where}: {error}" if where not in str(error) else str(error)) from None
