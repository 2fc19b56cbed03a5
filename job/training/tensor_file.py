"""Files of tensors in the safetensors format, written and read without a second copy of the tensors in memory.

Eight bytes with the length of the header (little-endian), the header in JSON, and the bytes of the tensors.
Source: https://github.com/huggingface/safetensors, "Format"
"""

import json
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from job.errors import UserError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CHUNK_BYTES = 1 << 22  # that are read at a time

_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ReadableInto(Protocol):
    """A file that is read in one pass."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fills the buffer, or the first part of it, and returns how many bytes; 0 at the end of the file."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes (little-endian, row-major) of a tensor on the CPU; shared with it if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_file(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> list[bytes | memoryview]:
    """Returns the content of a file of tensors on the CPU, in parts that share their memory."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    parts, offset = [], 0
    # Larger items first, so that all are aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        parts.append(tensor_bytes(tensor))
        offsets = [offset, offset + parts[-1].nbytes]
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def read_tensors(stream: ReadableInto, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a file of tensors, each into memory of its own.

    Args:
        stream: the file
        size: of the file in bytes; nothing larger is allocated, whatever the header states

    Returns:
        the tensors on the CPU by name, and the metadata

    Raises:
        UserError: it is not such a file
    """
    try:
        length = int.from_bytes(read_bytes(stream, 8), "little")
        if length > size - 8:
            raise ValueError("the header is longer than the file")
        header = json.loads(read_bytes(stream, length))
        metadata = header.pop("__metadata__", {})
        tensors, position, end = {}, 0, size - 8 - length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, offsets, dtype = entry["shape"], entry["data_offsets"], _DTYPES[entry["dtype"]]
            nbytes = math.prod(shape) * dtype.itemsize
            if offsets != [position, position + nbytes] or min(shape, default=0) < 0 or offsets[1] > end:
                raise ValueError(f"{name} has invalid sizes")
            tensors[name] = torch.empty(shape, dtype=dtype)
            read_exactly(stream, tensor_bytes(tensors[name]))
            position += nbytes
        if position != end:
            raise ValueError("bytes that belong to no tensor")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError, OverflowError) as error:
        raise UserError(f"not a safetensors file: {error}") from None
    return tensors, metadata


def read_exactly(stream: ReadableInto, buffer: memoryview) -> None:
    """Fills the buffer from the stream; raises ValueError if the stream ends before."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done : done + CHUNK_BYTES])
        if not count:
            raise ValueError("the file is truncated")
        done += count


def read_bytes(stream: ReadableInto, length: int) -> bytes:
    """Returns the next bytes of the stream; raises ValueError if it ends before."""
    buffer = bytearray(length)
    read_exactly(stream, memoryview(buffer))
    return bytes(buffer)
