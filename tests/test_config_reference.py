"""What is generated from the declarations of the fields: the JSON schema and the configuration reference."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, not_none
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, validators

from job.config.config_file import load_search_config
from job.config.field import ConfigField
from job.config.search_space import SEARCHABLE, SearchConfig
from job.config.toml import FILE_FIELDS, FILE_SECTIONS, build_sections, expand_paths, parse_config
from job.errors import UserError
from scripts.generate_reference import FILES, json_schema

# TOML has integers, and JSON has numbers: to a JSON schema 3.0 is an integer, too.
is_toml_integer = Draft7Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
SCHEMA = validators.extend(Draft7Validator, type_checker=is_toml_integer)(json_schema())


@pytest.mark.parametrize("name", FILES)
def test_generated_file_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name](), "run make reference"


def test_json_schema_is_a_valid_schema() -> None:
    Draft7Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_json_schema_accepts_every_file_in_configs(path: Path) -> None:
    first_line, _, text = path.read_text().partition("\n")
    assert first_line == "#:schema schema.json"
    SCHEMA.validate(tomllib.loads(text))
    load_search_config(str(path), {})


def field_is_valid(option: ConfigField, value: Any) -> bool:
    """Whether a field accepts a value; its section may still reject it by code, of which a schema has nothing."""
    try:
        option.validate(value)
    except UserError:
        return False
    return True


VALUES = [
    0, 1, -1, 2, 1000, 1001, 10**6, 10**6 + 1, 10**9 + 1, 2**63 - 1, 2**63, 10**30, 0.0005, 0.5, 1.5, -0.5, 1e300,
    1e-300, True, False, [], [1, 2], [0, -1], [1, "a"], [0.5], [[1]], {}, {"a": 1}, "", "a", "auto", "random", "gr",
    ".a", "a/b", "A100", "x.y:Z", "x:y:z", "é.è:È", "30s", "0s", "0.0s", "0.50s", "1e3s", "s", "-1s", "2-8", "0-8",
    "02-08", "2-", "8", "1" * 20 + "s", "1" * 200 + "s", "1-" + "1" * 20, "a\0b", "$HOME", "<unk>", "true", "latin-1",
]  # fmt: skip


@pytest.mark.parametrize("name", FILE_FIELDS)
def test_json_schema_agrees_with_validation(name: str) -> None:
    option = FILE_FIELDS[name]
    section, _, key = name.partition(".")
    near_bounds = [bound + step for bound in option.bounds.values() for step in (-1, -0.25, 0, 0.25, 1)]
    values = [*VALUES, option.default, *option.choices, *near_bounds]
    accepted = [value for value in values if field_is_valid(option, value)]
    assert accepted == [value for value in values if SCHEMA.is_valid({section: {key: value}})]
    assert 0 < len(accepted) < len(values)  # neither accepts everything


@pytest.mark.parametrize("name", FILE_FIELDS)
def test_to_toml_any_valid_value_reads_back_equal(name: str) -> None:
    section_name, _, key = name.partition(".")
    option = FILE_FIELDS[name]
    sections = 0
    for value in [*VALUES, option.default, *option.choices]:
        try:
            section = FILE_SECTIONS[section_name](**{key: value})
        except UserError:
            continue
        read, search = build_sections(expand_paths(parse_config(section.to_toml())))
        assert section in [*read, search]
        sections += 1
    assert sections > 1


VALUES_OF_TOML = st.recursive(
    st.booleans() | st.integers() | st.floats(-1e300, 1e300) | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=2),
    max_leaves=3,
)


@settings(deadline=None, max_examples=3 * not_none(settings.default).max_examples)
@given(name=st.sampled_from(list(FILE_FIELDS)), value=VALUES_OF_TOML)
def test_json_schema_agrees_with_validation_of_any_value(name: str, value: Any) -> None:
    section, _, key = name.partition(".")
    assert field_is_valid(FILE_FIELDS[name], value) == SCHEMA.is_valid({section: {key: value}})


def space_is_valid(space: dict[str, Any]) -> bool:
    """Whether a search accepts a space, and fields its values."""
    try:
        endpoints = SearchConfig(space=space).space.endpoints  # type: ignore[arg-type]
    except UserError:
        return False
    return all(field_is_valid(FILE_FIELDS[name], value) for params in endpoints for name, value in params.items())


DOMAINS = [
    {"uniform": [0.25, 0.5]}, {"loguniform": [0.25, 0.5]}, {"loguniform": [0, 0.5]}, {"randint": [1, 2]},
    {"randint": [0.25, 0.5]}, {"uniform": [0.5]}, {"uniform": [-1, 0.5]}, {"uniform": []}, {"choice": []}, {"grid": []},
    {"choice": [0.25, 0.5]}, {"grid": [2, 3]}, {"choice": [2, 2]}, {"grid": ["gru", "lstm"]}, {"choice": ["a", "b"]},
    {"grid": [True, False]}, {"grid": 3}, {"unifrom": [0.25, 0.5]}, {}, {"choice": [2], "grid": [2]}, 3, [2, 3],
    "choice", {"choice": [[1, 2], "random"]}, {"choice": [-1]}, {"choice": [10**30]}, {"grid": [{"a": 1}]},
]  # fmt: skip


@pytest.mark.parametrize("name", SEARCHABLE)
def test_json_schema_agrees_with_validation_of_a_domain(name: str) -> None:
    section, _, key = name.partition(".")
    for domain in DOMAINS:
        valid = space_is_valid({name: domain})
        assert SCHEMA.is_valid({"search": {"space": {name: domain}}}) == valid, domain
        assert SCHEMA.is_valid({"search": {"space": {section: {key: domain}}}}) == valid, domain


@pytest.mark.parametrize(
    "document",
    [
        {"modell": {}},
        {"model": 3},
        {"model": {"hiden_size": 3}},
        {"search": {"space": {"run.name": {"choice": ["a"]}}}},
        {"search": {"space": {"scale": {"workers": {"choice": [1]}}}}},
        {"search": {"space": 3}},
    ],
)
def test_json_schema_rejects_unknown_names(document: dict[str, Any]) -> None:
    assert not SCHEMA.is_valid(document)
