"""A text or token ids that a program gives in Python, in place of a file."""

import hashlib
import re
from typing import Any

import numpy as np

from job.errors import UserError

Content = bytes | np.ndarray  # a text in UTF-8, or token ids: one-dimensional, int32
_CONTENT_NAME = re.compile(r"(text|tokens):[0-9a-f]{16}")


def content_name(content: Content) -> str:
    """Returns ``corpus.source`` for a text or token ids that are in no file; it contains their checksum."""
    kind, data = ("text", content) if isinstance(content, bytes) else ("tokens", content.tobytes())
    return f"{kind}:{hashlib.sha256(data).hexdigest()[:16]}"


def check_content(text: str | None, tokens: Any) -> Content | None:
    """Returns a text in UTF-8, or token ids as an array, of what a caller gave as either; None if both are None.

    Raises:
        UserError: both are given, or it is no text or no array of token ids
    """
    if tokens is not None:
        if text is not None:
            raise UserError("text: tokens are given, too", "give one of them")
        return _check_tokens(tokens)
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"text: must be a str and not {type(text).__name__}", "corpus= takes the path of a file")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text: character {error.start}, {text[error.start]!a}, is not valid in UTF-8") from None


def _check_tokens(tokens: Any) -> np.ndarray:
    problem = "tokens: must be a one-dimensional array of token ids"
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:  # of rows of different lengths, or of a GPU's memory
        raise UserError(f"{problem}: {str(error).splitlines()[0]}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array != array.astype(np.int32)).any():
        raise UserError(f"{problem}, not {array.dtype} of {array.shape}")
    return np.ascontiguousarray(array, np.int32)


def check_no_content_name(source: str) -> None:
    """Raises UserError if ``corpus.source`` names a text or token ids that are in no file."""
    if match := _CONTENT_NAME.fullmatch(source):
        problem = f"is {match[1]} that job.train was given in Python, and that no file contains"
        raise UserError(problem, f"give job.train the same {match[1]} again, or name another source")
