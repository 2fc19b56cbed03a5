"""TOML and flags to a configuration, and back."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from job.config.schema import FIELDS, SECTIONS, Config, Section, format_value
from job.config.search_space import SEARCH_FIELDS, SearchConfig
from job.errors import UserError
from job.storage import Folder, is_uri

ConfigValues = dict[str, dict[str, Any]]
FILE_SECTIONS: dict[str, type[Section]] = {**SECTIONS, "search": SearchConfig}
_FILE_FIELDS = [*FIELDS, *SEARCH_FIELDS]


def _parsed(text: str, hint: Any) -> Any:
    """A flag's text as the value it would be in a TOML file; bare words are text."""
    if hint is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # no TOML, or more digits than Python reads
        return text


def closest(name: str, known: Sequence[str]) -> str:
    """What the user may have meant, as the end of an error line."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {found[0]}?" if found else ""


def _unknown_section(name: str, where: str) -> UserError:
    return UserError(f"{where}: unknown section [{name}]{closest(name, list(FILE_SECTIONS))}")


def _unknown_field(name: str, where: str) -> UserError:
    section, _, option = name.partition(".")
    known = _FILE_FIELDS
    if section in FILE_SECTIONS:
        known = [key for key in _FILE_FIELDS if key.startswith(section + ".")]
    by_option = [key for key in _FILE_FIELDS if key.endswith("." + (option or section))]
    close = by_option[0] if by_option else closest(name, known).removeprefix("; did you mean ")[:-1]
    return UserError(f"{where}: unknown option {name}; did you mean {close}?")


def parse_toml(text: str, where: str) -> ConfigValues:
    """Sections of a TOML text, every key known; ``where`` names the place in errors."""
    try:
        document = tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not TOML: {error}") from None
    for name, section in document.items():
        if name not in FILE_SECTIONS:
            raise _unknown_section(name, where)
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} must be a section, written [{name}]")
        for key in section:
            if f"{name}.{key}" not in (*_FILE_FIELDS, "search.space"):
                raise _unknown_field(f"{name}.{key}", where)
    return document


def check_known_flag(name: str, searched: bool) -> None:
    """UserError where no flag has that name; those of the search are only ``searched`` ones."""
    if name not in _FILE_FIELDS:
        raise _unknown_field(name, f"--{name}")
    if name not in FIELDS and not searched:
        raise UserError(f"--{name}: is for tune alone")


def parse_flags(flags: Mapping[str, str]) -> ConfigValues:
    """``{"section.field": text}`` of the command line as sections."""
    values: ConfigValues = {}
    for name, text in flags.items():
        if name not in _FILE_FIELDS:
            raise _unknown_field(name, f"--{name}")
        section, key = name.split(".")
        hint = next(option.type for option in fields(FILE_SECTIONS[section]) if option.name == key)
        values.setdefault(section, {})[key] = _parsed(text, hint)
    return values


def override_config(config: Config, values: ConfigValues) -> Config:
    """The configuration with some values replaced."""
    sections = {name: replace(getattr(config, name), **section) for name, section in values.items()}
    return replace(config, **sections)


def load_config(path: str | None, flags: Mapping[str, str]) -> Config:
    """A configuration from a file (None: the defaults) and flags, which have the last word."""
    return load_search_config(path, flags)[0]


def load_search_config(path: str | None, flags: Mapping[str, str]) -> tuple[Config, SearchConfig]:
    """The configuration, and the search that the same file and flags may tell of."""
    values: ConfigValues = {}
    if path is not None:
        values = parse_toml(_read_text(path), path)
        _made(values, path)
    from_flags = parse_flags(flags)
    _made(from_flags, "command line")
    merged = {name: {**values.get(name, {}), **from_flags.get(name, {})} for name in FILE_SECTIONS}
    options = merged.pop("search")
    return override_config(Config(), merged), SearchConfig(**options)


def _made(values: ConfigValues, where: str) -> None:
    """Makes each section by itself, so that an error names the file or line it came from."""
    for name, section in values.items():
        try:
            FILE_SECTIONS[name](**section)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _read_text(path: str) -> str:
    try:
        if is_uri(path):  # such as a search's best.toml on an object store
            file = Folder.resolve(path)
            return file.parent.read(file.name).decode()
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration: {error}") from None


def config_to_toml(config: Config) -> str:
    """The configuration as TOML that ``load`` reads back to the same one."""
    lines = []
    for name, section in asdict(config).items():
        lines += [f"[{name}]", *(f"{key} = {format_value(value)}" for key, value in section.items()), ""]
    return "\n".join(lines)


def config_from_toml(text: str, where: str) -> Config:
    """A configuration from the text that ``to_toml`` wrote."""
    return search_config_from_toml(text, where)[0]


def search_config_from_toml(text: str, where: str) -> tuple[Config, SearchConfig]:
    """A configuration and a search from the text that ``to_toml`` and ``search.to_toml`` wrote."""
    try:
        values = parse_toml(text, where)
        options = values.pop("search", {})
        return override_config(Config(), values), SearchConfig(**options)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where not in str(error) else str(error)) from None
