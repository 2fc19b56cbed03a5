"""Tokens that are prepared on a disk and memory-mapped by every worker, instead of a text."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.config.field import format_value
from job.config.schema import FIELDS, CorpusConfig, VocabularyConfig
from job.data.indexed import format_index, map_tokens, open_indexed, smallest_dtype
from job.data.source import BUILT_IN
from job.data.vocabulary import Vocabulary, vocabulary_from_json
from job.documents import parse_record
from job.errors import UserError, error_origin, report_os_error
from job.paths import is_uri
from job.storage import Folder

MANIFEST, VOCABULARY = "manifest.json", "vocabulary.json"
_FORMAT, _VERSION = "lanes token store", 1
_NAME = "tokens"  # of the .bin and .idx file
_FILES = {f"{_NAME}.bin", f"{_NAME}.idx", VOCABULARY}
_MARKER = ".preparing"  # in the folder of a store that is being written
_BLOCK_TOKENS = 1 << 20  # that are in memory at a time
_MAX_VERIFIED_BYTES = 256 << 20  # of tokens that each run verifies, within a second
# The settings that decide the tokens. Others, such as the encoding of the text, do not apply to a store.
_FIXED = ("corpus.cleaning", "corpus.newlines", "vocabulary.kind", "vocabulary.end_of_line")
_OPTIONAL = ("vocabulary.size", "vocabulary.min_frequency", "vocabulary.scope")
_TRAINING_PART = ("corpus.max_tokens", "corpus.validation_fraction")  # whose tokens vocabulary.scope = training counts
_MANIFEST_TYPES = {"content": dict, "sha256": str}
_CONTENT_TYPES = {"format": str, "version": int, "tokens": int, "characters": int, "target_characters": int,
                  "unknown": int, "token_sha256": str, "settings": dict, "files": dict}  # fmt: skip


@dataclass(frozen=True)
class StoredTokens:
    """The tokens of a store, or of files of another trainer.

    Args:
        tokens: token ids (tokens,), memory-mapped, of any integer dtype
        vocabulary: that of the tokens
        cleaning: the cleaning of the text, d2l or none
        num_characters: number of characters, or of tokens if it is not known
        target_characters: number of characters of all tokens but the first; None if it is not known
        num_unknown: how many tokens are ``<unk>``
        sha256: digest of the tokens as int32
    """

    tokens: np.ndarray
    vocabulary: Vocabulary
    cleaning: str
    num_characters: int
    target_characters: int | None
    num_unknown: int
    sha256: str


def blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Yields successive parts of an array of any length, each small enough to compute with."""
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        yield tokens[start : start + _BLOCK_TOKENS]


def count_unknown(tokens: np.ndarray, vocabulary: Vocabulary) -> int:
    """Returns how many token ids are that of ``<unk>``."""
    return sum(int(vocabulary.is_unknown(block).sum()) for block in blocks(tokens))


