"""Where a text may be cut, so that its pieces, cleaned and encoded one by one, have the tokens of the whole."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import AnyStr

_BLANK = re.compile(r"[\s\u180e]")  # also U+180E, which only older versions of Unicode call a blank


def last_cut(text: str | bytes, kind: str, cleaning: str = "none") -> int:
    """Returns the last position at which a text may be cut, whatever follows it. 0 if there is none.

    The tokens of what is before and of what is after the position are, one after another, those of the text:

    - char, byte: anywhere but between ``\\r`` and ``\\n``
    - word: next to a blank
    - bpe: after a ``\\n`` between two characters that are not blank, where the pre-tokenizer of GPT-2 always splits
    - with ``cleaning = d2l``, which cleans line by line: after a line end

    Args:
        text: the beginning of a text, or the part of it after another cut; not cleaned
        kind: char, byte, word or bpe
        cleaning: d2l or none
    """
    if isinstance(text, bytes):
        return len(text)
    if cleaning == "d2l":
        return max(text.rfind("\n"), text.rfind("\r", 0, max(0, len(text) - 1))) + 1
    if kind == "bpe":
        return _last_cut_between_lines(text)
    if text.endswith("\r"):
        return len(text) - 1
    if kind == "word" and text and not text[-1].isspace():
        return len(text) - len(text.rsplit(maxsplit=1)[-1])
    return len(text)


def _last_cut_between_lines(text: str) -> int:
    newline = text.rfind("\n", 1, -1)
    while newline > 0:
        if not _BLANK.match(text[newline - 1]) and not _BLANK.match(text[newline + 1]):
            return newline + 1
        newline = text.rfind("\n", 1, newline)
    return 0


def cut_text(blocks: Iterable[AnyStr], find_cut: Callable[[AnyStr], int]) -> Iterator[AnyStr]:
    """Yields a text in pieces of about the size of its blocks, cut where it may be.

    Args:
        blocks: the text, in blocks of any size
        find_cut: returns the last position at which a text may be cut, as ``last_cut`` does
    """
    parts: list[AnyStr] = []  # of the piece
    for block in blocks:
        context = parts[-1][-2:] + block if parts else block  # on which a cut in or before the block depends
        cut = find_cut(context)
        parts.append(block)
        if cut:
            text = block[:0].join(parts)
            cut += len(text) - len(context)
            yield text[:cut]
            parts = [text[cut:]]
    if parts and (rest := parts[0][:0].join(parts)):
        yield rest


def blocks_of(text: AnyStr, size: int) -> Iterator[AnyStr]:
    """Yields successive blocks of a text."""
    return (text[start : start + size] for start in range(0, len(text), size))
