"""The C interface of the kernels. api.h is its only declaration: the ctypes structs and prototypes are made from it."""

import ctypes
import re
from pathlib import Path
from typing import Any

from torch import Tensor

NUMBERS = {"index_t": ctypes.c_long, "float": ctypes.c_float, "double": ctypes.c_double}


class KernelArgs(ctypes.Structure):
    """A struct of api.h, made from keyword arguments. A contiguous tensor is passed by its address.

    Fields that are left out are 0 or NULL. The object keeps its tensors alive.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.fields = fields
        for name, value in fields.items():
            assert hasattr(self, name), f"{type(self).__name__} has no field {name}"
            assert not isinstance(value, Tensor) or value.is_contiguous(), f"{name} is not contiguous"
            setattr(self, name, value.data_ptr() if isinstance(value, Tensor) else value)


def parse_header(text: str) -> tuple[dict[str, type[KernelArgs]], dict[str, list[Any]]]:
    """Returns the structs that a header declares, and its functions' argument types; all functions return int.

    Raises KeyError for a type other than NUMBERS, structs and pointers.
    """
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    structs: dict[str, type[KernelArgs]] = {}
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, re.DOTALL):
        fields = [field for line in body.split(";")[:-1] for field in _parse_variables(line, structs)]
        structs[name] = type(name, (KernelArgs,), {"_fields_": fields})
    functions = {}
    for name, parameters in re.findall(r"^int (\w+)\((.*?)\);", text, re.MULTILINE):
        variables = [_parse_variables(line, structs)[0] for line in parameters.split(",") if line != "void"]
        functions[name] = [ctype for _, ctype in variables]
    return structs, functions


def _parse_variables(declaration: str, structs: dict[str, type[KernelArgs]]) -> list[tuple[str, Any]]:
    """Returns names and types of the variables in a declaration such as ``const float *weight, *bias``."""
    base, names = declaration.strip().removeprefix("const ").split(maxsplit=1)
    pointer = ctypes.POINTER(structs[base]) if base in structs else ctypes.c_void_p
    types = [pointer if "*" in name else {**NUMBERS, **structs}[base] for name in names.split(",")]
    return list(zip(re.findall(r"\w+(?=,|$)", names), types, strict=True))


STRUCTS, FUNCTIONS = parse_header(Path(__file__).with_name("api.h").read_text())


def declare_functions(library: ctypes.CDLL) -> None:
    """Sets the argument types of all functions of the library."""
    for name, argtypes in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argtypes, ctypes.c_int


def mismatched_struct(library: ctypes.CDLL) -> str | None:
    """Returns the name of a struct that has another size in the library than here; None if all agree."""
    sizes = {name: ctypes.sizeof(struct) for name, struct in STRUCTS.items()}
    return next((name for name, size in sizes.items() if library.struct_size(name.encode()) != size), None)
