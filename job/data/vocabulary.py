"""Text to token ids and back."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, repeat
from typing import Any, ClassVar, cast

import numpy as np

from job.config.text import CorpusConfig
from job.data.corpus import NEWLINE
from job.data.cuts import MAX_UNCUT, blocks_of, cut_text, last_cut
from job.data.indexed import smallest_dtype
from job.errors import UserError

UNKNOWN, UNKNOWN_ID = "<unk>", 0
END_OF_LINE = "\n"  # as a token between words, none of which contains it
SEPARATOR_TEXT = "<|endoftext|>"  # how the token between two documents is shown
BLOCK_CHARACTERS = 1 << 18  # that are converted at a time, which stay in the cache
MAX_UNKNOWN_SHARE = 0.2  # without a warning


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, by id.

    Args:
        kind: char, word, byte or bpe
        tokens: the token of each id, ``<unk>`` first; empty if the tokens are bytes, whose ids are their values
        has_separator: whether one more token, the last, separates documents; no text is encoded as it
    """

    kind: str
    tokens: tuple[str, ...]
    has_separator: bool = False
    file_name: ClassVar[str] = "vocabulary.json"  # in a checkpoint and a token store

    def __len__(self) -> int:
        return (256 if self.kind == "byte" else len(self.tokens)) + self.has_separator

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def reset_token(self, corpus_config: CorpusConfig) -> int | None:
        """Returns the separator if ``corpus.documents`` is ``reset``, else None."""
        return len(self) - 1 if self.has_separator and corpus_config.documents == "reset" else None

    @property
    def names(self) -> tuple[str, ...]:
        """A name of each id that is the same in all vocabularies of this kind."""
        tokens = tuple(map(str, range(256))) if self.kind == "byte" else self.tokens
        return tokens + (f" {SEPARATOR_TEXT}",) * self.has_separator  # neither a character nor a word

    def token_bytes(self) -> list[bytes]:
        """Returns the text of each id in UTF-8. The separator is a newline, and ``<unk>`` is one byte."""
        tokens = [bytes([value]) for value in range(256)] if self.kind == "byte" else [*map(str.encode, self.tokens)]
        return [b"?"] * self.has_unknown + tokens[self.has_unknown :] + [b"\n"] * self.has_separator

    def encode_documents(
        self, documents: Sequence[list[str]] | Sequence[list[bytes]] | Sequence[list[np.ndarray]],
        dtype: np.dtype | type = np.int32,
    ) -> np.ndarray:  # fmt: skip
        """Returns the token ids of the documents, each of which has tokens, with the separator between two if any."""
        if self.has_separator and len(documents) > 1:
            return self._encode_separated(cast(Sequence[list[str]], documents), dtype)
        arrays = [self.encode(document, dtype) for document in documents]
        return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, dtype), *arrays])

    def _encode_separated(self, documents: Sequence[list[str]], dtype: np.dtype | type) -> np.ndarray:
        """Encodes documents at once, since there may be many short ones."""
        separator = len(self) - 1
        if self.kind == "word":
            ids_or_separator = cast(dict[str | None, int], self._ids) | {None: separator}
            return np.fromiter(map(ids_or_separator.get, self.split(documents), repeat(UNKNOWN_ID)), dtype)
        texts: list[Any] = [lines[0] if len(lines) == 1 else lines[0][:0].join(lines) for lines in documents]
        if self.kind == "byte":
            texts = [text.encode() if isinstance(text, str) else text for text in texts]
        ids = self.encode([(b"\n" if self.kind == "byte" else "\n").join(texts)], dtype)  # type: ignore[arg-type]
        ids[np.cumsum([*map(len, texts[:-1])]) + np.arange(len(texts) - 1)] = separator  # in place of the newlines
        return ids

    def encode(
        self, lines: list[str] | list[bytes] | list[np.ndarray], dtype: np.dtype | type = np.int32
    ) -> np.ndarray:
        """Returns the token ids of all lines, concatenated: (tokens,). Unknown tokens have id 0.

        Args:
            lines: text, its bytes, or token ids
            dtype: of the ids, which must hold those of this vocabulary

        Raises:
            UserError: a line is an array, and one of its token ids is not in the vocabulary
        """
        if self.kind == "word" and not (lines and isinstance(lines[0], np.ndarray)):
            words = chain.from_iterable(_split_words(cast(list[str], lines), END_OF_LINE in self._ids))
            return np.fromiter(map(self._ids.get, words, repeat(UNKNOWN_ID)), dtype)
        if self.kind == "char" and lines and isinstance(lines[0], str):
            lines = ["".join(lines)]  # at once: there may be many short ones
        arrays = [self._encode_line(line) for line in lines]
        ids = arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, dtype), *arrays])
        return ids.astype(dtype, copy=False)

    def _encode_line(self, line: str | bytes | np.ndarray) -> np.ndarray:
        """Returns the token ids of a line in the smallest dtype that holds those of this vocabulary."""
        if isinstance(line, np.ndarray):
            invalid = line[(line < 0) | (line >= len(self))]
            if len(invalid):
                raise UserError(f"tokens: {invalid[0]} is not the id of a token, of which there are {len(self)}")
            return line.copy()
        if self.kind == "byte":
            return np.frombuffer(line.encode() if isinstance(line, str) else line, np.uint8)
        assert isinstance(line, str)
        table, bytes_table = self._ids_by_code_point, self._ids_by_ascii
        ids = np.empty(len(line), table.dtype)
        for start in range(0, len(line), BLOCK_CHARACTERS):
            block = line[start : start + BLOCK_CHARACTERS]
            part = ids[start : start + len(block)]
            if bytes_table and block.isascii():  # in about two thirds of the time
                part[:] = np.frombuffer(block.encode().translate(bytes_table), np.uint8)
            else:
                np.take(table, code_points_of(block), mode="clip", out=part)
        return ids

    @cached_property
    def _ids_by_code_point(self) -> np.ndarray:
        """Token ids indexed by code point; the last entry, 0, is for all larger code points."""
        ids = {ord(token): index for token, index in self._ids.items() if len(token) == 1}
        table = np.zeros(max(ids, default=0) + 2, smallest_dtype(len(self)))
        table[list(ids)] = list(ids.values())
        return table

    @cached_property
    def _ids_by_ascii(self) -> bytes:
        """The token id of each byte of an ASCII text; empty if the ids have more than a byte."""
        table = self._ids_by_code_point
        return table[:128].tobytes().ljust(256, b"\0") if table.itemsize == 1 else b""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; words are joined by spaces, and documents by ``<|endoftext|>``."""
        if self.kind == "byte":
            separator = SEPARATOR_TEXT.encode()
            return b"".join(separator if index > 255 else bytes([index]) for index in ids).decode(errors="replace")
        text = (" " if self.kind == "word" else "").join(self._texts[index] for index in ids)
        return re.sub(" ?\n ?", "\n", text) if self.kind == "word" else text

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        return (*self.tokens, SEPARATOR_TEXT)

    def decode_after(self, previous: int, ids: Sequence[int]) -> str:
        """Returns the text of token ids after another one; between words there is a blank, which is not included."""
        return self.decode(ids)

    @property
    def unknown_id(self) -> int | None:
        """The id of ``<unk>``; None without one, as a byte vocabulary needs none."""
        return None if self.kind == "byte" else UNKNOWN_ID

    @property
    def has_unknown(self) -> bool:
        """Whether there is an ``<unk>``."""
        return self.unknown_id is not None

    def is_unknown(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token id is that of ``<unk>``."""
        return np.zeros(len(ids), bool) if self.unknown_id is None else ids == self.unknown_id

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token id is that of a known text, and neither that of ``<unk>`` nor that of the separator."""
        return ~self.is_unknown(ids) & (ids < len(self) - self.has_separator)

    def unknown_tokens(self, lines: list[str]) -> list[str]:
        """Returns the tokens of all lines that are not in the vocabulary, each once."""
        tokens = dict.fromkeys(filter(None, self.split([lines])))
        return [token for token in tokens if self.has_unknown and token not in self._ids]

    def split(self, documents: Iterable[list[str]]) -> Iterator[str | None]:
        """Yields the tokens of documents as text, None for the separator; those of a byte vocabulary as characters."""
        return split_documents(documents, self.kind, END_OF_LINE in self._ids)

    @property
    def num_characters(self) -> int | np.ndarray | None:
        """The number of characters (or bytes) of each token, of all or by id; None for words, between which are blanks.

        A separator is one character.
        """
        return None if self.kind == "word" else 1

    @property
    def max_uncut(self) -> int | None:
        """After how many characters without a place to cut a text is cut; None if such places are not known."""
        return MAX_UNCUT

    def last_cut(self, text: str | bytes, cleaning: str = "none") -> int:
        """Returns the last position at which a text may be cut, as ``job.data.cuts.last_cut``."""
        return last_cut(text, self.kind, cleaning)

    def to_json(self) -> str:
        """Returns the content of its file."""
        separator = {"separator": True} if self.has_separator else {}
        return json.dumps({"kind": self.kind, "tokens": self.tokens, **separator}, ensure_ascii=True)


def code_points_of(text: str) -> np.ndarray:
    """Returns the number of each character of a text: (characters,), of 8 bits if they are all ASCII, else of 32."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def format_unknown_share(share: float, separator: str = ", ") -> str:
    """Returns the share of ``<unk>`` as a percentage after a separator; empty if it is 0."""
    return f"{separator}{100 * share:.3g}% {UNKNOWN}" if share else ""


