"""Writes token stores: shard by shard, and the manifest last, without which a store does not exist."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from job.config.field import format_value
from job.config.text import CorpusConfig, VocabularyConfig
from job.data.indexed import format_index, smallest_dtype
from job.data.manifest import MANIFEST, MARKER, SHARD_FILE, Manifest, Shard, describe_file, format_manifest
from job.data.tokens import count_unknown, token_sha256
from job.data.vocabulary import Vocabulary
from job.documents import parse_record
from job.errors import UserError, error_origin, report_os_error
from job.paths import check_no_credentials
from job.storage import Folder

LEASE_FILES = ("owner.json", "heartbeat.json")  # of the process that writes a store
RECEIPT = re.compile(r"\.receipt-(\d{5,})\.json")  # of a piece whose shards are written
_FILES = re.compile(rf"{SHARD_FILE.pattern}|vocabulary\.json|tokenizer\.json")  # but the manifest


def shard_name(piece: int, number: int = 0) -> str:
    """Returns the name of a shard's files without their suffixes.

    Args:
        piece: the piece of the corpus
        number: of the shard within its piece
    """
    return f"tokens-{piece:05}" + f"-{number:05}" * bool(number)


def write_shard(folder: Folder, name: str, tokens: np.ndarray, vocabulary: Vocabulary) -> Shard:
    """Writes one part of a store.

    Args:
        folder: the store's folder
        name: what ``shard_name`` returned
        tokens: token ids (tokens,); a separator ends the document before it
        vocabulary: that of the tokens

    Raises:
        OSError: it cannot be written
    """
    dtype = smallest_dtype(len(vocabulary))
    lengths = _document_lengths(tokens, vocabulary)
    ids = tokens.astype(dtype.newbyteorder("<"), copy=False)
    files: dict[str, bytes | memoryview] = {
        f"{name}.bin": ids.data.cast("B"),
        f"{name}.idx": format_index(lengths, dtype),
    }
    for file, data in files.items():
        folder.write(file, data)
    described = {file: describe_file(data) for file, data in files.items()}
    return Shard(name, len(ids), len(lengths), count_unknown(tokens, vocabulary), token_sha256(tokens), described)


def _document_lengths(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    stops = np.flatnonzero(tokens == len(vocabulary) - 1) + 1 if vocabulary.has_separator else np.empty(0, np.int64)
    lengths = np.diff(np.concatenate([[0], stops, [len(tokens)]]))
    return lengths[lengths > 0]


@dataclass(frozen=True)
class StoreInfo:
    """How the tokens of a store were made.

    Args:
        corpus: its cleaning is resolved
        vocabulary: of the configuration
        characters: number of characters of the text
        target_characters: number of characters of all tokens but the first
    """

    corpus: CorpusConfig
    vocabulary: VocabularyConfig
    characters: int
    target_characters: int


def store_settings(corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig) -> dict[str, Any]:
    """Returns the fields that a store is made with, by name: all but ``corpus.documents``, which a run reads."""
    values = corpus_config.values() | vocabulary_config.values()
    return {name: value for name, value in values.items() if name != "corpus.documents"}


def write_manifest(folder: Folder, shards: list[Shard], vocabulary: Vocabulary, info: StoreInfo) -> None:
    """Writes the vocabulary and the manifest, with which the store is complete. Raises OSError if it cannot."""
    data = vocabulary.to_json().encode()
    folder.write(vocabulary.file_name, data)
    settings = store_settings(info.corpus, info.vocabulary)
    dtype, files = smallest_dtype(len(vocabulary)), {vocabulary.file_name: describe_file(data)}
    manifest = Manifest(info.characters, info.target_characters, dtype, settings, tuple(shards), files)
    folder.write(MANIFEST, format_manifest(manifest, _count_documents(folder, shards, vocabulary)))
    finish_store(folder)


def _count_documents(folder: Folder, shards: list[Shard], vocabulary: Vocabulary) -> int:
    """Returns the number of documents; one that successive shards share counts once."""
    dtype = smallest_dtype(len(vocabulary)).newbyteorder("<")
    last_ids = (folder.read_block(shard.ids, -dtype.itemsize, dtype.itemsize) for shard in shards[:-1])
    num_shared = sum(
        not vocabulary.has_separator or int(np.frombuffer(data, dtype)[0]) != len(vocabulary) - 1 for data in last_ids
    )
    return sum(shard.documents for shard in shards) - num_shared


def start_store(folder: Folder, identity: dict[str, Any]) -> bool:
    """Marks the folder of a store that is being written, and removes what is left of files half-written.

    Args:
        folder: the store's folder
        identity: all that the store is made of: ``settings``, and others

    Returns:
        Whether an interrupted attempt to write the same store is continued. What one of other files left is removed.

    Raises:
        UserError: a store of other settings was interrupted and has finished pieces, or one of others is complete
        OSError: the folder cannot be read or written
    """
    names = folder.names()
    found = _read_marker(folder) if MARKER in names else None
    is_same = found == json.loads(json.dumps(identity))
    if MANIFEST in names and not is_same:
        raise _in_use(folder, MANIFEST)
    has_receipts = any(map(RECEIPT.fullmatch, names))
    if found and has_receipts and (settings := found["settings"]) != identity["settings"]:
        name = next(name for name in identity["settings"] if settings.get(name) != identity["settings"][name])
        values = (format_value(values.get(name, "")) for values in (identity["settings"], settings))
        problem = "{} = {}, and an interrupted prepare started it with {}".format(name, *values)
        raise UserError(f"corpus.store = {folder}: {problem}", "set the same, choose another folder, or remove it")
    for name in names:
        base = name[1:].rpartition(".")[0]
        is_temporary = name.startswith(".") and (_is_part(base) or base in (MANIFEST, MARKER))
        if is_temporary or (not is_same and _is_part(name)):
            folder.remove(name)
    if not is_same:
        folder.write(MARKER, json.dumps(identity).encode())
    return is_same


def _is_part(name: str) -> bool:
    """Returns whether a file belongs to a store that is being written."""
    return bool(_FILES.fullmatch(name) or RECEIPT.fullmatch(name))


def _read_marker(folder: Folder) -> dict[str, Any] | None:
    try:
        return parse_record(folder.read(MARKER), {"settings": dict})
    except ValueError:  # of another version
        return None


def discard_store(folder: Folder) -> None:
    """Removes all files of a store that is being written; does nothing if it is complete."""
    names = folder.names()
    for name in names if MANIFEST not in names else ():
        if _is_part(name) or name == MARKER:
            folder.remove(name)


def finish_store(folder: Folder) -> None:
    """Removes what only a store that is being written needs, after the manifest was written."""
    for name in folder.names():
        if RECEIPT.fullmatch(name):
            folder.remove(name)
    folder.remove(MARKER)


def check_no_store(store: str) -> Folder:
    """Returns the folder ``corpus.store``. Raises UserError if it is empty, or names a folder that is in use."""
    if not store:
        raise UserError("corpus.store is empty", "give the folder to write: --corpus.store PATH")
    check_no_credentials("corpus.store", store)
    with error_origin(f"corpus.store = {store}"):
        folder = Folder.resolve(store, is_named=True)
    with report_os_error(f"corpus.store = {folder}: cannot be read"):
        if folder.exists() and not folder.is_folder:
            raise UserError(f"corpus.store = {folder}: is not a folder", "choose another one")
        names = folder.names()
        is_incomplete = MARKER in names  # of an attempt that was interrupted, even after it wrote the manifest
        others = [name for name in names if not name.startswith(".") and name not in LEASE_FILES]
        others = [name for name in others if not (is_incomplete and (_FILES.fullmatch(name) or name == MANIFEST))]
        if others:
            raise _in_use(folder, others[0])
    return folder


def _in_use(folder: Folder, name: str) -> UserError:
    return UserError(f"corpus.store = {folder}: exists and contains {name}", "choose another folder, or remove it")
