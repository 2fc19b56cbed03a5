"""Text to token ids and back."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import cast

import numpy as np

from job.config.schema import VocabularyConfig
from job.data.corpus import Corpus
from job.documents import parse_json
from job.errors import UserError, report_os_error
from job.storage import Folder

UNKNOWN, UNKNOWN_ID = "<unk>", 0
MAX_UNKNOWN_SHARE = 0.2  # without a warning


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, by id.

    Args:
        kind: char, word or byte
        tokens: the token of each id, ``<unk>`` first; empty if the tokens are bytes, whose ids are their values
    """

    kind: str
    tokens: tuple[str, ...]

    def __len__(self) -> int:
        return 256 if self.kind == "byte" else len(self.tokens)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def encode(self, lines: Iterable[str] | Iterable[bytes] | Iterable[np.ndarray]) -> np.ndarray:
        """Returns the token ids of all lines, concatenated: (tokens,) int32. Unknown tokens have id 0.

        Raises:
            UserError: a line is an array, and one of its token ids is not in the vocabulary
        """
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
        if self.kind == "word":
            return np.array([self._ids.get(word, UNKNOWN_ID) for word in line.split()], np.int32)
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
        """Returns the text of token ids; words are joined by spaces."""
        if self.kind == "byte":
            return bytes(ids).decode("utf-8", errors="replace")
        return (" " if self.kind == "word" else "").join(self.tokens[index] for index in ids)

    @property
    def has_unknown(self) -> bool:
        """Whether there is an ``<unk>``, which a byte vocabulary does not need."""
        return self.kind != "byte"

    def is_unknown(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token id is that of ``<unk>``."""
        return (ids == UNKNOWN_ID) & self.has_unknown

    def unknown_share(self, ids: np.ndarray) -> float:
        """Returns the share of ``<unk>`` among token ids, of which there is at least one."""
        return float(self.is_unknown(ids).mean())

    def unknown_tokens(self, lines: Iterable[str]) -> list[str]:
        """Returns the tokens of all lines that are not in the vocabulary, each once."""
        tokens = dict.fromkeys(_split_lines(lines, self.kind))
        return [token for token in tokens if self.has_unknown and token not in self._ids]

    def to_json(self) -> str:
        """Returns the content of ``vocabulary.json``."""
        return json.dumps({"kind": self.kind, "tokens": self.tokens}, ensure_ascii=True)


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


def _split_lines(lines: Iterable[str], kind: str) -> Iterator[str]:
    """Returns the tokens of all lines, by the kind of a vocabulary: characters or words."""
    return chain.from_iterable(line.split() if kind == "word" else line for line in lines)


def build_vocabulary(vocabulary_config: VocabularyConfig, corpus: Corpus, num_tokens: int | None = None) -> Vocabulary:
    """Builds a vocabulary as the d2l book does (section 9.2), or reads the one that ``vocabulary.file`` names.

    After ``<unk>``, tokens are ordered by falling frequency, ties by first occurrence.

    Args:
        vocabulary_config: the kind of tokens, the largest size and the smallest frequency
        corpus: the text whose tokens are counted
        num_tokens: number of tokens that are counted, from the first; None: all

    Raises:
        UserError: the file cannot be read, or is of another kind
    """
    if vocabulary_config.file:
        return _read_vocabulary(vocabulary_config)
    if vocabulary_config.kind == "byte":
        return Vocabulary("byte", ())
    lines = cast(list[str], corpus.lines)
    counts = Counter(islice(_split_lines(lines, vocabulary_config.kind), num_tokens))
    frequent = [token for token, count in counts.most_common() if count >= vocabulary_config.min_frequency]
    tokens = (UNKNOWN, *(token for token in frequent if token != UNKNOWN))
    return Vocabulary(vocabulary_config.kind, tokens[: vocabulary_config.size or None])


def _read_vocabulary(vocabulary_config: VocabularyConfig) -> Vocabulary:
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
        is_valid = isinstance(tokens, list) and len(set(tokens)) == len(tokens)
        is_valid = is_valid and (tokens == [] if kind == "byte" else kind in ("char", "word") and tokens[0] == UNKNOWN)
    except (ValueError, LookupError, TypeError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{file}: not a vocabulary")
    return Vocabulary(kind, tuple(tokens))
