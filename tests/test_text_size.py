"""Characters, bytes and words of a text, counted from token ids, equal those of the text."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config.text import VocabularyConfig
from job.data.corpus import Corpus
from job.data.text_size import TextSize, bits_per_unit, measure_targets
from job.data.vocabulary import Vocabulary
from job.data.vocabulary_builder import build_vocabulary


def measure(text: str, kind: str, block_tokens: int, monkeypatch: pytest.MonkeyPatch) -> TextSize:
    """The size of a text after a newline, which is the first token, read in blocks of some tokens."""
    monkeypatch.setattr("job.data.tokens._BLOCK_TOKENS", block_tokens)
    corpus = Corpus("file", "none", [["\n" + text]])
    vocabulary = build_vocabulary(
        VocabularyConfig(kind=kind, size=300 * (kind == "bpe"), end_of_line=kind == "word"), corpus
    )
    newline = vocabulary.token_bytes().index(b"\n")
    return measure_targets(np.concatenate([[newline], vocabulary.encode([text])]), vocabulary)


@settings(deadline=None)
@given(st.text("ab é€𝄞\t"), st.sampled_from(["char", "byte", "bpe"]), st.integers(1, 9))
def test_measure_targets_counts_characters_bytes_and_words_of_the_text(text: str, kind: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = measure(text, kind, block, monkeypatch)
    assert found == TextSize(len(text), len(text.encode()), len(text.split()))


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "bé", "€"]), max_size=3)), st.integers(1, 9))
def test_measure_targets_of_words_counts_a_blank_between_two(lines: list[list[str]], block: int) -> None:
    text = "\n".join(map(" ".join, lines))
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = measure(text, "word", block, monkeypatch)
    assert found == TextSize(len(text), len(text.encode()), len(text.split()))


@pytest.mark.parametrize("kind", ["char", "byte", "word"])
def test_measure_targets_of_documents_counts_a_separator_as_one_character(kind: str) -> None:
    corpus = Corpus("file", "none", [["a bc"], ["d e"]])
    vocabulary = build_vocabulary(VocabularyConfig(kind=kind), corpus)
    tokens = vocabulary.encode_documents(corpus.documents)
    assert measure_targets(tokens, vocabulary) == TextSize(7, 7, 3)


def test_measure_targets_with_unknown_tokens_leaves_out_what_is_not_known() -> None:
    word, char = Vocabulary("word", ("<unk>", "a")), Vocabulary("char", ("<unk>", "a", " "))
    ids = np.array([1, 0, 1])
    assert measure_targets(ids, word) == TextSize(None, None, 2)
    assert measure_targets(ids[[0, 2]], word) == TextSize(2, 2, 1)
    assert measure_targets(ids, char) == TextSize(2, None, 0)


def test_bits_per_unit_has_only_what_is_defined() -> None:
    nats = 6 * math.log(2)
    assert bits_per_unit(nats, TextSize(6, 3, 0)) == {"bits_per_character": 1.0, "bits_per_byte": 2.0}
    assert bits_per_unit(nats, TextSize(None, None, 2)) == {"bits_per_word": 3.0}
