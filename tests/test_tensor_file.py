"""Files of tensors are those of the safetensors library, and nothing that a file states is trusted."""

import io
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from job.errors import UserError
from job.training.tensor_file import read_tensors, tensor_bytes, tensor_file

EXAMPLES = {
    "weights": {"rnn.weight_hh_l0": torch.randn(4, 3), "linear.bias": torch.randn(5), "é": torch.randn(2)},
    "optimizer": {"step/a": torch.tensor(3.0), "exp_avg/a": torch.randn(3, 2).double()},
    "others": {
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(3),
        "empty": torch.zeros(0, 7),
        "z": torch.ones(3).bfloat16(),
    },
    "none": {},
}


def content(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(tensor_file(tensors, metadata))


@pytest.mark.parametrize("name", EXAMPLES)
def test_tensor_file_is_read_by_the_library_and_reads_its_files(name: str) -> None:
    tensors = EXAMPLES[name]
    libraries = save(tensors, {"kind": "tuple"})
    for found in (load(content(tensors)), read_tensors(io.BytesIO(libraries), len(libraries))[0]):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    assert read_tensors(io.BytesIO(libraries), len(libraries))[1] == {"kind": "tuple"}
    if name in ("weights", "optimizer"):
        assert content(tensors, {"kind": "tuple"}) == libraries


def test_tensor_file_shares_memory_with_contiguous_tensors() -> None:
    tensor = torch.zeros(1000)
    part = tensor_file({"a": tensor})[-1]
    tensor.fill_(1)
    assert bytes(part) == bytes(tensor_bytes(torch.ones(1000)))


def file_with_header(header: bytes | list[Any] | dict[str, Any], data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "file",
    [
        b"", b"\xff" * 8, b"\xff" * 7 + b"\x7f", file_with_header({"a": ENTRY})[:-1],
        file_with_header({"a": ENTRY}) + b"x", file_with_header({}), file_with_header([]),
        file_with_header(b"[" * 100_000), file_with_header({"a": None}),
        file_with_header({"a": ENTRY | {"dtype": "F99"}}), file_with_header({"a": ENTRY | {"shape": [10**15]}}),
        file_with_header({"a": ENTRY | {"shape": [-1, -2]}}), file_with_header({"a": ENTRY | {"shape": [0, 10**30]}}),
        file_with_header({"a": ENTRY | {"data_offsets": [0, 4]}}), file_with_header({"a": ENTRY | {"shape": [2.0]}}),
        file_with_header({"a": ENTRY | {"shape": [10**15], "data_offsets": [0, 4 * 10**15]}}),
        file_with_header({"a": ENTRY, "b": ENTRY}), file_with_header({"a": ENTRY | {"shape": "2"}}),
    ],
)  # fmt: skip
def test_read_tensors_from_invalid_file_raises_user_error(file: bytes) -> None:
    with pytest.raises(UserError, match="not a safetensors file"):
        read_tensors(io.BytesIO(file), len(file))
