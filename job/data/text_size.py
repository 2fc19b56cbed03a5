"""The characters, bytes and words of a text that is given as token ids, and a loss in bits per each of them."""

import math
from dataclasses import asdict, dataclass

import numpy as np

from job.data.tokens import Tokens, blocks
from job.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class TextSize:
    """What a text consists of, as it was encoded: cleaned and normalized. None is not known.

    Args:
        character: number of characters
        byte: number of bytes in UTF-8
        word: number of words, which are separated by ASCII white space
    """

    character: int | None
    byte: int | None
    word: int


def bits_per_unit(nats: float, size: TextSize) -> dict[str, float]:
    """Returns a loss as ``bits_per_character``, ``bits_per_byte`` and ``bits_per_word``.

    Args:
        nats: the loss, summed over the tokens of the text
        size: of the text

    Returns:
        Only those whose count is known and not 0.
    """
    return {f"bits_per_{unit}": nats / math.log(2) / count for unit, count in asdict(size).items() if count}


def measure_targets(tokens: Tokens, vocabulary: Vocabulary) -> TextSize:
    """Counts what all tokens but the first consist of.

    A separator counts as a newline, and a word with the blank before it. An ``<unk>`` is a character or a word; a part
    of a text with another one, of a length that is not known, has no number of characters or bytes.

    Args:
        tokens: token ids (tokens,)
        vocabulary: that of the tokens
    """
    texts = vocabulary.token_bytes()
    has_blanks = vocabulary.kind == "word"  # between its tokens
    num_words = np.array([len(text.split()) for text in texts])
    num_bytes = np.array([len(text) for text in texts])
    num_characters = np.array([sum(byte & 0xC0 != 0x80 for byte in text) for text in texts])
    begins_word, ends_word = (np.array([not text[at : at + 1 or None].isspace() for text in texts]) for at in (0, -1))
    characters = bytes_ = words = unknown = 0
    previous = np.asarray(tokens[:1])
    for block in blocks(tokens[1:]):
        pairs = int((ends_word[np.concatenate([previous, block[:-1]])] & begins_word[block]).sum())
        words += int(num_words[block].sum()) - pairs * (not has_blanks)
        characters += int(num_characters[block].sum()) + pairs * has_blanks
        bytes_ += int(num_bytes[block].sum()) + pairs * has_blanks
        unknown += int(vocabulary.is_unknown(block).sum())
        previous = block[-1:]
    is_known = not unknown
    return TextSize(characters if is_known or vocabulary.kind == "char" else None, bytes_ if is_known else None, words)
