"""Parses JSON and TOML that may be malformed."""

import json
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

MAX_DEPTH = 32  # of nested lists and tables; thousands would exhaust Python's stack
MAX_BITS = 14_000  # of an integer; Python refuses to print one of more than 4,300 digits


def parse_json(data: bytes | str, parse_constant: Callable[[str], Any] = float) -> Any:
    """Parses JSON.

    Args:
        data: the text
        parse_constant: returns the value of NaN, Infinity and -Infinity

    Raises:
        ValueError: it is malformed, nested too deeply, or has an integer beyond 64 bits
    """
    return _parse(partial(json.loads, parse_int=_parse_int, parse_constant=parse_constant), data)


def _parse_int(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError("an integer beyond 64 bits")
    return number


def parse_toml(text: str) -> dict[str, Any]:
    """Parses TOML. Raises ValueError if it is malformed or nested too deeply, or has an integer beyond MAX_BITS."""
    return _parse(tomllib.loads, text)


def parse_record(
    data: bytes | str, types: Mapping[str, Any], parse_constant: Callable[[str], Any] = float
) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        data: the text
        types: the types of the fields that it must have, by name; it may have others
        parse_constant: as for ``parse_json``

    Raises:
        ValueError: as ``parse_json``, or a field is missing or of another type
    """
    record = parse_json(data, parse_constant)
    if not isinstance(record, dict) or not all(isinstance(record.get(name), cls) for name, cls in types.items()):
        raise ValueError(f"must have the fields {', '.join(types)}")
    return record


def _parse(parse: Callable[[Any], Any], text: bytes | str) -> Any:
    try:
        document = parse(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [document]
    for _ in range(MAX_DEPTH):
        containers = [value for value in level if isinstance(value, dict | list)]
        level = [inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)]
        if any(isinstance(value, int) and value.bit_length() > MAX_BITS for value in level):
            raise ValueError("an integer of thousands of digits")
    if level:
        raise ValueError("nested too deeply")
    return document
