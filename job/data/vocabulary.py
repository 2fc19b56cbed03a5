"""Text to token ids and back."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import cast

import numpy as np

from job.config.schema import VocabularyConfig
from job.data.corpus import NEWLINE, Corpus
from job.documents import parse_json
from job.errors import UserError, report_os_error
from job.storage import Folder

UNKNOWN, UNKNOWN_ID = "<unk>", 0
END_OF_LINE = "\n"  # as a token between words, none of which contains it
SEPARATOR_TEXT = "<|endoftext|>"  # how the token between two documents is shown
MAX_UNKNOWN_SHARE = 0.2  # without a warning


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, by id.

    Args:
        kind: char, word or byte
        tokens: the token of each id, ``<unk>`` first; empty if the tokens are bytes, whose ids are their values
        has_separator: whether one more token, the last, separates documents; no text is encoded as it
    """

    kind: str
    tokens: tuple[str, ...]
    has_separator: bool = False

    def __len__(self) -> int:
        return (256 if self.kind == "byte" else len(self.tokens)) + self.has_separator

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @property
    def names(self) -> tuple[str, ...]:
        """A name of each id that is the same in all vocabularies of this kind."""
        tokens = tuple(map(str, range(256))) if self.kind == "byte" else self.tokens
        return tokens + (f" {SEPARATOR_TEXT}",) * self.has_separator  # neither a character nor a word

    def encode_documents(
        self, documents: Sequence[list[str]] | Sequence[list[bytes]] | Sequence[list[np.ndarray]]
    ) -> np.ndarray:
        """Returns the token ids of the documents, each of which has tokens, with the separator between two if any."""
        separator = np.full(int(self.has_separator), len(self) - 1, np.int32)
        arrays = [array for document in documents for array in (separator, self.encode(document))]
        return np.concatenate(arrays[1:]) if arrays else np.empty(0, np.int32)

    def encode(self, lines: list[str] | list[bytes] | list[np.ndarray]) -> np.ndarray:
        """Returns the token ids of all lines, concatenated: (tokens,) int32. Unknown tokens have id 0.

        Raises:
            UserError: a line is an array, and one of its token ids is not in the vocabulary
        """
        if self.kind == "word" and not (lines and isinstance(lines[0], np.ndarray)):
            words = chain.from_iterable(_split_words(cast(list[str], lines), END_OF_LINE in self._ids))
            return np.fromiter((self._ids.get(word, UNKNOWN_ID) for word in words), np.int32)
        arrays = [self._encode_line(line) for line in lines]
        return np.concatenate(arrays) if arrays else np.empty(0, np.int32)

    def _encode_line(self, line: str | bytes | np.ndarray) -> np.ndarray:
        if isinstance(line, np.ndarray):
            invalid = line[(line < 0) | (line >= len(self))]
            if len(invalid):
                raise UserError(f"tokens: {invalid[0]} is not the id of a token, of which there are {len(self)}")
            return line
        if self.kind == "byte":
            data = line.encode() if isinstance(line, str) else line
            return np.frombuffer(data, np.uint8).astype(np.int32)
        assert isinstance(line, str)
        code_points = np.frombuffer(line.encode("utf-32-le", "surrogatepass"), np.uint32)
        table = self._ids_by_code_point
        return table[np.minimum(code_points, len(table) - 1)]

    @cached_property
    def _ids_by_code_point(self) -> np.ndarray:
        """Token ids indexed by code point; the last entry, 0, is for all larger code points."""
        ids = {ord(token): index for token, index in self._ids.items() if len(token) == 1}
        table = np.zeros(max(ids, default=0) + 2, np.int32)
        table[list(ids)] = list(ids.values())
        return table

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; words are joined by spaces, and documents by ``<|endoftext|>``."""
        if self.kind == "byte":
            separator = SEPARATOR_TEXT.encode()
            return b"".join(separator if index > 255 else bytes([index]) for index in ids).decode(errors="replace")
        texts = (*self.tokens, SEPARATOR_TEXT)
        text = (" " if self.kind == "word" else "").join(texts[index] for index in ids)
        return re.sub(" ?\n ?", "\n", text) if self.kind == "word" else text

    @property
    def has_unknown(self) -> bool:
        """Whether there is an ``<unk>``, which a byte vocabulary does not need."""
        return self.kind != "byte"

    def is_unknown(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token id is that of ``<unk>``."""
        return (ids == UNKNOWN_ID) & self.has_unknown

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token id is that of a known text, and neither that of ``<unk>`` nor that of the separator."""
        return ~self.is_unknown(ids) & (ids < len(self) - self.has_separator)

    def unknown_tokens(self, lines: list[str]) -> list[str]:
        """Returns the tokens of all lines that are not in the vocabulary, each once."""
        tokens = dict.fromkeys(filter(None, self.split([lines])))
        return [token for token in tokens if self.has_unknown and token not in self._ids]

    def split(self, documents: Iterable[list[str]]) -> Iterator[str | None]:
        """Yields the tokens of documents as text, None for the separator; those of a byte vocabulary as characters."""
        return _split_documents(documents, self.kind, END_OF_LINE in self._ids)

    def to_json(self) -> str:
        """Returns the content of ``vocabulary.json``."""
        separator = {"separator": True} if self.has_separator else {}
        return json.dumps({"kind": self.kind, "tokens": self.tokens, **separator}, ensure_ascii=True)


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
    """Yields the words of each line, with a token between two lines if there is one for it."""
    if not has_end_of_line:
        yield from (line.split() for line in lines)
        return
    for number, part in enumerate(chain.from_iterable(map(NEWLINE.split, lines))):
        yield ([END_OF_LINE] if number else []) + part.split()


def _split_documents(documents: Iterable[list[str]], kind: str, has_end_of_line: bool) -> Iterator[str | None]:
    """Yields the tokens of documents, characters or words, and None between two documents."""
    return chain.from_iterable(_pieces(documents, kind, has_end_of_line))


def _pieces(documents: Iterable[list[str]], kind: str, has_end_of_line: bool) -> Iterator[Iterable[str | None]]:
    for number, lines in enumerate(documents):
        if number:
            yield (None,)
        yield from _split_words(lines, has_end_of_line) if kind == "word" else lines


def build_vocabulary(vocabulary_config: VocabularyConfig, corpus: Corpus, num_tokens: int | None = None) -> Vocabulary:
    """Builds a vocabulary as the d2l book does (section 9.2), or reads the one that ``vocabulary.file`` names.

    After ``<unk>`` and the end of line, tokens are ordered by falling frequency, ties by first occurrence. There is a
    separator if there is more than one document.

    Args:
        vocabulary_config: the kind of tokens, the largest size and the smallest frequency
        corpus: the text whose tokens are counted
        num_tokens: number of tokens that are counted, from the first; None: all

    Raises:
        UserError: the file cannot be read, or is of another kind
    """
    if vocabulary_config.file:
        return read_vocabulary(vocabulary_config)
    has_separator, kind = len(corpus.documents) > 1, vocabulary_config.kind
    if kind == "byte":
        return Vocabulary("byte", (), has_separator)
    documents, has_end_of_line = cast(Sequence[list[str]], corpus.documents), vocabulary_config.end_of_line
    counts = Counter(islice(_split_documents(documents, kind, has_end_of_line), num_tokens))
    special = (UNKNOWN, END_OF_LINE) if has_end_of_line else (UNKNOWN,)
    frequent = [token for token, count in counts.most_common() if token and count >= vocabulary_config.min_frequency]
    tokens = (*special, *(token for token in frequent if token not in special))
    size = max(1, vocabulary_config.size - has_separator) if vocabulary_config.size else None
    return Vocabulary(kind, tokens[:size], has_separator)


def read_vocabulary(vocabulary_config: VocabularyConfig) -> Vocabulary:
    """Reads the vocabulary that ``vocabulary.file`` names. Raises UserError as ``build_vocabulary``."""
    origin, path = f"vocabulary.file = {vocabulary_config.file}", Folder.resolve(vocabulary_config.file)
    with report_os_error(f"{origin}: cannot be read"):
        vocabulary = vocabulary_from_json(path.parent.read(path.name), origin)
    if vocabulary.kind != vocabulary_config.kind:
        problem = f"{origin}: its tokens are of kind {vocabulary.kind}, and vocabulary.kind = {vocabulary_config.kind}"
        raise UserError(problem, "set the same kind")
    return vocabulary


def vocabulary_from_json(data: bytes, file: str) -> Vocabulary:
    """Reads the content of a ``vocabulary.json``.

    Args:
        data: the file's bytes
        file: the file's path, for the message

    Raises:
        UserError: the data is not a vocabulary
    """
    try:
        content = parse_json(data)
        kind, tokens = content["kind"], content["tokens"]
        "".join(tokens).encode()  # raises if a token is not text
        has_separator = content.get("separator", False)
        is_valid = isinstance(tokens, list) and len(set(tokens)) == len(tokens) and isinstance(has_separator, bool)
        is_valid = is_valid and (tokens == [] if kind == "byte" else kind in ("char", "word") and tokens[0] == UNKNOWN)
    except (ValueError, LookupError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{file}: not a vocabulary")
    return Vocabulary(kind, tuple(tokens), has_separator)