def unknown_warnings(shares: dict[str, float]) -> list[str]:
    """Returns a warning for each text, by its name, of which too large a share is ``<unk>``."""
    remedy = "compare its perplexity only with those of the same vocabulary"
    return [
        f"the {name} text is{format_unknown_share(share, ' ')}; {remedy}"
        for name, share in shares.items()
        if share > MAX_UNKNOWN_SHARE
    ]


def _split_words(lines: Iterable[str], has_end_of_line: bool) -> Iterator[list[str]]:
    """Yields the words of lines, in lists of some, with a token between two lines if there is one for it.

    One of more than ``MAX_UNCUT`` characters is several words, so that a text of any length is read in bounded memory.
    """
    find_cut = partial(last_cut, kind="word")
    parts = chain.from_iterable(map(NEWLINE.split, lines)) if has_end_of_line else lines
    for number, part in enumerate(parts):
        if number and has_end_of_line:
            yield [END_OF_LINE]
        is_short = len(part) <= BLOCK_CHARACTERS
        yield from map(
            str.split, [part] if is_short else cut_text(blocks_of(part, BLOCK_CHARACTERS), find_cut, MAX_UNCUT)
        )


def split_documents(documents: Iterable[list[str]], kind: str, has_end_of_line: bool) -> Iterator[str | None]:
    """Yields the tokens of documents, characters or words, and None between two documents."""
    return chain.from_iterable(_pieces(documents, kind, has_end_of_line))


def _pieces(documents: Iterable[list[str]], kind: str, has_end_of_line: bool) -> Iterator[Iterable[str | None]]:
    for number, lines in enumerate(documents):
        if number:
            yield (None,)
        yield from _split_words(lines, has_end_of_line) if kind == "word" else lines
