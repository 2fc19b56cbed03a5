"""Large texts as token stores in the folder of caches, which runs on this machine memory-map."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import mul
from pathlib import Path
from typing import Any

from job.config.text import CorpusConfig, VocabularyConfig
from job.console import Console, format_bytes, program
from job.data.file_format import is_compressed_name
from job.data.manifest import MANIFEST, VERSION
from job.data.source import BUILT_IN, SourceFile, find_files
from job.data.token_store import StoredTokens, open_stored
from job.data.tokens import token_sha256
from job.data.vocabulary import Vocabulary
from job.errors import UserError, error_origin, report_os_error
from job.paths import cache_folder, check_no_credentials
from job.run.prepare import Preparation, describe_files, run_in_process
from job.storage import Folder

MAX_TEXT_BYTES = 64 << 20  # of the files of a text that is read into memory
_EXPANSION = 4  # of compressed files and Parquet, about, when they are read
MAX_SENT_BYTES = 1 << 30  # of one whose tokens are sent to other machines
_MAX_UNUSED_S = 30 * 24 * 3600.0  # after which a store is removed
_REMEDY = "free space there, or set XDG_CACHE_HOME to another folder"
_LOCK, _DIGEST = ".text-cache.lock", ".tokens.sha256"  # in the folder of a store


@dataclass(frozen=True)
class TextCache:
    """Opens large texts as token stores.

    Args:
        console: shows the progress of preparing one
        is_local: whether the tokens are read on this machine only
    """

    console: Console
    is_local: bool

    def open(
        self, corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig, vocabulary: Vocabulary | None,
        field: str = "corpus.source",
    ) -> StoredTokens | None:  # fmt: skip
        """Returns the tokens of a text, which is prepared if it was not before; None if it fits into memory.

        Args:
            corpus_config: the source; its ``max_tokens`` are prepared
            vocabulary_config: of the vocabulary that is built
            vocabulary: one that exists; None: build one
            field: what gave the source, for messages

        Returns:
            The same tokens with the same digest as of the text in memory.

        Raises:
            UserError: the text cannot be read or prepared, or is too large to be sent to other machines
        """
        check_no_credentials(field, corpus_config.source)
        if vocabulary:
            vocabulary_config = replace(vocabulary_config, kind=vocabulary.kind)
        num_bytes = _count_bytes(corpus_config.source, field)
        if num_bytes <= MAX_TEXT_BYTES or (num_bytes <= MAX_SENT_BYTES and not self.is_local):
            return None
        if not self.is_local:
            problem = f"{field} = {corpus_config.source}: {format_bytes(num_bytes)} are too large to send to the nodes"
            command = f"{program()} prepare … --corpus.store FOLDER"
            raise UserError(problem, f"write a token store into a folder that all nodes share: {command}")
        corpus_config = _settings_of_tokens(corpus_config, vocabulary_config)
        preparation = Preparation(corpus_config, vocabulary_config, vocabulary, self.console, field, _REMEDY)
        with report_os_error("the folder of caches cannot be used", _REMEDY):
            folder = cache_folder() / "stores" / _digest(preparation)
            with self._locked(folder):
                return self._open(folder, preparation, vocabulary)

    def _open(self, folder: Path, preparation: Preparation, vocabulary: Vocabulary | None) -> StoredTokens:
        def open_store() -> StoredTokens | None:
            corpus_config = replace(preparation.corpus_config, source=str(folder))
            return open_stored(corpus_config, preparation.vocabulary_config, vocabulary, reads_flat=False)

        stored = None
        with contextlib.suppress(UserError):  # it is damaged
            stored = open_store()
        if stored is None:
            _remove_unused(folder.parent)
            if (folder / MANIFEST).exists():
                _clear(folder)
            self.console.print(preparation.run(str(folder), run_in_process))
            stored = open_store()
        assert stored
        os.utime(folder)
        return replace(stored, sha256=_read_digest(Folder(str(folder)), stored))

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Waits until no other process on this machine prepares the same text."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / _LOCK, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.console.print("waiting for another process that prepares the same text")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _count_bytes(source: str, field: str) -> int:
    """Returns about how many bytes of text a source contains; 0 if it is neither in storage nor on the web."""
    if source in BUILT_IN:
        return 0
    with error_origin(f"{field} = {source}"):
        _, files = find_files(source)
        files = [file for file in files if file.place or file.url]
        sizes = (size for size, _ in describe_files(files))
        factors = (_EXPANSION if is_compressed_name(file.name) else 1 for file in files)
        return sum(map(mul, sizes, factors))


def _settings_of_tokens(corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig) -> CorpusConfig:
    """Returns the configuration without what does not decide the tokens."""
    is_counted = vocabulary_config.scope == "training"
    fraction = corpus_config.validation_fraction if is_counted else CorpusConfig.validation_fraction
    return replace(corpus_config, store="", validation_source="", validation_fraction=fraction)


def _digest(preparation: Preparation) -> str:
    """Returns the digest of all that decides the tokens, and of the files' places and identities."""
    content = [VERSION, preparation.identity, [*map(_place, preparation.pieces.files)]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _place(file: SourceFile) -> Any:
    """Returns where a file is, and when it was changed last, which no program can set, of one on a disk."""
    if file.place is None:
        return file.name
    folder, name = file.place
    return (folder / name).address, folder.local_path and (folder.local_path / name).stat().st_ctime_ns


def _read_digest(folder: Folder, stored: StoredTokens) -> str:
    """Returns the digest of a store's tokens as of tokens in memory, which is computed once."""
    if not folder.has(_DIGEST):
        folder.write(_DIGEST, token_sha256(stored.tokens).encode())
    return folder.read(_DIGEST).decode()


def _remove_unused(folder: Path) -> None:
    """Removes the stores that no run has opened for a long time."""
    oldest = time.time() - _MAX_UNUSED_S
    for path in folder.iterdir():
        if path.stat().st_mtime < oldest:
            shutil.rmtree(path, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Removes a damaged store."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink()
