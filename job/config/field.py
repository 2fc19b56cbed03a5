"""The declaration of a field of the configuration: its type, default, unit, meaning and check in one place."""

import json
import operator
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from job.errors import UserError

FREE = "may change"  # on_resume of a field that does not affect the result
BOUNDS = {"ge": ("at least", operator.ge), "gt": ("greater than", operator.gt),
          "le": ("at most", operator.le), "lt": ("less than", operator.lt)}  # fmt: skip
_TYPE_NAMES = {str: "text", int: "an integer", float: "a finite number", bool: "true or false"}


@dataclass(frozen=True)
class ConfigField:
    """A field's declaration. Validation, help, TOML, the JSON schema and the reference are derived from it.

    Args:
        default: its default value
        meaning: what it sets; the help text
        unit: the unit of its number
        bounds: of its number, or of each number in its list, by their name in ``BOUNDS``
        choices: the texts that it can be, each with an explanation or ""; empty: any text
        pattern: regular expression of the whole text
        form: what values look like, if type and choices do not state it; needed if there are several types
        is_path: whether it is a path or URI, in which ``$NAME`` and ``~`` are expanded when it is read from the user
        on_resume: what may change when a run or search is resumed; "": that of the section
        is_mutable: whether population-based training may change it during a run
        is_free_in_new_run: whether a run that starts from a checkpoint of another one may have another value, as it may
            have of a mutable field
        name: its full name, such as ``model.cell``, set by the section
        type: its type, set by the section
    """

    default: Any
    meaning: str
    unit: str = ""
    bounds: Mapping[str, float] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    pattern: str = ""
    form: str = ""
    is_path: bool = False
    on_resume: str = ""
    is_mutable: bool = False
    is_free_in_new_run: bool = False
    name: str = ""
    type: Any = str

    @property
    def key(self) -> str:
        """Its name in the section."""
        return self.name.partition(".")[2]

    @property
    def types(self) -> tuple[Any, ...]:
        """The types that a value may have."""
        return get_args(self.type) if isinstance(self.type, types.UnionType) else (self.type,)

    @property
    def description(self) -> str:
        """Its meaning, choices and form."""
        choices = [f"{name} ({text})" if text else name for name, text in self.choices.items()]
        form = self.form or " or ".join(filter(None, [", ".join(choices[:-1]), *choices[-1:]]))
        return f"{self.meaning}: {form}" if form else self.meaning

    @property
    def default_text(self) -> str:
        """Its default, with the unit."""
        return f"{format_value(self.default)} {self.unit}".rstrip()

    def validate(self, value: Any) -> Any:
        """Returns the value as the field's type: integers convert to float, lists to tuples.

        Raises:
            UserError: if it has another type, or fails a check
        """
        converted = next((match for cls in self.types if (match := _convert(value, cls)) is not None), None)
        if converted is None:
            raise UserError(f"{self.name} = {format_value(value)}: must be {_TYPE_NAMES.get(self.type, self.form)}")
        if problem := self._find_problem(converted):
            raise UserError(f"{self.name} = {format_value(converted)}: {problem}")
        return converted

    def _find_problem(self, value: Any) -> str:
        """Returns what is wrong with a value of the right type; empty if it is valid."""
        if isinstance(value, str):
            return self._find_text_problem(value)
        numbers = value if isinstance(value, tuple) else (value,)
        if all(BOUNDS[name][1](number, bound) for name, bound in self.bounds.items() for number in numbers):
            return ""
        return f"must be {' and '.join(f'{BOUNDS[name][0]} {bound:,}' for name, bound in self.bounds.items())}"

    def _find_text_problem(self, text: str) -> str:
        if re.search("[\ud800-\udfff]", text):
            return "contains bytes that are not UTF-8"
        if self.is_path and "\0" in text:
            return "contains a NUL character"
        if self.choices and text not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        return f"must be {self.form}" if self.pattern and not re.fullmatch(self.pattern, text) else ""


def _convert(value: Any, cls: Any) -> Any:
    """Returns the value as a type; None if it has another."""
    if cls is float:
        is_finite = type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
        return float(value) if is_finite else None
    if get_args(cls):
        is_list = isinstance(value, list | tuple) and all(type(item) is int for item in value)
        return tuple(value) if is_list else None
    return value if type(value) is cls else None


def config_field(default: Any, meaning: str, unit: str = "", **declaration: Any) -> Any:
    """Returns a dataclass field of a section.

    Args:
        default, meaning, unit: see ``ConfigField``
        declaration: the other arguments of ``ConfigField``; bounds by their names: ``ge=1``
    """
    declaration["bounds"] = {name: declaration.pop(name) for name in BOUNDS if name in declaration}
    return field(default=default, metadata={"declaration": ConfigField(default, meaning, unit, **declaration)})


def choice_field(meaning: str, **choices: str) -> Any:
    """Returns a field for one of some texts, each with an explanation or ""; the first is the default."""
    return config_field(next(iter(choices)), meaning, choices=choices)


def format_value(value: Any) -> str:
    """Returns a value as TOML."""
    if isinstance(value, bool | str):
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return text.encode(errors="backslashreplace").decode()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{format_name(key)} = {format_value(inner)}' for key, inner in value.items())} }}"
    return str(value)


def format_name(name: str) -> str:
    """Returns the name of a field or section; one that is no TOML key without quotes is quoted."""
    return name if re.fullmatch(r"[\w.-]+", name) else format_value(name)
