"""Where a text may be cut, so that its pieces, cleaned and encoded one by one, have the tokens of the whole."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import AnyStr

MAX_UNCUT = 1 << 20  # characters of a text without a place to cut, after which it is cut nevertheless
_CONTEXT = 2  # characters before a position, and after it, on which it depends whether a text may be cut there
_TWO_LETTERS = re.compile("[A-Za-z]{2}")
_BLANK = re.compile(r"[\s\u180e]")  # also U+180E, which only older versions of Unicode call a blank


def last_cut(text: str | bytes, kind: str, cleaning: str = "none") -> int:
    """Returns the last position at which a text may be cut, whatever follows it. 0 if there is none.

    The tokens of what is before and of what is after the position are, one after another, those of the text:

    - char, byte: anywhere but between ``\\r`` and ``\\n``
    - word: next to a blank
    - bpe: after a ``\\n``, or before a blank, that is between two characters that are not blank, where the
      pre-tokenizer of GPT-2 always splits
    - with ``cleaning = d2l``, which cleans line by line: after a line end; char, byte: or between two letters

    Args:
        text: the beginning of a text, or the part of it after another cut; not cleaned
        kind: char, byte, word or bpe
        cleaning: d2l or none
    """
    if isinstance(text, bytes):
        return len(text)
    if cleaning == "d2l":
        line_end = max(text.rfind("\n"), text.rfind("\r", 0, max(0, len(text) - 1))) + 1
        return max(line_end, _last_cut_between_letters(text)) if kind in ("char", "byte") else line_end
    if kind == "bpe":
        return max(_last_between(text, "\n") + 1, _last_between(text, " "), 0)
    if text.endswith("\r"):
        return len(text) - 1
    if kind == "word" and text and not text[-1].isspace():
        return len(text) - len(text.rsplit(maxsplit=1)[-1])
    return len(text)


def _last_between(text: str, blank: str) -> int:
    """Returns the last position of a blank between two characters that are not blank; -1 if there is none."""
    position = text.rfind(blank, 1, -1)
    while position > 0:
        if not _BLANK.match(text[position - 1]) and not _BLANK.match(text[position + 1]):
            return position
        position = text.rfind(blank, 1, position)
    return -1


def _last_cut_between_letters(text: str) -> int:
    found = _TWO_LETTERS.search(text[::-1])
    return len(text) - found.start() - 1 if found else 0


def cut_text(
    blocks: Iterable[AnyStr], find_cut: Callable[[AnyStr], int], max_uncut: int | None = None
) -> Iterator[AnyStr]:
    """Yields a text in pieces of about the size of its blocks, cut where it may be.

    Args:
        blocks: the text, in blocks of any size
        find_cut: returns the last position at which a text may be cut, as ``last_cut`` does
        max_uncut: at least 2; after how many characters without such a position the text is cut nevertheless, and the
            largest size of a piece; None: any. These cuts are a function of the text from any of its other cuts on.
    """
    before: AnyStr | None = None  # the two characters before the piece
    tail: AnyStr | None = None  # before the next part
    parts, length = list[AnyStr](), 0  # of the piece
    for block in blocks:
        rest = block
        while rest:
            part = rest[: max_uncut + _CONTEXT - length] if max_uncut else rest
            rest = rest[len(part) :]
            context = part if tail is None else tail + part
            tail, start = context[-_CONTEXT:], len(context) - length - len(part)
            parts.append(part)
            length += len(part)
            found = _last_up_to(context, start + max_uncut, find_cut) if max_uncut else find_cut(context)
            cut = found - start if found else 0
            if max_uncut and cut <= 0 and length == max_uncut + _CONTEXT:
                cut = max_uncut
            if cut > 0:
                text = block[:0].join(parts)
                yield text[:cut]
                end = text[max(0, cut - _CONTEXT) : cut]
                before = tail = end if before is None else (before + end)[-_CONTEXT:]
                rest, parts, length = text[cut:] + rest, [], 0
    if parts and (last := parts[0][:0].join(parts)):
        yield from blocks_of(last, max_uncut or len(last))


def _last_up_to(text: AnyStr, limit: int, find_cut: Callable[[AnyStr], int]) -> int:
    """Returns the last cut up to a position, which is at most ``_CONTEXT`` before the end."""
    cuts = (find_cut(text[:stop]) for stop in range(len(text), 0, -1))
    return next(cut for cut in cuts if cut <= limit)


def blocks_of(text: AnyStr, size: int) -> Iterator[AnyStr]:
    """Yields successive blocks of a text."""
    return (text[start : start + size] for start in range(0, len(text), size))