def token_sha256(tokens: np.ndarray) -> str:
    """Returns the SHA-256 digest of token ids as int32."""
    digest = hashlib.sha256()
    for block in blocks(tokens):
        digest.update(block.astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


def open_stored(
    corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig, vocabulary: Vocabulary | None, reads_flat: bool
) -> StoredTokens | None:
    """Opens the tokens that ``corpus.source`` names; returns None if it names a text.

    Args:
        corpus_config: the source, and what is to agree with the store
        vocabulary_config: what is to agree with the store
        vocabulary: of the ids in files that are no store; None: such files are not opened
        reads_flat: whether a ``.bin`` file without an index contains uint16 ids, as nanoGPT writes them

    Raises:
        UserError: the files are damaged, or do not agree with the configuration or with the vocabulary
    """
    source = corpus_config.source
    path = _local_path(source)
    if path is None:
        return None
    with error_origin(f"corpus.source = {source}"), report_os_error("cannot be read"):
        if path.is_dir():
            return _open_store(path, corpus_config, vocabulary_config, vocabulary) if _is_store(path) else None
        has_suffix = path.suffix in (".bin", ".idx")
        if vocabulary is None or (path.is_file() and not has_suffix):
            return None
        prefix = path.with_suffix("") if has_suffix else path
        has_index = all(prefix.with_name(f"{prefix.name}{suffix}").is_file() for suffix in (".bin", ".idx"))
        if not has_index and not (reads_flat and path.suffix == ".bin"):
            return None
        tokens = open_indexed(prefix) if has_index else map_tokens(path, np.dtype("<u2"))
        return _check_tokens(tokens, vocabulary, corpus_config.cleaning)


def _local_path(source: str) -> Path | None:
    """Returns the path that a source names, None if it is not on a disk."""
    if source in BUILT_IN:
        return None
    if is_uri(source):
        return Folder.resolve(source).local_path if source.startswith("file://") else None
    return Path(os.path.expanduser(source))


def _is_store(path: Path) -> bool:
    """Returns whether a folder is a store, even if it is damaged; a folder of texts may have a manifest, too."""
    manifest = path / MANIFEST
    has_tokens = any((path / f"{_NAME}{suffix}").is_file() for suffix in (".bin", ".idx"))
    return manifest.is_file() and (has_tokens or _FORMAT.encode() in manifest.read_bytes())


def _check_tokens(tokens: np.ndarray, vocabulary: Vocabulary, cleaning: str) -> StoredTokens:
    """Reads all tokens once. Raises UserError if one is not in the vocabulary."""
    num_unknown = 0
    for block in blocks(tokens):
        if block.min() < 0 or block.max() >= len(vocabulary):
            wrong = int(block.min() if block.min() < 0 else block.max())
            raise UserError(f"{wrong} is not the id of a token, of which vocabulary.file has {len(vocabulary):,}")
        num_unknown += int(vocabulary.is_unknown(block).sum())
    cleaning = "none" if cleaning == "auto" else cleaning
    return StoredTokens(tokens, vocabulary, cleaning, len(tokens), None, num_unknown, token_sha256(tokens))


def _open_store(
    path: Path, corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig, vocabulary: Vocabulary | None
) -> StoredTokens:
    content = _read_manifest(path)
    settings = content["settings"]
    given = corpus_config.values() | vocabulary_config.values()
    fixed: tuple[str, ...] = _FIXED[:2] if vocabulary else _FIXED
    optional = () if vocabulary else _OPTIONAL
    if optional and settings["vocabulary.scope"] == "training":
        fixed += _TRAINING_PART
    for name in (*fixed, *optional):
        if given[name] not in (settings[name], FIELDS[name].default if name in optional else "auto"):
            problem = (
                f"{name} = {format_value(given[name])}, and the store was made with {format_value(settings[name])}"
            )
            raise UserError(problem, "set the same, or prepare another store")
    stored = vocabulary_from_json((path / VOCABULARY).read_bytes(), str(path / VOCABULARY))
    if vocabulary not in (None, stored):
        raise UserError("the store has another vocabulary", "prepare one with this vocabulary.file")
    return StoredTokens(
        open_indexed(path / _NAME), stored, settings["corpus.cleaning"], content["characters"],
        content["target_characters"], content["unknown"], content["token_sha256"],
    )  # fmt: skip


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest of a store, and compares the files with it: sizes, and the checksums of all but large ones."""
    remedy = "prepare the store again"
    try:
        document = parse_record((path / MANIFEST).read_bytes(), _MANIFEST_TYPES)
        content = parse_record(json.dumps(document["content"]), _CONTENT_TYPES)
        if document["sha256"] != _digest(document["content"]):
            raise ValueError("its checksum is wrong")
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"{content['format']} of version {content['version']}, and version {_VERSION} is read")
        if set(content["files"]) != _FILES or not {*_FIXED, *_OPTIONAL, *_TRAINING_PART} <= set(content["settings"]):
            raise ValueError("it is not complete")
        if not all(
            isinstance(entry, list) and [*map(type, entry)] == [int, str] for entry in content["files"].values()
        ):
            raise ValueError("its files are not pairs of a size and a checksum")
    except ValueError as error:
        raise UserError(f"{MANIFEST}: {error}", remedy) from None
    for name, (size, digest) in content["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{name} is missing, or does not have the {size:,} bytes that {MANIFEST} states", remedy)
        if name.endswith(".bin") and size > _MAX_VERIFIED_BYTES:
            continue
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise UserError(f"{name} was changed: its checksum is wrong", remedy)
    return content


def verify_store(source: str) -> None:
    """Reads all tokens of a store. Raises UserError if their checksum is wrong; does nothing if it is no store."""
    path = _local_path(source)
    if path is None or not (path / MANIFEST).is_file():
        return
    with error_origin(f"corpus.source = {source}"), report_os_error("cannot be read"):
        content = _read_manifest(path)
        if token_sha256(open_indexed(path / _NAME)) != content["token_sha256"]:
            raise UserError(f"{_NAME}.bin was changed: its checksum is wrong", "prepare the store again")


def write_store(
    corpus_config: CorpusConfig,
    vocabulary_config: VocabularyConfig,
    vocabulary: Vocabulary,
    tokens: np.ndarray,
    num_characters: int,
    target_characters: int,
) -> Folder:
    """Writes a token store to ``corpus.store``, its manifest last: without it, a store does not exist.

    Args:
        corpus_config: how the tokens were made; its cleaning is resolved
        vocabulary_config: how the tokens were made
        vocabulary: that of the tokens
        tokens: token ids (tokens,)
        num_characters: number of characters of the text
        target_characters: number of characters of all tokens but the first

    Raises:
        UserError: there is such a store, or it cannot be written
    """
    folder = Folder.resolve(corpus_config.store)
    dtype = smallest_dtype(len(vocabulary))
    stops = np.flatnonzero(tokens == len(vocabulary) - 1) + 1 if vocabulary.has_separator else np.empty(0, np.int64)
    lengths = np.diff(np.concatenate([[0], stops, [len(tokens)]]))  # a separator ends the document before it
    lengths = lengths[lengths > 0]
    ids = tokens.astype(dtype.newbyteorder("<"))
    files: dict[str, bytes | memoryview] = {
        f"{_NAME}.bin": ids.data.cast("B"),
        f"{_NAME}.idx": format_index(lengths, dtype),
        VOCABULARY: vocabulary.to_json().encode(),
    }
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "tokens": len(tokens),
        "documents": len(lengths),
        "characters": num_characters,
        "target_characters": target_characters,
        "unknown": count_unknown(tokens, vocabulary),
        "dtype": dtype.name,
        "token_sha256": token_sha256(tokens),
        "settings": corpus_config.values() | vocabulary_config.values(),
        "files": {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
    }
    manifest = json.dumps({"content": content, "sha256": _digest(content)}, indent=1).encode()
    with report_os_error(f"corpus.store = {folder}: cannot be written"):
        folder.write(_MARKER)
        for name in folder.names():
            if name.startswith(
                tuple(f".{file}." for file in (*_FILES, MANIFEST, _MARKER))
            ):  # of an attempt that was killed
                folder.remove(name)
        for name, data in files.items():
            folder.write(name, data)
        folder.write(MANIFEST, manifest)
        folder.remove(_MARKER)
    return folder


def check_no_store(store: str) -> None:
    """Raises UserError if ``corpus.store`` is empty, or names a folder that is in use."""
    if not store:
        raise UserError("corpus.store is empty", "give the folder to write: --corpus.store PATH")
    folder = Folder.resolve(store)
    with report_os_error(f"corpus.store = {folder}: cannot be read"):
        if folder.exists() and not folder.is_folder:
            raise UserError(f"corpus.store = {folder}: is not a folder", "choose another one")
        names = folder.names()
        incomplete = _FILES if _MARKER in names else set()  # of an attempt that failed
        if others := [name for name in names if name not in incomplete and not name.startswith(".")]:
            problem = f"corpus.store = {folder}: exists and contains {others[0]}"
            raise UserError(problem, "choose another folder, or remove it")
