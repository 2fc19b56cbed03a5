"""Tokens of the tokenizers library: byte-level byte-pair encoding trained on a text, or any ``tokenizer.json``."""

import contextlib
import importlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, cast

import numpy as np

from job.data.cuts import MAX_UNCUT, blocks_of, cut_text
from job.data.vocabulary import SEPARATOR_TEXT, Vocabulary
from job.documents import parse_json
from job.errors import UserError

PIECE_CHARACTERS, _BATCH_CHARACTERS = 1 << 13, 1 << 19  # that the library encodes in one call: bounds the memory
_MAX_TOKENS = 1 << 24
# Of cl100k_base and Llama 3, and of Qwen 2. Each begins a part after a newline, and at a blank, that is between two
# characters that are not blank.
_LINE_PATTERNS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{count}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for count in ("{1,3}", "")
}
# How byte-level tokenizers write bytes: printable ones as characters of Latin-1, the others as characters from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER = sorted({*range(256)} - {*_PRINTABLE})
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how other tokenizers write the bytes of characters that are no tokens
_BYTES = {chr(value): value for value in _PRINTABLE} | {chr(256 + index): value for index, value in enumerate(_OTHER)}


def import_tokenizers() -> Any:
    """The optional dependency tokenizers. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        raise UserError("vocabulary.kind = bpe: is not installed", "pip install tokenizers") from None


@dataclass(frozen=True)
class BpeVocabulary(Vocabulary):
    """The tokens of a ``tokenizer.json``.

    Args:
        kind: bpe
        tokens: the token of each id, as the tokenizer writes it, without the separator
        has_separator: whether the last id is that of a special token, which then separates documents
        json: the content of ``tokenizer.json``, as the library writes it
        unknown_id: the id of the unknown token, None without one
        is_byte_level: whether each character of a token represents a byte
        can_cut: whether the pre-tokenizer always splits where ``last_cut`` does
    """

    json: str = ""
    unknown_id: int | None = None
    is_byte_level: bool = True
    can_cut: bool = True
    file_name: ClassVar[str] = "tokenizer.json"

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without the library's object

    @cached_property
    def _tokenizer(self) -> Any:
        return _load(self.json)

    def encode(
        self, lines: list[str] | list[bytes] | list[np.ndarray], dtype: np.dtype | type = np.int32
    ) -> np.ndarray:
        """Returns the token ids of all lines, each encoded by itself, as ``Vocabulary.encode``."""
        if lines and isinstance(lines[0], np.ndarray):
            return super().encode(lines, dtype)
        return self._encode_pieces(self._pieces_of(cast(list[str], lines)), dtype)

    def _encode_separated(self, documents: Sequence[list[str]], dtype: np.dtype | type) -> np.ndarray:
        pieces = ((None,) * bool(number) + (*self._pieces_of(lines),) for number, lines in enumerate(documents))
        return self._encode_pieces(chain.from_iterable(pieces), dtype)

    def _pieces_of(self, lines: list[str]) -> Iterator[str]:
        blocks = (blocks_of(line, PIECE_CHARACTERS) for line in lines)
        return chain.from_iterable(cut_text(line, self.last_cut, self.max_uncut) for line in blocks)

    def _encode_pieces(self, pieces: Iterable[str | None], dtype: np.dtype | type) -> np.ndarray:
        """Returns the token ids of pieces, the separator for None."""
        return np.concatenate([self._encode_batch(batch) for batch in _batches(pieces)]).astype(dtype, copy=False)

    def _encode_batch(self, pieces: Sequence[str | None]) -> np.ndarray:
        with _report_error("vocabulary: its tokenizer cannot encode the text"):
            texts = [piece or "" for piece in pieces]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        separator = [len(self) - 1]
        ids = (
            (separator if piece is None else encoding.ids) for piece, encoding in zip(pieces, encodings, strict=True)
        )
        return np.array([*chain.from_iterable(ids)], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return cast(str, self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def decode_after(self, previous: int, ids: Sequence[int]) -> str:
        """Returns the text of token ids after another one: with the blank that decoders remove before the first."""
        before = self.decode([previous])
        if self.is_byte_level or "\ufffd" in before:  # it is a byte of a character, which may be decoded with the next
            return self.decode(ids)
        return self.decode([previous, *ids])[len(before) :]

    def last_cut(self, text: str | bytes, cleaning: str = "none") -> int:
        """Returns the last position at which a text may be cut; 0 if that of this tokenizer is not known."""
        return super().last_cut(text, cleaning) if self.can_cut else 0

    @property
    def max_uncut(self) -> int | None:
        """After how many characters without a place to cut a text is cut; None if such places are not known."""
        return MAX_UNCUT if self.can_cut else None

    @cached_property
    def num_characters(self) -> np.ndarray:
        """The number of characters of each token by id, the blank before it included; a separator is one.

        A character that several tokens share counts for the first of them.
        """
        return np.array([sum(byte & 0xC0 != 0x80 for byte in text) for text in self.token_bytes()], np.int64)

    def token_bytes(self) -> list[bytes]:
        """Returns the text of each id within others, as ``Vocabulary.token_bytes``."""
        if self.is_byte_level:
            texts = [
                bytes(_BYTES[character] for character in token) if _BYTES.keys() >= {*token} else token.encode()
                for token in self.tokens
            ]
        else:  # the second of two, since decoders remove a blank before the first
            one, two = (self._tokenizer.decode_batch([[i] * n for i in range(len(self.tokens))], False) for n in (1, 2))
            texts = [
                bytes([int(match[1], 16)]) if match and once != token else twice[len(once) :].encode()
                for token, match, once, twice in zip(
                    self.tokens, map(_BYTE.fullmatch, self.tokens), one, two, strict=True
                )
            ]
        return [*texts, b"\n"][: len(self)]

    def unknown_tokens(self, lines: list[str]) -> list[str]:
        """Returns the parts of all lines that are not in the vocabulary, each once."""
        if self.unknown_id is None:
            return []
        return list(dict.fromkeys(chain.from_iterable(map(self._unknown_parts, lines))))

    def _unknown_parts(self, line: str) -> Iterator[str]:
        encoding = self._tokenizer.encode(line, add_special_tokens=False)
        return (line[slice(*place)] for index, place in zip(encoding.ids, encoding.offsets, strict=True)
                if index == self.unknown_id)  # fmt: skip

    def to_json(self) -> str:
        """Returns the content of ``tokenizer.json``."""
        return self.json


def _batches(pieces: Iterable[str | None]) -> Iterator[list[str | None]]:
    batch, length = list[str | None](), 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece or "")
        if length >= _BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    yield batch


def train_bpe(pieces: Iterable[str], size: int, min_frequency: int = 0, has_separator: bool = False) -> BpeVocabulary:
    """Trains a byte-level tokenizer as that of GPT-2. It is the same for any order of the pieces.

    Args:
        pieces: a text, cut where ``last_cut`` does; read once, one after another
        size: the largest number of tokens, of which 256 are bytes, with the separator
        min_frequency: how often two successive tokens occur, at least, to become one
        has_separator: whether one more token, the last, separates documents; no text is encoded as it
    """
    library = import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size - has_separator, min_frequency=min_frequency, show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(pieces, trainer)
    if has_separator:
        tokenizer.add_special_tokens([SEPARATOR_TEXT])
    return tokenizer_from_json(tokenizer.to_str().encode())


def tokenizer_from_json(data: bytes) -> BpeVocabulary:
    """Reads the content of a ``tokenizer.json``. Its padding, truncation and dropout are ignored.

    Raises:
        ValueError: it is damaged, or its ids are not successive
        UserError: the tokenizers library is not installed, or cannot read it
    """
    with _report_error("its tokenizer cannot be read"), _discarded_stderr():
        tokenizer = _load(data.decode())
    content = parse_json(tokenizer.to_str())  # only what the library uses
    model, added = content["model"], content["added_tokens"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = tuple(sorted(vocabulary, key=vocabulary.__getitem__))
    if not 0 < len(tokens) <= _MAX_TOKENS or [vocabulary[token] for token in tokens] != [*range(len(tokens))]:
        raise ValueError("the ids of its tokens are not successive")
    special = {token["content"] for token in added if token["special"]}
    has_separator = tokens[-1] in special
    unknown_id = model.get("unk_id", vocabulary.get(model.get("unk_token")))
    return BpeVocabulary(
        "bpe", tokens[: len(tokens) - has_separator], has_separator, tokenizer.to_str(),
        unknown_id if unknown_id is not None and unknown_id < len(tokens) - has_separator else None,
        (content.get("decoder") or {}).get("type") == "ByteLevel",
        len(special) == len(added) and _splits_lines(content),
    )  # fmt: skip


@contextlib.contextmanager
def _report_error(problem: str) -> Iterator[None]:
    """Raises UserError in place of an error of the library, whose classes are ``Exception`` and one for bugs."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{problem}: {str(error).splitlines()[0]}") from None
        raise


@contextlib.contextmanager
def _discarded_stderr() -> Iterator[None]:
    """Discards what is written to the file descriptor of standard error, as the library does when it is in error."""
    try:
        descriptor = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(descriptor, 2)
        os.close(descriptor)


def _splits_lines(content: dict[str, Any]) -> bool:
    """Returns whether a tokenizer splits a text where ``last_cut`` does before it encodes the parts."""
    pre_tokenizer, is_byte_level = content.get("pre_tokenizer") or {}, {"type": "ByteLevel", "add_prefix_space": False}
    if content.get("normalizer"):
        return False
    if pre_tokenizer.get("type") != "Sequence":
        return _contains(pre_tokenizer, is_byte_level | {"use_regex": True})
    first, *others = pre_tokenizer["pretokenizers"]
    is_known = _contains(first, {"type": "Split", "invert": False}) and first["pattern"].get("Regex") in _LINE_PATTERNS
    return is_known and len(others) == 1 and _contains(others[0], is_byte_level)


def _contains(values: dict[str, Any], expected: dict[str, Any]) -> bool:
    return values | expected == values


def _load(text: str) -> Any:
    """Returns the library's tokenizer, which encodes special tokens in a text as any other text."""
    tokenizer = import_tokenizers().Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer
