"""The tokens of a text that a client sends: cleaned as the corpus was, and checked."""

import numpy as np

from job.data.corpus import clean_text
from job.errors import UserError
from job.inference.prefix import MAX_NAMED_TOKENS
from job.serving.conversations import ServedModel


def encode_text(text: str, model: ServedModel, before: str) -> np.ndarray:
    """Returns the token ids (N,) of a text; none if it is empty.

    Args:
        text: as the client typed it
        model: its vocabulary and cleaning
        before: the text before it, of which only the end counts

    Raises:
        UserError: a token is not in the vocabulary, or no token remains when the text is cleaned
    """
    lines, vocabulary = clean_text(text, model.corpus_config), model.vocabulary
    is_joined = bool(before) and not before[-1].isspace() and text[:1].isspace() and vocabulary.kind != "word"
    if is_joined and not lines[0][:1].isspace():  # the cleaning removed the blank between them
        lines[0] = " " + lines[0]
    unknown = vocabulary.unknown_tokens(lines)
    if unknown:
        names = ", ".join(map(repr, unknown[:MAX_NAMED_TOKENS])) + ", …" * (len(unknown) > MAX_NAMED_TOKENS)
        raise UserError(f"text: not in the vocabulary: {names}", "leave it out")
    ids = vocabulary.encode(lines)
    if text and not len(ids):
        raise UserError("text: has no letters or words that the model reads", "choose another one")
    return ids
