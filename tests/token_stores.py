"""Shared by the tests of token stores: small runs, stores, and the formats by their descriptions alone."""

import json
import pickle
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from conftest import job, result

from job.config.config_file import load_config
from job.data.indexed import smallest_dtype
from job.data.tokens import ShardedTokens, Shards
from job.run.setup import build_run_spec
from job.storage import Folder

TEXT = "the time machine\nwas a machine of time and other things\r\n" * 40
FLAGS = {
    "stream.batch_size": 4, "stream.num_steps": 8, "model.hidden_size": 8, "train.max_steps": 5, "generate.length": 5,
    "scale.workers": 0, "corpus.validation_fraction": 0.25, "train.epochs": 2,
}  # fmt: skip
KINDS = ["char", "word", "byte"]


def words(**flags: object) -> list[object]:
    values = {**FLAGS, **{name.replace("__", "."): value for name, value in flags.items()}}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def run(tmp_path: Path, name: str, **flags: object) -> dict[str, Any]:
    ended = job("train", *words(run__storage=tmp_path / "runs", run__name=name, **flags))
    assert ended.status == 0, ended.err
    return result(tmp_path / "runs" / name)


def prepare(tmp_path: Path, source: Path, **flags: object) -> Path:
    store = tmp_path / f"store-{source.name}"
    ended = job("prepare", *words(corpus__source=source, corpus__store=store, **flags))
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1].startswith(f"{store}: ")  # after the progress, on a slow machine
    return store


def read_independently(prefix: Path) -> list[np.ndarray]:
    """The documents of a pair, by the format's description alone."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, num_sequences, num_boundaries = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    lengths = struct.unpack_from(f"<{num_sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{num_sequences}q", index, 34 + 4 * num_sequences)
    boundaries = struct.unpack_from(f"<{num_boundaries}q", index, 34 + 12 * num_sequences)
    assert len(index) == 34 + 12 * num_sequences + 8 * num_boundaries
    data = prefix.with_suffix(".bin").read_bytes()
    sequences = [np.frombuffer(data, dtype, n, start) for n, start in zip(lengths, pointers, strict=True)]
    assert boundaries[0] == 0 and boundaries[-1] == num_sequences
    parts = [sequences[start:stop] for start, stop in pairwise(boundaries)]
    return [np.concatenate(part) for part in parts]


def shards_of(folder: Path, tokens: np.ndarray, num_ids: int, shard_tokens: int) -> ShardedTokens:
    """Writes tokens as files of a store, and opens them as a worker does."""
    dtype = smallest_dtype(num_ids)
    parts = np.split(tokens, range(shard_tokens, len(tokens), shard_tokens))
    for number, part in enumerate(parts):
        part.astype(dtype).tofile(folder / f"{number}.bin")
    names, lengths = tuple(f"{number}.bin" for number in range(len(parts))), tuple(map(len, parts))
    shards = Shards(Folder(str(folder)), names, lengths, (0,) * len(parts), dtype, num_ids)
    stored: ShardedTokens = pickle.loads(pickle.dumps(ShardedTokens.whole(shards)))
    return stored


def json_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def write_independently(prefix: Path, documents: list[list[list[int]]], code: int) -> None:
    """A pair of documents of sequences, by the format's description alone."""
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    sequences = [sequence for document in documents for sequence in document]
    ids = [index for sequence in sequences for index in sequence]
    starts = [sum(map(len, sequences[:number])) for number in range(len(sequences))]
    boundaries = [sum(map(len, documents[:number])) for number in range(len(documents) + 1)]
    size = struct.calcsize(letter)
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *(start * size for start in starts))
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )  # fmt: skip


def spec_of(tmp_path: Path, source: object, **flags: object) -> Any:
    values = {**FLAGS, "corpus.source": source, **{name.replace("__", "."): value for name, value in flags.items()}}
    return build_run_spec(
        load_config(None, {name: str(value) for name, value in values.items()}), Folder(str(tmp_path))
    )


def refused(*arguments: object) -> str:
    ended = job(*arguments)
    assert ended.status == 2 and ended.err.count("\n") == 1 and not ended.out, ended
    return ended.err
