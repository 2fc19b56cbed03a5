"""Token ids in memory, or in the shards of a token store, of which a process opens those that it reads."""

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow

from job.data.vocabulary import Vocabulary
from job.errors import UserError, report_os_error
from job.storage import Folder

_BLOCK_TOKENS = 1 << 20  # that are in memory at a time
_HASHED_TOKENS = 1 << 15  # that are converted at a time, which stay in the cache
_MAX_COUNTED_TOKENS = 1 << 24  # of a part of a shard; in a longer one <unk> are as frequent as in all of it
_MAX_OPEN_SHARDS = 64  # each has a file descriptor, of which a process has 256 on macOS
_REQUEST_BYTES = 64 << 10  # of short reads from an object store, whose requests are cached:
_MIN_CACHED_REQUESTS, _MAX_CACHED_REQUESTS = 1024, 4096  # two for each array that is read at a time; 64 to 256 MiB
_REQUESTS_AT_ONCE = 8


@dataclass(frozen=True)
class Shards:
    """The files of a token store, or the one file of another trainer.

    Args:
        folder: the folder of the files
        names: the name of each file of token ids
        lengths: number of tokens of each file
        unknown: number of tokens of each file that are ``<unk>``
        dtype: of the ids
        num_ids: size of the vocabulary
    """

    folder: Folder
    names: tuple[str, ...]
    lengths: tuple[int, ...]
    unknown: tuple[int, ...]
    dtype: np.dtype
    num_ids: int

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without what is open or cached

    @cached_property
    def boundaries(self) -> np.ndarray:
        """The position of the first token of each file, and the number of all tokens."""
        return np.fromiter(accumulate(self.lengths, initial=0), np.int64)

    def read_into(self, pieces: list[tuple[np.ndarray, int]]) -> None:
        """Reads successive token ids into each array, from a position on.

        Raises:
            UserError: a file cannot be read, has another size, or contains what is no id of the vocabulary
        """
        parts = [part for target, start in pieces for part in self._split(target, start)]
        if self.folder.local_path is None:
            self._grow_cache(2 * len(pieces))  # the next part of an array may begin in one request and end in another
        if self.folder.local_path is None and len(parts) > 1:
            with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
                list(threads.map(self._read_part, parts))
        else:
            for part in parts:
                self._read_part(part)

    def _split(self, target: np.ndarray, start: int) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yields the part of an array that each file fills, the number of the file, and where to begin in it."""
        shard = int(np.searchsorted(self.boundaries, start, "right")) - 1
        while len(target):
            first, stop = self.boundaries[shard : shard + 2].tolist()
            if stop > start:
                yield target[: stop - start], shard, start - first
            target, start, shard = target[stop - start :], stop, shard + 1

    def _read_part(self, part: tuple[np.ndarray, int, int]) -> None:
        target, shard, start = part
        name = self.folder / self.names[shard]
        with report_os_error(f"{name}: token ids cannot be read", "put them on storage that all workers can read"):
            try:
                target[:] = self._read(shard, start, len(target))
            except (pyarrow.ArrowException, ValueError) as error:
                raise OSError(str(error)) from None
        if len(target) and (target.max() >= self.num_ids or target.min() < 0):
            wrong = target[(target >= self.num_ids) | (target < 0)][0]
            problem = f"{name}: {wrong} is not the id of a token, of which the vocabulary has {self.num_ids:,}"
            raise UserError(problem, "prepare the tokens again, or give their vocabulary")

    def _read(self, shard: int, start: int, length: int) -> np.ndarray:
        if self.folder.local_path is not None:
            mapped, ids = self._mapped(shard)
            self._check_size(mapped.size(), shard)  # to read behind the end of a file ends the process by SIGBUS
            return ids[start : start + length]
        size = self.dtype.itemsize
        if length * size >= _REQUEST_BYTES:
            return self._ids(self._request(shard, start * size, length * size))
        first, last = start * size // _REQUEST_BYTES, ((start + length) * size - 1) // _REQUEST_BYTES
        data = b"".join(self._cached_request(shard, number) for number in range(first, last + 1))
        return self._ids(data, start - first * _REQUEST_BYTES // size, length)

    def _ids(self, data: bytes, start: int = 0, length: int = -1) -> np.ndarray:
        return np.frombuffer(data, self.dtype, length, start * self.dtype.itemsize)

    @cached_property
    def _mapped(self) -> Any:
        return lru_cache(_MAX_OPEN_SHARDS)(self._map)

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        assert self.folder.local_path is not None
        with open(self.folder.local_path / self.names[shard], "rb") as file:
            self._check_size(os.fstat(file.fileno()).st_size, shard)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped, np.frombuffer(mapped, self.dtype)

    @cached_property
    def _cached_request(self) -> Any:
        return lru_cache(_MIN_CACHED_REQUESTS)(self._request_block)

    def _grow_cache(self, num_requests: int) -> None:
        size = min(num_requests, _MAX_CACHED_REQUESTS)
        if size > self._cached_request.cache_parameters()["maxsize"]:
            self.__dict__["_cached_request"] = lru_cache(size)(self._request_block)

    def _request_block(self, shard: int, number: int) -> bytes:
        start = number * _REQUEST_BYTES
        return self._request(shard, start, min(_REQUEST_BYTES, self.lengths[shard] * self.dtype.itemsize - start))

    def _request(self, shard: int, start: int, length: int) -> bytes:
        data = self.folder.read_block(self.names[shard], start, length)
        if len(data) != length:
            raise OSError(f"has {start + len(data):,} bytes, which is less than it had")
        return data

    def _check_size(self, size: int, shard: int) -> None:
        expected = self.lengths[shard] * self.dtype.itemsize
        if size != expected:
            raise OSError(f"has {size:,} bytes and not {expected:,}")


@dataclass(frozen=True)
class ShardedTokens:
    """Token ids of shards, which a slice does not read and ``np.asarray`` does.

    Args:
        shards: the files
        start: position of the first of the tokens
        stop: position after the last
    """

    shards: Shards
    start: int
    stop: int

    @classmethod
    def whole(cls, shards: Shards) -> "ShardedTokens":
        """Returns all tokens of shards."""
        return cls(shards, 0, sum(shards.lengths))

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> "ShardedTokens":
        start, stop, _ = part.indices(len(self))
        return replace(self, start=self.start + start, stop=self.start + max(start, stop))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read_rows(0, 0, 1, len(self))[0].astype(dtype or self.dtype, copy=False)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the ids."""
        return self.shards.dtype

    def read_rows(self, start: int, stride: int, num_rows: int, length: int) -> np.ndarray:
        """Returns successive tokens from each of several positions: (num_rows, length).

        Args:
            start: the first position
            stride: distance between two positions
            num_rows: number of positions
            length: number of tokens from each

        Raises:
            UserError: as ``Shards.read_into``
        """
        rows = np.empty((num_rows, length), self.dtype)
        self.shards.read_into([(row, self.start + start + index * stride) for index, row in enumerate(rows)])
        return rows

    def read_ranges(self, ranges: Sequence[range]) -> list[np.ndarray]:
        """Returns the tokens of each range, one array for each; raises as ``read_rows``."""
        arrays = [np.empty(len(part), self.dtype) for part in ranges]
        pieces = zip(arrays, ranges, strict=True)
        self.shards.read_into([(array, self.start + part.start) for array, part in pieces])
        return arrays

    def count_unknown(self, vocabulary: Vocabulary) -> int:
        """Counts the tokens that are ``<unk>``; reads the smaller part of a shard that is not whole, or estimates."""
        return self._count_before(self.stop, vocabulary) - self._count_before(self.start, vocabulary)

    def _count_before(self, position: int, vocabulary: Vocabulary) -> int:
        count, whole = 0, ShardedTokens.whole(self.shards)
        for (first, stop), unknown in zip(pairwise(self.shards.boundaries.tolist()), self.shards.unknown, strict=True):
            if stop <= position or not unknown:
                count += unknown if stop <= position else 0
            elif first < position:
                is_first_half = 2 * position < first + stop
                part = whole[first:position] if is_first_half else whole[position:stop]
                if len(part) > _MAX_COUNTED_TOKENS:
                    return count + round(unknown * (position - first) / (stop - first))
                found = _count_unknown(part, vocabulary)
                count += found if is_first_half else unknown - found
        return count


