"""Writes token stores: shard by shard, and the manifest last, without which a store does not exist."""

import re
from dataclasses import dataclass

import numpy as np

from job.config.schema import CorpusConfig, VocabularyConfig
from job.data.indexed import format_index, smallest_dtype
from job.data.manifest import MANIFEST, Manifest, Shard, describe_file, format_manifest
from job.data.tokens import count_unknown, token_sha256
from job.data.vocabulary import Vocabulary
from job.errors import UserError, report_os_error
from job.storage import Folder

SHARD_TOKENS = 64 << 20  # of a store that is written from memory
_MARKER = ".preparing"  # in the folder of a store that is being written
_FILES = re.compile(r"tokens-\d{5,}\.(bin|idx)|vocabulary\.json|tokenizer\.json")  # but the manifest


def write_shard(folder: Folder, index: int, tokens: np.ndarray, vocabulary: Vocabulary) -> Shard:
    """Writes one part of a store.

    Args:
        folder: the store's folder
        index: number of the shard
        tokens: token ids (tokens,); a separator ends the document before it
        vocabulary: that of the tokens

    Raises:
        OSError: it cannot be written
    """
    dtype, name = smallest_dtype(len(vocabulary)), f"tokens-{index:05}"
    lengths = _document_lengths(tokens, vocabulary)
    ids = tokens.astype(dtype.newbyteorder("<"))
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


def write_manifest(folder: Folder, shards: list[Shard], vocabulary: Vocabulary, info: StoreInfo) -> None:
    """Writes the vocabulary and the manifest, with which the store is complete. Raises OSError if it cannot."""
    data = vocabulary.to_json().encode()
    folder.write(vocabulary.file_name, data)
    settings = info.corpus.values() | info.vocabulary.values()
    dtype, files = smallest_dtype(len(vocabulary)), {vocabulary.file_name: describe_file(data)}
    manifest = Manifest(info.characters, info.target_characters, dtype, settings, tuple(shards), files)
    folder.write(MANIFEST, format_manifest(manifest))
    folder.remove(_MARKER)


def start_store(folder: Folder) -> None:
    """Marks the folder of a store that is being written, and removes what a killed attempt left in it."""
    folder.write(_MARKER)
    for name in folder.names():
        base = name[1:].rpartition(".")[0]
        if name.startswith(".") and (_FILES.fullmatch(base) or base in (MANIFEST, _MARKER)):
            folder.remove(name)


def write_store(
    tokens: np.ndarray, vocabulary: Vocabulary, info: StoreInfo, shard_tokens: int = SHARD_TOKENS
) -> Folder:
    """Writes tokens in memory as a store to ``corpus.store``.

    Args:
        tokens: token ids (tokens,)
        vocabulary: that of the tokens
        info: how they were made
        shard_tokens: number of tokens of each shard but the last

    Raises:
        UserError: it cannot be written
    """
    folder = Folder.resolve(info.corpus.store)
    with report_os_error(f"corpus.store = {folder}: cannot be written"):
        start_store(folder)
        starts = range(0, len(tokens), shard_tokens)
        shards = [
            write_shard(folder, index, tokens[start : start + shard_tokens], vocabulary)
            for index, start in enumerate(starts)
        ]
        write_manifest(folder, shards, vocabulary, info)
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
        is_incomplete = _MARKER in names  # of an attempt that failed
        others = [name for name in names if not name.startswith(".") and not (is_incomplete and _FILES.fullmatch(name))]
        if others:
            problem = f"corpus.store = {folder}: exists and contains {others[0]}"
            raise UserError(problem, "choose another folder, or remove it")
