"""Writes ``configs/schema.json`` and ``docs/configuration.md`` from the declarations of the fields."""

import json
from pathlib import Path
from typing import Any

from job.config.field import FREE, ConfigField, format_value
from job.config.schema import FIELDS, SECTIONS
from job.config.search_space import MAX_TRIALS, SEARCHABLE
from job.config.toml import FILE_SECTIONS

ROOT = Path(__file__).parent.parent

_KEYWORDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_SYMBOLS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_TYPE_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false"}


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 7) of a configuration file."""
    sections = {name: _object(cls.config_fields().values(), str(cls.__doc__)) for name, cls in FILE_SECTIONS.items()}
    sections["search"]["properties"]["space"] = _space_schema()
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Configuration of a run or a search",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
        "definitions": {name: _domain_schema(option) for name, option in SEARCHABLE.items()},
    }


def _object(options: Any, description: str) -> dict[str, Any]:
    properties = {option.key: _field_schema(option) for option in options}
    return {"description": description, "type": "object", "properties": properties, "additionalProperties": False}


def _field_schema(option: ConfigField) -> dict[str, Any]:
    types = [_type_schema(option, cls) for cls in option.types]
    unit = f" (unit: {option.unit})" if option.unit else ""
    schema = types[0] if len(types) == 1 else {"anyOf": types}
    return {"description": f"{option.description}{unit}", "default": option.default, **schema}


def _type_schema(option: ConfigField, cls: Any) -> dict[str, Any]:
    if cls is str:
        return {"type": "string", **_text_schema(option)}
    if cls not in _JSON_TYPES:
        return {"type": "array", "items": _type_schema(option, int)}
    return {"type": _JSON_TYPES[cls], **{_KEYWORDS[name]: bound for name, bound in option.bounds.items()}}


def _text_schema(option: ConfigField) -> dict[str, Any]:
    if option.choices:
        return {"enum": list(option.choices)}
    pattern = option.pattern or (r"[^\u0000]*" if option.is_path else "")
    return {"pattern": f"^({pattern})$"} if pattern else {}


def _domain_schema(option: ConfigField) -> dict[str, Any]:
    """Returns the schema of a field's domain in ``[search.space]``."""
    section = option.name.partition(".")[0]
    value = {"$ref": f"#/properties/{section}/properties/{option.key}"}
    values = {"type": "array", "items": value, "minItems": 1, "maxItems": MAX_TRIALS, "uniqueItems": True}
    domains = {"choice": values, "grid": values}
    ends = {"type": "array", "minItems": 2, "maxItems": 2}
    if {int, float} & set(option.types):
        domains["randint"] = {**ends, "items": {"allOf": [value, {"type": "integer"}]}}
    if float in option.types:
        domains["uniform"] = {**ends, "items": value}
        domains["loguniform"] = {**ends, "items": {"allOf": [value, {"exclusiveMinimum": 0}]}}
    return {
        "description": option.description,
        "type": "object",
        "properties": domains,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _space_schema() -> dict[str, Any]:
    """Returns the schema of ``[search.space]``: fields by full name, quoted, or as tables of their sections."""
    domains = {name: {"$ref": f"#/definitions/{name}"} for name in SEARCHABLE}
    tables = {
        section: {
            "type": "object",
            "properties": {
                name.partition(".")[2]: ref for name, ref in domains.items() if name.startswith(f"{section}.")
            },
            "additionalProperties": False,
        }
        for section in SECTIONS
    }
    description = "the fields that are searched, each with its domain"
    properties = {**domains, **tables}
    return {"description": description, "type": "object", "properties": properties, "additionalProperties": False}


def reference() -> str:
    """Returns the configuration reference as Markdown."""
    sections = [
        f"## {name}\n\n{cls.__doc__}\n\n{_table(cls.config_fields().values())}" for name, cls in FILE_SECTIONS.items()
    ]
    mutable = ", ".join(f"`{name}`" for name, option in FIELDS.items() if option.is_mutable)
    free = (name for name, option in FIELDS.items() if option.is_free_in_new_run or option.is_mutable)
    return f"""# Configuration reference

<!-- Generated from job/config by scripts/generate_reference.py; `make reference` updates it. -->

A configuration is a TOML file with one table per section. A flag (`--model.hidden_size 512`) overrides the file, and
the file overrides the default. Editors that support TOML schemas complete and check a file that begins with the line
`#:schema schema.json`, as those in `configs/` do; the schema is `configs/schema.json`.

The last column is what may change when a run or search is resumed. A field that may change does not affect the result.

A new run that starts from a checkpoint of another one (`run.resume_from`) may also have another value of
{", ".join(f"`{name}`" for name in free)}.
Its tokens and its vocabulary must be the same.

{chr(10).join(sections)}
### search.space

A table of the fields that are searched, by full name, each with its domain: any field of a run that is not marked
`{FREE}`.

| domain | values of a trial |
| --- | --- |
| `{{ uniform = [low, high] }}` | a number in the range |
| `{{ loguniform = [low, high] }}` | a number in the range, whose logarithm is uniform; `low` above 0 |
| `{{ randint = [low, high] }}` | an integer in the range, both ends included |
| `{{ choice = [a, b, …] }}` | one of the list |
| `{{ grid = [a, b, …] }}` | each of the list in turn |

With `scheduler = "pbt"` only {mutable} can be searched.
"""


def _table(options: Any) -> str:
    rows = "".join(f"| {' | '.join(map(_escape, _row(option)))} |\n" for option in options)
    return f"| field | type | default | unit | meaning | on resume |\n| --- | --- | --- | --- | --- | --- |\n{rows}"


def _row(option: ConfigField) -> list[str]:
    types = " or ".join(_TYPE_NAMES.get(cls, "list of integers") for cls in option.types)
    if option.choices:
        types = ", ".join(f"`{name}`" for name in option.choices)
    bounds = "".join(f", {_SYMBOLS[name]} {bound:,}" for name, bound in option.bounds.items())
    default = f"`{format_value(option.default)}`"
    return [f"`{option.key}`", f"{types}{bounds}", default, option.unit, option.description, option.on_resume]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<unk>", "`<unk>`")


FILES = {
    "configs/schema.json": lambda: f"{json.dumps(json_schema(), indent=1, ensure_ascii=False)}\n",
    "docs/configuration.md": reference,
}

if __name__ == "__main__":
    for name, generate in FILES.items():
        (ROOT / name).write_text(generate(), encoding="utf-8")
