"""The manifest of a token store: its shards, with sizes and checksums, and how they were made."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from job.documents import parse_record
from job.errors import UserError
from job.storage import Folder

MANIFEST = "manifest.json"
MARKER = ".preparing"  # in the folder of a store that is being written: of which files and settings
SHARD_FILE = re.compile(r"tokens-\d{5,}(-\d{5,})?\.(bin|idx)")
FORMAT, VERSION = "lanes token store", 2
REMEDY = "prepare the store again"
_TYPES = {"content": dict, "sha256": str}
_VERSION_TYPES = {"format": str, "version": int}
_CONTENT_TYPES = {"characters": int, "target_characters": int, "dtype": str, "settings": dict, "shards": list,
                  "files": dict}  # fmt: skip
_SHARD_TYPES = {"name": str, "tokens": int, "documents": int, "unknown": int, "token_sha256": str, "files": dict}
_DTYPES = ("uint8", "uint16", "int32")


@dataclass(frozen=True)
class Shard:
    """A part of a store: a ``.bin`` and an ``.idx`` file.

    Args:
        name: the name of both files without their suffixes
        tokens: number of tokens
        documents: number of documents; a document that two shards share counts in both
        unknown: how many tokens are ``<unk>``
        token_sha256: SHA-256 digest of the tokens as int32
        files: the size in bytes and the SHA-256 digest of each file, by name
    """

    name: str
    tokens: int
    documents: int
    unknown: int
    token_sha256: str
    files: dict[str, tuple[int, str]]

    @property
    def ids(self) -> str:
        """The name of the file of token ids."""
        return f"{self.name}.bin"


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Args:
        characters: number of characters of the text
        target_characters: number of characters of all tokens but the first
        dtype: of the token ids
        settings: all fields of ``corpus`` and ``vocabulary`` that the store was made with, by name
        shards: in the order of their tokens
        files: the size in bytes and the SHA-256 digest of each other file, by name
    """

    characters: int
    target_characters: int
    dtype: np.dtype
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    files: dict[str, tuple[int, str]]

    @property
    def token_sha256(self) -> str:
        """The digest of the only shard's tokens, or that of all shards' digests."""
        digests = [shard.token_sha256 for shard in self.shards]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def all_files(self) -> dict[str, tuple[int, str]]:
        """The size and the digest of each file of the store but the manifest."""
        return {name: entry for files in (self.files, *(shard.files for shard in self.shards))
                for name, entry in files.items()}  # fmt: skip


def describe_file(*parts: bytes | memoryview) -> tuple[int, str]:
    """Returns the size in bytes and the SHA-256 digest of a file's content."""
    digest, size = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        size += len(part)
    return size, digest.hexdigest()


def format_manifest(manifest: Manifest, num_documents: int) -> bytes:
    """Returns the content of ``manifest.json``."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "tokens": sum(shard.tokens for shard in manifest.shards),
        "documents": num_documents,
        "token_sha256": manifest.token_sha256,
        **asdict(manifest),
        "dtype": manifest.dtype.name,
    }
    return json.dumps({"content": content, "sha256": _digest(content)}, indent=1).encode()


def read_manifest(folder: Folder) -> Manifest:
    """Reads the manifest of a store.

    Raises:
        UserError: it is damaged, or of another version
        OSError: it cannot be read
    """
    data = folder.read(MANIFEST)
    try:
        document = parse_record(data, _TYPES)
        content = parse_record(json.dumps(document["content"]), _VERSION_TYPES)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{content['format']} of version {content['version']}, and version {VERSION} is read")
        if document["sha256"] != _digest(document["content"]):
            raise ValueError("its checksum is wrong")
        return _parse_content(parse_record(json.dumps(content), _CONTENT_TYPES))
    except ValueError as error:
        raise UserError(f"{MANIFEST}: {error}", REMEDY) from None


def _parse_content(content: dict[str, Any]) -> Manifest:
    shards = tuple(parse_shard(shard) for shard in content["shards"])
    if not shards or content["dtype"] not in _DTYPES:
        raise ValueError("its shards or their dtype are missing")
    dtype = np.dtype(content["dtype"])
    if any(shard.files[shard.ids][0] != shard.tokens * dtype.itemsize for shard in shards):
        raise ValueError("the sizes of its shards are not those of their tokens")
    return Manifest(
        content["characters"], content["target_characters"], dtype, content["settings"], shards,
        _parse_files(content["files"]),
    )  # fmt: skip


def parse_shard(record: Any) -> Shard:
    """Returns a shard from its fields as ``dataclasses.asdict`` returns them. Raises ValueError if one is wrong."""
    values = parse_record(json.dumps(record), _SHARD_TYPES)
    name, files = values["name"], _parse_files(values["files"])
    if set(files) != {f"{name}.bin", f"{name}.idx"} or not all(map(SHARD_FILE.fullmatch, files)):
        raise ValueError("a shard is not complete")
    return Shard(**{field: values[field] for field in _SHARD_TYPES} | {"files": files})


def _parse_files(files: dict[str, Any]) -> dict[str, tuple[int, str]]:
    for entry in files.values():
        if not isinstance(entry, list) or [*map(type, entry)] != [int, str]:
            raise ValueError("its files are not pairs of a size and a checksum")
    return {name: (entry[0], entry[1]) for name, entry in files.items()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
