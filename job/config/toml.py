"""TOML, command-line flags and sections given in Python to a configuration, and back."""

import codecs
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from job.config.schema import SECTIONS, Config
from job.config.search_space import SearchConfig
from job.config.section import Section, unknown_name
from job.documents import parse_toml
from job.errors import UserError, error_origin
from job.paths import check_no_credentials, expand_path, unescape_stored

ConfigValues = dict[str, Any]  # by full field name, such as model.cell
FILE_SECTIONS: dict[str, type[Section]] = {**SECTIONS, "search": SearchConfig}
FILE_FIELDS = {name: option for cls in FILE_SECTIONS.values() for name, option in cls.config_fields().items()}
PATH_FIELDS = [name for name, option in FILE_FIELDS.items() if option.is_path]


def _map_text(value: Any, function: Callable[[str, str], str], name: str) -> Any:
    """Applies a function of name and text to each text in the value of this name, which may be nested."""
    if isinstance(value, Mapping):
        return {key: _map_text(inner, function, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_map_text(inner, function, name) for inner in value]
    return function(name, value) if isinstance(value, str) else value


def expand_paths(values: ConfigValues) -> ConfigValues:
    """Returns values that a user wrote with ``$NAME`` and ``~`` expanded in paths, those in search.space included.

    Raises:
        UserError: if a variable is not set, or a text other than those of generation contains a URI with credentials
    """

    def expand(name: str, text: str) -> str:
        if name in ("generate.prefix", "generate.stop"):
            return text
        check_no_credentials(name, text)
        with error_origin(f"{name} = {text}" if "$" in text else name):
            path = expand_path(text) if any(field in name for field in PATH_FIELDS) else text
        check_no_credentials(name, path)
        return path

    return {name: _map_text(value, expand, name) for name, value in values.items()}


def check_field(name: str) -> None:
    """Raises UserError, with the nearest field as its remedy, if ``name`` is not the full name of a field."""
    if name in FILE_FIELDS:
        return
    section, _, key = name.partition(".")
    same_key = [field for field in FILE_FIELDS if field.endswith(f".{key or section}")]
    same_section = [field for field in FILE_FIELDS if field.startswith(f"{section}.")]
    raise unknown_name("field", name, same_key[:1] or same_section or FILE_FIELDS)


def decode_toml(data: bytes) -> str:
    """Returns a configuration file's text: UTF-8, or UTF-16 with a byte order mark; editors on Windows write both."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf16 else "utf-8-sig")


def parse_config(text: str) -> ConfigValues:
    """Parses a configuration file, without a check of the values.

    Raises:
        UserError: if the text is not TOML, or has an unknown section or field
    """
    try:
        document = parse_toml(text)
    except ValueError as error:
        raise UserError(f"not TOML: {error}") from None
    for section, table in document.items():
        if section not in FILE_SECTIONS:
            raise unknown_name("section", section, FILE_SECTIONS)
        if not isinstance(table, dict):
            raise UserError(f"{section} must be a section, written [{section}]")
    values = {f"{section}.{key}": value for section, table in document.items() for key, value in table.items()}
    for name in values:
        if name != "search.space":
            check_field(name)
    return values


def parse_flags(flags: Mapping[str, str]) -> ConfigValues:
    """Parses flags: texts by full field name, written as in TOML except that strings need no quotes.

    Raises:
        UserError: if a field is unknown
    """
    values: ConfigValues = {}
    for name, text in flags.items():
        check_field(name)
        values[name] = text if FILE_FIELDS[name].type is str else _parse_value(text)
    return expand_paths(values)


def parse_sections(sections: Mapping[str, Any], *arguments: str) -> ConfigValues:
    """Parses sections given in Python: each a mapping of its fields, or the corpus's source alone.

    Args:
        sections: by name; values as a configuration file would contain them, also paths and NumPy's numbers
        arguments: other names, for the message

    Raises:
        UserError: if a section or field is unknown
    """
    values: ConfigValues = {}
    for section, given in sections.items():
        if section not in SECTIONS:
            raise unknown_name("argument", section, [*SECTIONS, *arguments])
        is_source = section == "corpus" and isinstance(given, str | os.PathLike)
        fields = {"source": given} if is_source else given
        if not isinstance(fields, Mapping):
            raise UserError(
                f"{section} = {fields!r}: must be a dict of fields", f'such as {section}={{"field": value}}'
            )
        values |= {f"{section}.{name}": _plain(value) for name, value in fields.items()}
    for name in values:
        check_field(name)
    return expand_paths(values)


def _plain(value: Any) -> Any:
    """Returns a path as text, and numbers of NumPy or torch as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _parse_value(text: str) -> Any:
    try:
        document = parse_toml(f"value = {text}")
    except ValueError:  # a string without quotes, or more digits than Python converts
        return text
    return document["value"] if len(document) == 1 else text  # text with line ends may contain other keys


def override_config(config: Config, values: ConfigValues) -> Config:
    """Returns the configuration with some values replaced. Raises UserError if a value is invalid."""
    sections: list[Any] = [replace(section, **_values_of(section, values)) for section in config.sections()]
    return Config(*sections)


def build_sections(values: ConfigValues) -> tuple[list[Any], SearchConfig]:
    """Returns the sections of ``Config`` and the search, with defaults for what is not in ``values``.

    Raises:
        UserError: if a value is invalid
    """
    *sections, search = [cls(**_values_of(cls, values)) for cls in FILE_SECTIONS.values()]
    return sections, cast(SearchConfig, search)


def _values_of(section: Section | type[Section], values: ConfigValues) -> dict[str, Any]:
    """Returns the values of one section, by field name without the section."""
    prefix = f"{section.section_name}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def config_to_toml(config: Config, *search: SearchConfig) -> str:
    """Returns the configuration, and a search if it is given, as TOML that ``search_config_from_toml`` reads."""
    return "\n".join(section.to_toml() for section in [*config.sections(), *search])


def config_from_toml(text: str, origin: str) -> Config:
    """Returns a configuration from the text that ``config_to_toml`` wrote."""
    return search_config_from_toml(text, origin)[0]


def search_config_from_toml(text: str, origin: str) -> tuple[Config, SearchConfig]:
    """Returns the configuration and the search of a file.

    Args:
        text: the file's content
        origin: its path; begins the message of an error

    Raises:
        UserError: if it is invalid
    """
    with error_origin(origin):
        values = parse_config(text)
        for name in values.keys() & PATH_FIELDS:
            values[name] = _map_text(values[name], lambda _, text: unescape_stored(text), name)
        sections, search = build_sections(values)
        return Config(*sections), search
