"""Vocabularies: text to token ids and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.config.schema import VocabularyConfig
from job.data.corpus import Corpus
from job.data.vocabulary import (
    Vocabulary,
    build_vocabulary,
    format_unknown_share,
    unknown_warnings,
    vocabulary_from_json,
)
from job.errors import UserError


@given(st.binary(min_size=1))
def test_encode_bytes_returns_their_values(data):
    vocabulary = build_vocabulary(VocabularyConfig(kind="byte"), Corpus("file", "none", [data]))
    assert bytes(vocabulary.encode([data]).tolist()) == data


@given(st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text)))
def test_decode_of_encoded_characters_returns_the_text(text):
    vocabulary = build_vocabulary(VocabularyConfig(), Corpus("file", "none", [text]))
    assert vocabulary.decode(vocabulary.encode([text])) == text
    assert vocabulary_from_json(vocabulary.to_json().encode(), "file") == vocabulary
    assert Vocabulary("char", vocabulary.tokens[:1]).encode([text]).tolist() == [0] * len(text)


def test_build_vocabulary_counts_words_by_line():
    corpus = Corpus("file", "d2l", ["b a", "b c", "a d"])
    vocabulary = build_vocabulary(VocabularyConfig(kind="word", min_frequency=2), corpus)
    assert vocabulary.tokens == ("<unk>", "b", "a")
    assert vocabulary.decode(vocabulary.encode(corpus.lines)) == "b a b <unk> a <unk>"
    assert len(build_vocabulary(VocabularyConfig(kind="word", size=2), corpus)) == 2


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"kind": "char"},
        {"kind": "char", "tokens": "<unk>"},
        {"kind": "char", "tokens": []},
        {"kind": "char", "tokens": ["<unk>", 1]},
        {"kind": "char", "tokens": ["<unk>", "a", "a"]},
        {"kind": "word", "tokens": ["a", "<unk>"]},
        {"kind": "byte", "tokens": ["<unk>"]},
        {"kind": "line", "tokens": ["<unk>"]},
        {"kind": ["char"], "tokens": ["<unk>"]},
    ],
)
def test_vocabulary_from_json_rejects_invalid_content(content):
    with pytest.raises(UserError, match=r"vocabulary.json: not a vocabulary"):
        vocabulary_from_json(json.dumps(content).encode(), "vocabulary.json")


@pytest.mark.parametrize(
    ("share", "text", "is_large"),
    [(0, "", False), (1e-6, ", 0.0001% <unk>", False), (0.2, ", 20% <unk>", False), (1 / 3, ", 33.3% <unk>", True)],
)
def test_unknown_share_is_shown_as_percentage_and_warned_about(share, text, is_large):
    assert format_unknown_share(share) == text
    assert bool(unknown_warnings({"training": share})) == is_large
