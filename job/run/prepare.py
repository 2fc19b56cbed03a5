"""Prepares a token store of a corpus piece by piece, in this process or by tasks on a cluster."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial, reduce
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from job.config.schema import Config
from job.config.text import CorpusConfig, VocabularyConfig
from job.console import Console, format_duration
from job.data.corpus import find_corpus, no_text
from job.data.cuts import MAX_UNCUT
from job.data.dataset import num_train
from job.data.manifest import MANIFEST, Shard, read_manifest
from job.data.piece_encoder import (
    EncodedPiece,
    TokenLengths,
    count_piece,
    encode_piece,
    measure_piece,
    parse_receipt,
)
from job.data.piece_reader import PieceReader
from job.data.pieces import PIECE_BYTES, TextFormat, cut_files, default_cut
from job.data.source import SourceFile
from job.data.store_writer import (
    RECEIPT,
    StoreInfo,
    check_no_store,
    discard_store,
    finish_store,
    start_store,
    store_settings,
    write_manifest,
)
from job.data.vocabulary import Vocabulary
from job.data.vocabulary_builder import counted_vocabulary, train_vocabulary
from job.data.vocabulary_file import find_vocabulary, read_vocabulary, read_vocabulary_file
from job.errors import RunFailed, UserError, error_origin, report_os_error
from job.paths import check_no_credentials
from job.run.lease import LOCK_FILE, acquire_lease, wait_until_expired
from job.run.signals import EXIT_DELAY_S, ExitTimer, StopRequest
from job.storage import Folder

_PROGRESS_DELAY_S = 2.0  # before the first line of progress
_FILES_AT_ONCE = 16  # whose sizes are requested
_CLUSTER_EXIT_DELAY_S = 30.0  # of a process that is interrupted; Ray ends within seconds
_INTERRUPTED = "interrupted; the same command continues"
Result = TypeVar("Result")
Task = tuple[int, int | None]  # a piece, and the largest number of its tokens; None: all


class RunTasks(Protocol):
    """Calls a function for each task, and yields what it returns in the order of the tasks."""

    def __call__(self, function: Callable[[int, int | None], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Raises UserError as the function; no further task is started then."""
        ...


def run_in_process(function: Callable[[int, int | None], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """The ``RunTasks`` of this process: one task after another."""
    return (function(*task) for task in tasks)


def prepare_store(
    config: Config, console: Console, open_tasks: Callable[[], AbstractContextManager[RunTasks]] | None = None
) -> int:
    """Writes the corpus as a token store to ``corpus.store``, or continues to, and prints a description of it.

    Args:
        config: as the user gave it
        console: shows the progress
        open_tasks: connects to a cluster that runs the tasks of several pieces; None: run them in this process

    Returns:
        the exit status: 0, or 128 and the number of the signal that has interrupted it

    Raises:
        UserError: the corpus cannot be read, or the store not be written
    """
    stop_request = StopRequest()
    stop_request.can_save = False  # each finished piece is saved at once
    with stop_request.installed():
        try:
            with ExitTimer(EXIT_DELAY_S, partial(console.print, _INTERRUPTED)) as exit_timer:
                _prepare_store(config, console, open_tasks, exit_timer)
        except KeyboardInterrupt:
            console.print(_INTERRUPTED)
            return stop_request.exit_code or 130
    return 0


def _prepare_store(
    config: Config, console: Console, open_tasks: Callable[[], AbstractContextManager[RunTasks]] | None,
    exit_timer: ExitTimer,
) -> None:  # fmt: skip
    check_no_store(config.corpus.store)
    given = read_vocabulary(config.vocabulary) if config.vocabulary.file else None
    preparation = Preparation(config.corpus, config.vocabulary, given, console)
    tasks: AbstractContextManager[RunTasks] = nullcontext(run_in_process)
    if open_tasks and len(preparation.pieces) > 1:  # of a single piece there is nothing to share
        exit_timer.delay_s, tasks = _CLUSTER_EXIT_DELAY_S, open_tasks()
    with tasks as run_tasks:
        console.print(preparation.run(config.corpus.store, run_tasks))


class Preparation:
    """One store that is prepared. Reads and writes nothing of the store until it runs.

    Raises UserError if the corpus has no files.

    Args:
        corpus_config: the source, its format and its cleaning
        vocabulary_config: of the vocabulary that is built
        given: a vocabulary that exists; None: build one
        console: shows the progress
        field: what gave the source, for messages
        remedy: for the message if the store cannot be written
    """

    def __init__(
        self, corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig, given: Vocabulary | None,
        console: Console, field: str = "corpus.source", remedy: str = "grant write access or free space there",
    ) -> None:  # fmt: skip
        self.console, self.vocabulary_config, self.given = console, vocabulary_config, given
        self.field, self.remedy = field, remedy
        check_no_credentials(field, corpus_config.source)
        with error_origin(f"{field} = {corpus_config.source}"):
            self.corpus_config, files = find_corpus(corpus_config)
            self.described = describe_files(files)
            self.pieces = cut_files(files, [size for size, _ in self.described], self._text_format())

    def _text_format(self) -> TextFormat:
        kind, cleaning, given = self.vocabulary_config.kind, self.corpus_config.cleaning, self.given
        find_cut = partial(given.last_cut, cleaning=cleaning) if given else default_cut(kind, cleaning)
        has_separator, max_uncut = given is None or given.has_separator, given.max_uncut if given else MAX_UNCUT
        return TextFormat(self.corpus_config, kind, has_separator, find_cut, self.field, max_uncut)

    @property
    def identity(self) -> dict[str, Any]:
        """Returns all that decides the bytes of the store."""
        settings = store_settings(self.corpus_config, self.vocabulary_config)
        names = [file.name for file in self.pieces.files]
        input_digest = hashlib.sha256(json.dumps([names, self.described]).encode())
        if self.given:
            input_digest.update(self.given.to_json().encode())
        del settings["corpus.store"]
        sizes = {"pieces": len(self.pieces), "piece_bytes": PIECE_BYTES, "max_uncut": self.pieces.text_format.max_uncut}
        return {"settings": settings, "input": input_digest.hexdigest(), **sizes}

    def run(self, store: str, run_tasks: RunTasks) -> str:
        """Writes the store; returns a description of it.

        Args:
            store: the store's folder
            run_tasks: encodes the pieces

        Raises:
            UserError: the corpus cannot be read, or the folder is in use or cannot be written
        """
        self.run_tasks, folder = run_tasks, replace(check_no_store(store), retry=True)
        existed = folder.exists()
        try:
            return self._run_with_lease(folder)
        except UserError:
            if not existed and folder.local_path:
                _remove_unused(folder.local_path)
            raise

    def _run_with_lease(self, folder: Folder) -> str:
        observer = wait_until_expired(folder, self.console.print, "this store", "corpus.store")
        try:
            lease = acquire_lease(folder, observer)
        except RunFailed as error:
            raise UserError(f"corpus.store = {error.problem}", self.remedy) from None
        with lease:
            check_no_store(folder.address)  # another process may have finished it meanwhile
            try:
                return self._write(lease.folder)
            except UserError:
                with suppress(OSError):
                    if not read_receipts(lease.folder):  # nothing would be continued
                        discard_store(lease.folder)
                raise

    def _write(self, folder: Folder) -> str:
        with report_os_error(f"corpus.store = {folder}: cannot be written", self.remedy):
            done = read_receipts(folder) if start_store(folder, self.identity) else {}
            vocabulary = self._vocabulary(folder)
            if folder.has(MANIFEST):  # an earlier attempt ended after it had written all
                finish_store(folder)
                return _describe_store(folder, read_manifest(folder).shards, vocabulary)
        tasks = [task for task in self._limited_tasks(vocabulary) if task[0] not in done]
        encode = partial(encode_piece, self.pieces, vocabulary, folder, self.remedy)
        done |= dict(zip((piece for piece, _ in tasks), self._run("encoding", encode, tasks), strict=True))
        encoded = [done[piece] for piece in range(len(self.pieces))]
        with report_os_error(f"corpus.store = {folder}: cannot be written", self.remedy):
            try:
                self._check_text(encoded)
            except UserError:
                discard_store(folder)
                raise
            return self._finish(folder, vocabulary, encoded)

    def _check_text(self, encoded: list[EncodedPiece]) -> None:
        """Raises UserError if there are too few tokens, or the files were changed while they were read."""
        num_tokens = sum(shard.tokens for piece in encoded for shard in piece.shards)
        with error_origin(f"{self.field} = {self.corpus_config.source}"):
            if not any(piece.characters for piece in encoded):
                raise no_text(self.corpus_config.cleaning)
            if num_tokens < 2:
                raise UserError(f"{num_tokens} tokens", "give more text")
            if describe_files(self.pieces.files) != self.described:
                raise UserError("its files were changed while they were read", "start it again")

    def _finish(self, folder: Folder, vocabulary: Vocabulary, encoded: list[EncodedPiece]) -> str:
        """Writes the manifest; returns a description of the store."""
        shards = [shard for piece in encoded for shard in piece.shards]
        lengths = reduce(TokenLengths.then, (piece.lengths for piece in encoded if piece.lengths))
        num_characters = sum(piece.characters for piece in encoded)
        corpus_config = replace(self.corpus_config, store="")  # so that a store has the same bytes in any folder
        info = StoreInfo(corpus_config, self.vocabulary_config, num_characters, lengths.total - lengths.first)
        write_manifest(folder, shards, vocabulary, info)
        return _describe_store(folder, shards, vocabulary)

    def _vocabulary(self, folder: Folder) -> Vocabulary:
        """Returns the vocabulary that an earlier attempt has written; else makes and writes it."""
        if name := find_vocabulary(folder.names()):
            return read_vocabulary_file(folder, name, str(folder / name))
        vocabulary = self.given or self._build_vocabulary()
        folder.write(vocabulary.file_name, vocabulary.to_json().encode())
        return vocabulary

    def _build_vocabulary(self) -> Vocabulary:
        config, reader, all_pieces = self.vocabulary_config, PieceReader(self.pieces), self._all_tasks()
        if config.kind == "byte":
            return counted_vocabulary(config, Counter(), reader.has_separators())
        if config.kind == "bpe":
            texts = self._show("training", all_pieces, (reader.read(piece) for piece, _ in all_pieces))
            lines = (cast(str, line) for part in chain.from_iterable(texts) for line in part.lines)
            return train_vocabulary(config, lines, reader.has_separators())
        counts, lengths, has_separator = self._count(all_pieces)
        num_tokens = sum(lengths)
        num_counted = num_train(min(num_tokens, self.corpus_config.max_tokens or num_tokens), self.corpus_config)
        if config.scope == "training" and num_counted < num_tokens:
            counts, _, _ = self._count([task for task in limit_tasks(lengths, num_counted) if task[1]])
        return counted_vocabulary(config, counts, has_separator)

    def _count(self, tasks: list[Task]) -> tuple[Counter[str], list[int], bool]:
        """Returns how often each token occurs, the number of tokens of each piece, and whether there is a separator."""
        counts, lengths, has_separator = Counter[str](), [], False
        for found in self._run("counting", partial(count_piece, self.pieces, self.vocabulary_config), tasks):
            counts.update(found.counts)
            lengths.append(found.num_tokens)
            has_separator = has_separator or found.has_separator
        return counts, lengths, has_separator

    def _all_tasks(self) -> list[Task]:
        return [(piece, None) for piece in range(len(self.pieces))]

    def _limited_tasks(self, vocabulary: Vocabulary) -> list[Task]:
        """Returns the tasks that encode the first ``corpus.max_tokens``."""
        tasks = self._all_tasks()
        if not self.corpus_config.max_tokens:
            return tasks
        lengths = [*self._run("measuring", partial(measure_piece, self.pieces, vocabulary), tasks)]
        return limit_tasks(lengths, self.corpus_config.max_tokens)

    def _run(self, verb: str, function: Callable[[int, int | None], Result], tasks: list[Task]) -> Iterator[Result]:
        return self._show(verb, tasks, self.run_tasks(function, tasks))

    def _show(self, verb: str, tasks: list[Task], results: Iterable[Result]) -> Iterator[Result]:
        """Yields the results of tasks, and shows the progress by the bytes of their pieces."""
        sizes = [self.pieces.num_bytes[piece] for piece, _ in tasks]
        started_at, total, done = time.monotonic(), max(1, sum(sizes)), 0
        for size, result in zip(sizes, results, strict=True):
            yield result
            done += size
            seconds = time.monotonic() - started_at
            if seconds > _PROGRESS_DELAY_S and done < total:
                share, left = done / total, format_duration(seconds * (total - done) / max(1, done))
                self.console.progress(f"{verb} {share:.0%}  {done / seconds / 1e6:,.1f} MB/s  {left} left")


def _describe_store(folder: Folder, shards: Iterable[Shard], vocabulary: Vocabulary) -> str:
    return f"{folder}: {sum(shard.tokens for shard in shards):,} tokens, vocabulary of {len(vocabulary):,}"


def _remove_unused(path: Path) -> None:
    """Removes the folder of a store of which nothing was written."""
    with suppress(OSError):
        if [file.name for file in path.iterdir()] == [LOCK_FILE]:
            (path / LOCK_FILE).unlink()
            path.rmdir()


def describe_files(files: Sequence[SourceFile]) -> list[tuple[int, str]]:
    """Returns the size of each file, and what identifies its content."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        return [*threads.map(SourceFile.describe, files)]


def limit_tasks(lengths: list[int], num_tokens: int) -> list[Task]:
    """Returns a task for each piece, which together have the first ``num_tokens`` of them.

    Args:
        lengths: number of tokens of each piece
        num_tokens: number of tokens
    """
    starts = accumulate(lengths[:-1], initial=0)
    return [
        (piece, max(0, min(length, num_tokens - start)))
        for piece, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def read_receipts(folder: Folder) -> dict[int, EncodedPiece]:
    """Returns the receipts of a store that is being written, by piece, of those whose shards are complete."""
    sizes, receipts = folder.sizes(), dict[int, EncodedPiece]()
    for match in filter(None, map(RECEIPT.fullmatch, sizes)):
        with suppress(ValueError):
            receipt = parse_receipt(folder.read(match[0]))
            files = {name: size for shard in receipt.shards for name, (size, _) in shard.files.items()}
            if all(sizes.get(name) == size for name, size in files.items()):
                receipts[int(match[1])] = receipt
    return receipts
