"""Counts the tokens of a piece of a corpus, or writes them as shards of a token store."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice, pairwise
from typing import cast

import numpy as np

from job.config.text import VocabularyConfig
from job.data.indexed import smallest_dtype
from job.data.manifest import Shard, parse_shard
from job.data.piece_reader import Part, PieceReader
from job.data.pieces import Pieces
from job.data.store_writer import shard_name, write_shard
from job.data.tokens import count_characters
from job.data.vocabulary import END_OF_LINE, Vocabulary
from job.data.vocabulary_builder import count_tokens
from job.documents import parse_record
from job.errors import report_os_error
from job.storage import Folder

SHARD_CHARACTERS = 64 << 20  # after which a piece that is not cut, such as a compressed file, begins another shard
_RECEIPT_TYPES = {"shards": list, "characters": int, "lengths": dict | None}
_LENGTHS_TYPES = {"total": int, "first": int, "begins_with_break": bool, "ends_with_break": bool}


@dataclass(frozen=True)
class PieceCounts:
    """The tokens of a piece.

    Args:
        counts: how often each token occurs, in the order of the first occurrences
        num_tokens: number of tokens, separators included
        has_separator: whether one of them is a separator
    """

    counts: Counter[str]
    num_tokens: int
    has_separator: bool


@dataclass(frozen=True)
class TokenLengths:
    """The characters of successive tokens. Those of a word include the blank before it, unless it begins a line.

    Args:
        total: of all tokens, as if a word were before the first
        first: of the first token
        begins_with_break: whether no blank can be before the first token
        ends_with_break: whether no blank is after the last token, which is a separator or an end of line
    """

    total: int
    first: int
    begins_with_break: bool
    ends_with_break: bool

    def then(self, other: "TokenLengths") -> "TokenLengths":
        """Returns the characters of these tokens and those that follow."""
        overlap = self.ends_with_break and not other.begins_with_break
        return TokenLengths(
            self.total + other.total - overlap, self.first, self.begins_with_break, other.ends_with_break
        )


@dataclass(frozen=True)
class EncodedPiece:
    """The receipt of a piece whose shards are written.

    Args:
        shards: its shards
        characters: number of characters of its text
        lengths: the characters of its tokens; None without tokens
    """

    shards: tuple[Shard, ...]
    characters: int
    lengths: TokenLengths | None

    def to_json(self) -> bytes:
        """Returns the content of the receipt's file."""
        return json.dumps(asdict(self)).encode()


def parse_receipt(data: bytes) -> EncodedPiece:
    """Reads the file of a receipt. Raises ValueError if it is malformed."""
    values = parse_record(data, _RECEIPT_TYPES)
    lengths = values["lengths"] and TokenLengths(**parse_record(json.dumps(values["lengths"]), _LENGTHS_TYPES))
    return EncodedPiece(tuple(map(parse_shard, values["shards"])), values["characters"], lengths)


def receipt_name(piece: int) -> str:
    """Returns the name of a receipt's file in the folder of a store that is being written."""
    return f".receipt-{piece:05}.json"


def count_piece(pieces: Pieces, vocabulary_config: VocabularyConfig, piece: int, num_tokens: int | None) -> PieceCounts:
    """Counts the tokens of a piece, at most ``num_tokens`` if not None. Raises UserError as ``PieceReader.read``."""
    counts, length, has_separator = Counter[str](), 0, False
    for part in PieceReader(pieces).read(piece):
        limit = None if num_tokens is None else max(0, num_tokens - length)
        found = count_tokens(vocabulary_config, cast(list[list[str]], part.documents), limit)
        counts.update(found)
        num_separators = len(part.documents) - 1 + part.has_separator
        length += found.total() + num_separators  # which may be beyond the limit
        has_separator = has_separator or bool(num_separators)
    return PieceCounts(counts, length, has_separator)


def measure_piece(pieces: Pieces, vocabulary: Vocabulary, piece: int, num_tokens: int | None) -> int:
    """Returns the number of a piece's tokens, at most ``num_tokens`` if not None. Raises as ``PieceReader.read``."""
    return sum(len(ids) for _, ids in _encode_parts(pieces, vocabulary, piece, num_tokens))


def encode_piece(
    pieces: Pieces, vocabulary: Vocabulary, folder: Folder, remedy: str, piece: int, num_tokens: int | None
) -> EncodedPiece:
    """Writes the tokens of a piece as shards, and then its receipt.

    Args:
        pieces: the pieces of the corpus
        vocabulary: that of the tokens
        folder: the store's folder
        remedy: for the message if it cannot be written
        piece: the number of the piece
        num_tokens: the largest number of tokens; None: all

    Raises:
        UserError: as ``PieceReader.read``, or the shards cannot be written
    """
    shards, lengths, num_characters, arrays, num_waiting = list[Shard](), None, 0, list[np.ndarray](), 0

    def write() -> None:
        tokens = np.concatenate(arrays) if arrays else np.empty(0)
        if len(tokens):
            shards.append(write_shard(folder, shard_name(piece, len(shards)), tokens, vocabulary))
        arrays.clear()

    with report_os_error(f"corpus.store = {folder}: cannot be written", remedy):
        for part, ids in _encode_parts(pieces, vocabulary, piece, num_tokens):
            num_waiting += part.num_characters
            num_characters += part.num_characters
            if len(ids):
                arrays.append(ids)
                found = _token_lengths(part, ids, vocabulary)
                lengths = lengths.then(found) if lengths else found
            if num_waiting >= SHARD_CHARACTERS:
                write()
                num_waiting = 0
        write()
        encoded = EncodedPiece(tuple(shards), num_characters, lengths)
        folder.write(receipt_name(piece), encoded.to_json())
    return encoded


def _encode_parts(
    pieces: Pieces, vocabulary: Vocabulary, piece: int, num_tokens: int | None
) -> Iterator[tuple[Part, np.ndarray]]:
    """Yields the parts of a piece and their token ids, a separator included."""
    dtype, length = smallest_dtype(len(vocabulary)), 0
    for part in PieceReader(pieces).read(piece):
        if length == num_tokens:
            yield part, np.empty(0, dtype)
            continue
        ids = vocabulary.encode_documents(part.documents, dtype)
        if part.has_separator:
            ids = np.append(ids, dtype.type(len(vocabulary) - 1))
        ids = ids if num_tokens is None else ids[: num_tokens - length]
        length += len(ids)
        yield part, ids


def _token_lengths(part: Part, ids: np.ndarray, vocabulary: Vocabulary) -> TokenLengths:
    """Returns the characters of a part's token ids."""
    total, first = count_characters(ids, vocabulary), count_characters(ids[:1], vocabulary)
    if total is not None and first is not None:
        return TokenLengths(total, first, begins_with_break=True, ends_with_break=True)
    tokens = chain(vocabulary.split(cast(list[list[str]], part.documents)), [None])  # which is a separator
    words = [token or END_OF_LINE for token in islice(tokens, len(ids))]
    num_breaks, is_break = words.count(END_OF_LINE), END_OF_LINE.__eq__
    num_first = (
        sum(is_break(word) and not is_break(following) for word, following in pairwise(words)) if num_breaks else 0
    )
    total = sum(map(len, words)) + len(words) - num_breaks - num_first
    return TokenLengths(
        total, len(words[0]) + (words[0] != END_OF_LINE), words[0] == END_OF_LINE, words[-1] == END_OF_LINE
    )
