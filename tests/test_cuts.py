"""Where a text may be cut: the tokens of its pieces are those of the whole."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from job.config.text import CorpusConfig, VocabularyConfig
from job.data.bpe import train_bpe
from job.data.corpus import clean_text
from job.data.cuts import blocks_of, cut_text, last_cut
from job.data.vocabulary import Vocabulary
from job.data.vocabulary_builder import count_tokens, counted_vocabulary

SAMPLE = "It's the time machine's\n\n  one, two  \n\tthree 1234\r\n'll it?\r"
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["\n", "\r\n", "\r", " ", "a", "it's", "1", "<|endoftext|>", "\u180e", "\x85", "\x1c", "\u3000"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    ),
    max_size=30,
).map("".join)
KINDS = ["char", "byte", "word", "word by line", "bpe"]


@cache
def vocabulary_of(kind: str) -> Vocabulary:
    if kind == "bpe":
        return train_bpe([SAMPLE * 3], 300)
    config = VocabularyConfig(kind=kind.split(maxsplit=1)[0], end_of_line="line" in kind)
    return counted_vocabulary(config, count_tokens(config, [[SAMPLE]]), has_separator=False)


@pytest.mark.parametrize("cleaning", ["none", "d2l"])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)  # a loaded machine is slow
@given(text=TEXTS, size=st.integers(1, 9), newlines=st.sampled_from(["keep", "normalize"]))
def test_encode_of_pieces_returns_the_tokens_of_the_whole(
    kind: str, cleaning: str, text: str, size: int, newlines: str
) -> None:
    vocabulary, corpus_config = vocabulary_of(kind), CorpusConfig(cleaning=cleaning, newlines=newlines)
    pieces = list(cut_text(blocks_of(text, size), lambda part: vocabulary.last_cut(part, cleaning)))
    assert "".join(pieces) == text
    tokens = [vocabulary.encode(clean_text(piece, corpus_config)) for piece in pieces]
    expected = vocabulary.encode(clean_text(text, corpus_config))
    np.testing.assert_array_equal(np.concatenate([*tokens, np.empty(0, np.int32)]), expected)


@pytest.mark.parametrize("kind", KINDS[:-1])
@settings(deadline=None)  # a loaded machine is slow
@given(text=TEXTS, size=st.integers(1, 9))
def test_counts_of_pieces_give_the_vocabulary_of_the_whole(kind: str, text: str, size: int) -> None:
    config = VocabularyConfig(kind=kind.split(maxsplit=1)[0], end_of_line="line" in kind, size=8, min_frequency=1)
    counts: Counter[str] = Counter()
    for piece in cut_text(blocks_of(text, size), lambda part: last_cut(part, config.kind)):
        counts.update(count_tokens(config, [[piece]]))
    expected = count_tokens(config, [[text]])
    assert [*counts.items()] == [*expected.items()]
    assert counted_vocabulary(config, counts, False) == counted_vocabulary(config, expected, False)


@pytest.mark.parametrize(
    ("kind", "text", "cut"),
    [
        ("char", "ab\r", 2),
        ("byte", b"ab\r", 3),
        ("word", "one two", 4),
        ("word", "one two\r", 7),
        ("word", "one", 0),
        ("bpe", "one\ntwo", 4),
        ("bpe", "one\ntwo three", 7),
        ("bpe", "one\n\ntwo", 0),
        ("bpe", "one \ntwo", 0),
        ("bpe", "one\n", 0),
        ("bpe", "one ", 0),
    ],
)
def test_last_cut_is_where_what_follows_changes_no_token(kind: str, text: str | bytes, cut: int) -> None:
    assert last_cut(text, kind) == cut


def test_cut_text_yields_pieces_of_the_size_of_its_blocks() -> None:
    text = "some words\n" * 1000
    sizes = [len(piece) for piece in cut_text(blocks_of(text, 100), lambda part: last_cut(part, "bpe"))]
    assert max(sizes) <= 120
    assert sum(sizes) == len(text)


def test_cut_text_without_a_cut_yields_the_whole() -> None:
    assert list(cut_text(blocks_of("x" * 1000, 10), lambda part: last_cut(part, "bpe"))) == ["x" * 1000]
    assert not list(cut_text(blocks_of("", 10), lambda part: last_cut(part, "bpe")))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)  # a loaded machine is slow
@example(text="aaa 11\n1", sizes=(1, 9), max_uncut=2, stop=6)  # a place to cut that is followed by the limit
@given(
    text=TEXTS, sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), max_uncut=st.integers(2, 6),
    stop=st.integers(0, 60),
)  # fmt: skip
def test_cut_text_without_a_place_to_cut_is_cut_by_the_text_alone(
    kind: str, text: str, sizes: tuple[int, int], max_uncut: int, stop: int
) -> None:
    """Wherever the blocks end, and from any other cut on, the tokens are the same; no piece exceeds the limit."""
    vocabulary = vocabulary_of(kind)
    start = vocabulary.last_cut(text[:stop])
    tokens = []
    for texts, size in zip(((text,), (text[:start], text[start:])), sizes, strict=True):
        pieces = [piece for part in texts for piece in cut_text(blocks_of(part, size), vocabulary.last_cut, max_uncut)]
        assert "".join(pieces) == text
        assert max(map(len, pieces), default=0) <= max_uncut
        tokens.append(np.concatenate([np.empty(0, np.int32), *(vocabulary.encode([piece]) for piece in pieces)]))
    np.testing.assert_array_equal(tokens[0], tokens[1])


def test_encode_of_a_word_without_end_is_of_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.vocabulary.MAX_UNCUT", 3)
    monkeypatch.setattr("job.data.vocabulary.BLOCK_CHARACTERS", 5)
    config = VocabularyConfig(kind="word")
    assert count_tokens(config, [["abcabcab abc"]]) == {"abc": 3, "ab": 1}
