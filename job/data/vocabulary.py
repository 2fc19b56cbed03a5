"""Text to token ids and back."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from job.config.schema import VocabularyConfig
from job.data.corpus import Corpus
from job.errors import UserError

UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by their ids; ``<unk>`` has id 0, except among bytes, where none is unknown.

    For ``kind = byte`` an id is the byte's value and ``tokens`` is empty.
    """

    kind: str
    tokens: tuple[str, ...]

    def __len__(self) -> int:
        return 256 if self.kind == "byte" else len(self.tokens)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def encode(self, lines: Iterable[str] | Iterable[bytes]) -> np.ndarray:
        """Ids of the tokens of all lines, one after the other: (tokens,) int32."""
        parts = [self._encode_line(line) for line in lines]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def _encode_line(self, line: str | bytes) -> np.ndarray:
        if self.kind == "byte":
            data = line.encode() if isinstance(line, str) else line
            return np.frombuffer(data, np.uint8).astype(np.int32)
        assert isinstance(line, str)
        if self.kind == "word":
            return np.array([self._ids.get(word, 0) for word in line.split()], np.int32)
        points = np.frombuffer(line.encode("utf-32-le", "surrogatepass"), np.uint32)
        table = self._id_of_code_point
        return table[np.minimum(points, len(table) - 1)]

    @cached_property
    def _id_of_code_point(self) -> np.ndarray:
        """Ids by code point; the last entry serves all beyond the largest known."""
        known = {ord(token): index for token, index in self._ids.items() if len(token) == 1}
        table = np.zeros(max(known, default=0) + 2, np.int32)
        table[list(known)] = list(known.values())
        return table

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""
        if self.kind == "byte":
            return bytes(ids).decode("utf-8", errors="replace")
        return (" " if self.kind == "word" else "").join(self.tokens[index] for index in ids)

    def contains_known_token(self, ids: np.ndarray) -> bool:
        """Whether any of the tokens is a known one."""
        return bool(len(ids)) and (self.kind == "byte" or bool((ids != 0).any()))

    def to_json(self) -> str:
        """The vocabulary as the text of ``vocabulary.json``."""
        return json.dumps({"kind": self.kind, "tokens": self.tokens}, ensure_ascii=True)


def build_vocabulary(vocabulary_config: VocabularyConfig, text: Corpus) -> Vocabulary:
    """The book's vocabulary of a text: ``<unk>``, then by falling frequency, ties by first sight."""
    if vocabulary_config.kind == "byte":
        return Vocabulary("byte", ())
    counts: Counter[str] = Counter()
    for line in text.lines:
        assert isinstance(line, str)
        counts.update(line if vocabulary_config.kind == "char" else line.split())
    by_frequency = [token for token, count in counts.most_common() if count >= vocabulary_config.min_frequency]
    tokens = (UNKNOWN, *(token for token in by_frequency if token != UNKNOWN))
    return Vocabulary(vocabulary_config.kind, tokens[: vocabulary_config.size or None])


def vocabulary_from_json(data: bytes, where: str) -> Vocabulary:
    """A vocabulary from the bytes of ``vocabulary.json``; UserError where they are not one."""
    try:
        found = json.loads(data)
        kind, tokens = found["kind"], found["tokens"]
        sound = kind in ("char", "word", "byte") and isinstance(tokens, list)
        sound = sound and all(isinstance(token, str) for token in tokens)
        sound = sound and len(set(tokens)) == len(tokens)
        sound = sound and (tokens == [] if kind == "byte" else tokens[:1] == [UNKNOWN])
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{where}: not a vocabulary")
    return Vocabulary(kind, tuple(tokens))
