"""TOML and flags to a configuration, and back."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from job import search
from job.config import OPTIONS, SECTIONS, Config, Section, shown
from job.errors import UserError
from job.search import Search
from job.storage import Folder, is_address

Values = dict[str, dict[str, Any]]
SECTIONS_OF_FILES: dict[str, type[Section]] = {**SECTIONS, "search": Search}
_OPTIONS = [*OPTIONS, *search.NAMES]


def _parsed(text: str, hint: Any) -> Any:
    """A flag's text as the value it would be in a TOML file; bare words are text."""
    if hint is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # no TOML, or more digits than Python reads
        return text


def nearest(name: str, known: Sequence[str]) -> str:
    """What the user may have meant, as the end of an error line."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {found[0]}?" if found else ""


def _unknown_section(name: str, where: str) -> UserError:
    return UserError(f"{where}: unknown section [{name}]{nearest(name, list(SECTIONS_OF_FILES))}")


def _unknown_option(name: str, where: str) -> UserError:
    section, _, option = name.partition(".")
    known = _OPTIONS
    if section in SECTIONS_OF_FILES:
        known = [key for key in _OPTIONS if key.startswith(section + ".")]
    by_option = [key for key in _OPTIONS if key.endswith("." + (option or section))]
    close = by_option[0] if by_option else nearest(name, known).removeprefix("; did you mean ")[:-1]
    return UserError(f"{where}: unknown option {name}; did you mean {close}?")


def read_toml(text: str, where: str) -> Values:
    """Sections of a TOML text, every key known; ``where`` names the place in errors."""
    try:
        document = tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not TOML: {error}") from None
    for name, section in document.items():
        if name not in SECTIONS_OF_FILES:
            raise _unknown_section(name, where)
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} must be a section, written [{name}]")
        for key in section:
            if f"{name}.{key}" not in (*_OPTIONS, "search.space"):
                raise _unknown_option(f"{name}.{key}", where)
    return document


def check_known(name: str, searched: bool) -> None:
    """UserError where no flag has that name; those of the search are only ``searched`` ones."""
    if name not in _OPTIONS:
        raise _unknown_option(name, f"--{name}")
    if name not in OPTIONS and not searched:
        raise UserError(f"--{name}: is for tune alone")


def read_flags(flags: Mapping[str, str]) -> Values:
    """``{"section.field": text}`` of the command line as sections."""
    values: Values = {}
    for name, text in flags.items():
        if name not in _OPTIONS:
            raise _unknown_option(name, f"--{name}")
        section, key = name.split(".")
        hint = next(option.type for option in fields(SECTIONS_OF_FILES[section]) if option.name == key)
        values.setdefault(section, {})[key] = _parsed(text, hint)
    return values


def override(config: Config, values: Values) -> Config:
    """The configuration with some values replaced."""
    sections = {name: replace(getattr(config, name), **section) for name, section in values.items()}
    return replace(config, **sections)


def load(path: str | None, flags: Mapping[str, str]) -> Config:
    """A configuration from a file (None: the defaults) and flags, which have the last word."""
    return load_search(path, flags)[0]


def load_search(path: str | None, flags: Mapping[str, str]) -> tuple[Config, Search]:
    """The configuration, and the search that the same file and flags may tell of."""
    values: Values = {}
    if path is not None:
        values = read_toml(_read_text(path), path)
        _made(values, path)
    from_flags = read_flags(flags)
    _made(from_flags, "command line")
    merged = {name: {**values.get(name, {}), **from_flags.get(name, {})} for name in SECTIONS_OF_FILES}
    options = merged.pop("search")
    return override(Config(), merged), Search(**options)


def _made(values: Values, where: str) -> None:
    """Makes each section by itself, so that an error names the file or line it came from."""
    for name, section in values.items():
        try:
            SECTIONS_OF_FILES[name](**section)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _read_text(path: str) -> str:
    try:
        if is_address(path):  # such as a search's best.toml on an object store
            file = Folder.at(path)
            return file.parent.read(file.name).decode()
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
    return search_from_toml(text, where)[0]


def search_from_toml(text: str, where: str) -> tuple[Config, Search]:
    """A configuration and a search from the text that ``to_toml`` and ``search.to_toml`` wrote."""
    try:
        values = read_toml(text, where)
        options = values.pop("search", {})
        return override(Config(), values), Search(**options)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where not in str(error) else str(error)) from None