Tokens = np.ndarray | ShardedTokens


def read_ranges(tokens: Tokens, ranges: Sequence[range]) -> list[np.ndarray]:
    """Returns the token ids of each range."""
    if isinstance(tokens, ShardedTokens):
        return tokens.read_ranges(ranges)
    return [tokens[part.start : part.stop] for part in ranges]


def blocks(tokens: Tokens) -> Iterator[np.ndarray]:
    """Yields successive parts of tokens of any number, each small enough to compute with."""
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        yield np.asarray(tokens[start : start + _BLOCK_TOKENS])


def count_unknown(tokens: Tokens, vocabulary: Vocabulary) -> int:
    """Returns how many token ids are that of ``<unk>``."""
    if isinstance(tokens, ShardedTokens):
        return tokens.count_unknown(vocabulary)
    return _count_unknown(tokens, vocabulary)


def _count_unknown(tokens: Tokens, vocabulary: Vocabulary) -> int:
    return sum(int(np.count_nonzero(vocabulary.is_unknown(block))) for block in blocks(tokens))


def token_sha256(tokens: Tokens) -> str:
    """Returns the SHA-256 digest of token ids as int32."""
    digest = hashlib.sha256()
    for block in blocks(tokens):
        for start in range(0, len(block), _HASHED_TOKENS):
            digest.update(np.ascontiguousarray(block[start : start + _HASHED_TOKENS], "<i4").data)
    return digest.hexdigest()


def count_characters(tokens: Tokens, vocabulary: Vocabulary) -> int | None:
    """Returns the number of characters (or bytes) of token ids; None if they are words."""
    counts = vocabulary.num_characters
    if isinstance(counts, np.ndarray):
        return sum(int(counts[block].sum()) for block in blocks(tokens))
    return None if counts is None else counts * len(tokens)
