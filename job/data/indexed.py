"""The indexed format of Megatron-LM: token ids in a ``.bin`` file, and their documents in an ``.idx`` file."""

import struct

import numpy as np

from job.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")  # signature, version, code of the dtype, sequences, document boundaries
_SIGNATURE, _VERSION = b"MMIDIDX\0\0", 1
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # of the ids that are integers
_MAX_LENGTH = 2**31 - 1  # of a sequence; a longer document has several


def smallest_dtype(vocabulary_size: int) -> np.dtype:
    """Returns the smallest dtype of the format that holds the ids of a vocabulary."""
    return next(np.dtype(cls) for cls in (np.uint8, np.uint16, np.int32) if vocabulary_size - 1 <= np.iinfo(cls).max)


def format_index(document_lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """Returns the content of an ``.idx`` file.

    Args:
        document_lengths: tokens of each document (documents,)
        dtype: that of the ids
    """
    num_parts = np.maximum(1, -(-document_lengths // _MAX_LENGTH))
    lengths = np.full(num_parts.sum(), _MAX_LENGTH, np.int64)
    boundaries = np.concatenate([[0], np.cumsum(num_parts)])
    lengths[boundaries[1:] - 1] = document_lengths - (num_parts - 1) * _MAX_LENGTH
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * dtype.itemsize
    code = next(code for code, cls in _DTYPES.items() if cls == dtype)
    header = _HEADER.pack(_SIGNATURE, _VERSION, code, len(lengths), len(boundaries))
    return header + b"".join(
        array.astype(kind).tobytes() for array, kind in ((lengths, "<i4"), (pointers, "<i8"), (boundaries, "<i8"))
    )


def parse_index(data: bytes, file: str) -> tuple[np.dtype, int]:
    """Reads the content of an ``.idx`` file, whose sequences must follow each other without gaps.

    Args:
        data: the file's bytes
        file: the file's path, for messages

    Returns:
        The dtype and the number of the token ids in the ``.bin`` file.

    Raises:
        UserError: it is cut off, is in another version of the format, or its ids are not integers
    """
    if len(data) < _HEADER.size or not data.startswith(_SIGNATURE):
        raise UserError(f"{file}: not an index of the Megatron format")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(data)
    if version != _VERSION or code not in _DTYPES:
        raise UserError(f"{file}: version {version} with dtype {code}, and only integers of version 1 are read")
    if len(data) < _HEADER.size + 12 * num_sequences + 8 * num_boundaries:
        raise UserError(f"{file}: is cut off", "copy it again")
    lengths = np.frombuffer(data, "<i4", num_sequences, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    dtype, stops = np.dtype(_DTYPES[code]).newbyteorder("<"), np.cumsum(lengths)
    if np.any(lengths < 0) or np.any(pointers != (stops - lengths) * dtype.itemsize):
        raise UserError(f"{file}: its sequences do not follow each other", "write them in the order of their tokens")
    return dtype, int(stops[-1]) if num_sequences else 0
