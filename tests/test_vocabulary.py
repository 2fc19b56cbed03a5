"""Vocabularies: text to token ids and back."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config.text import CorpusConfig, VocabularyConfig
from job.data.corpus import Corpus, clean_text
from job.data.dataset import build_dataset
from job.data.vocabulary import Vocabulary, format_unknown_share, unknown_warnings
from job.data.vocabulary_builder import build_vocabulary, count_tokens
from job.data.vocabulary_file import vocabulary_from_json
from job.errors import UserError


@settings(deadline=None)  # a loaded machine is slow
@given(st.binary(min_size=1))
def test_encode_bytes_returns_their_values(data: bytes) -> None:
    vocabulary = build_vocabulary(VocabularyConfig(kind="byte"), Corpus("file", "none", [[data]]))
    assert bytes(vocabulary.encode([data]).tolist()) == data


@settings(deadline=None)  # a loaded machine is slow
@given(st.text(min_size=1).filter(lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text)))
def test_decode_of_encoded_characters_returns_the_text(text: str) -> None:
    vocabulary = build_vocabulary(VocabularyConfig(), Corpus("file", "none", [[text]]))
    assert vocabulary.decode(vocabulary.encode([text])) == text
    assert vocabulary_from_json(vocabulary.to_json().encode(), "file") == vocabulary
    assert Vocabulary("char", vocabulary.tokens[:1]).encode([text]).tolist() == [0] * len(text)


@pytest.mark.parametrize("num_others", [0, 300])  # tokens, so that ids have one byte or two
@settings(deadline=None)  # a loaded machine is slow
@given(lines=st.lists(st.text("abcz \n\x7f\x80é天😀", max_size=9), min_size=1), block=st.integers(1, 7))
def test_characters_are_counted_and_encoded_one_by_one_in_any_block(
    num_others: int, lines: list[str], block: int
) -> None:
    text = "".join(lines)
    others = "".join(chr(0x4E00 + number) for number in range(num_others))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("vocabulary", "vocabulary_builder"):
            patch.setattr(f"job.data.{module}.BLOCK_CHARACTERS", block)
        counts = count_tokens(VocabularyConfig(), [lines])
        assert [*counts.items()] == [*Counter(text).items()]  # in the same order
        vocabulary = Vocabulary("char", ("<unk>", *others, *"cba天é\n"))
        expected = [vocabulary.tokens.index(letter) if letter in vocabulary.tokens else 0 for letter in text]
        for dtype in (np.int32, np.uint16):
            ids = vocabulary.encode(lines, dtype)
            assert ids.dtype == dtype
            assert ids.tolist() == expected


def test_build_vocabulary_counts_words_by_line() -> None:
    corpus = Corpus("file", "d2l", [["b a", "b c", "a d"]])
    vocabulary = build_vocabulary(VocabularyConfig(kind="word", min_frequency=2), corpus)
    assert vocabulary.tokens == ("<unk>", "b", "a")
    assert vocabulary.decode(vocabulary.encode_documents(corpus.documents)) == "b a b <unk> a <unk>"
    assert len(build_vocabulary(VocabularyConfig(kind="word", size=2), corpus)) == 2


DOCUMENTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not text.isspace()), min_size=1
)


@pytest.mark.parametrize("kind", ["char", "word", "byte"])
@settings(deadline=None)  # a loaded machine is slow
@given(documents=DOCUMENTS)
def test_encode_documents_separates_them_by_the_last_id(kind: str, documents: list[str]) -> None:
    corpus = Corpus("file", "none", [[document] for document in documents])
    vocabulary = build_vocabulary(VocabularyConfig(kind=kind), corpus)
    ids = vocabulary.encode_documents(corpus.documents)
    separator = len(vocabulary) - 1
    if len(documents) == 1:
        assert not vocabulary.has_separator
        np.testing.assert_array_equal(ids, vocabulary.encode(documents))
        return
    parts = np.split(ids, np.flatnonzero(ids == separator))
    assert len(parts) == len(documents)
    for number, (part, document) in enumerate(zip(parts, documents, strict=True)):
        decoded = vocabulary.decode(part[1:] if number else part)
        assert decoded == (" ".join(document.split()) if kind == "word" else document)
    assert vocabulary_from_json(vocabulary.to_json().encode(), "file") == vocabulary


@pytest.mark.parametrize("kind", ["char", "byte", "word", "word by line", "bpe"])
@settings(deadline=None, max_examples=50)  # a loaded machine is slow
@given(documents=st.lists(st.lists(st.text("ab \né😀", max_size=4), min_size=1, max_size=3), min_size=2, max_size=9))
def test_encode_documents_returns_the_ids_of_each_and_separators(kind: str, documents: list[list[str]]) -> None:
    vocabulary_config = VocabularyConfig(
        kind=kind.split(maxsplit=1)[0], end_of_line="line" in kind, size=260 if kind == "bpe" else 0
    )
    vocabulary = build_vocabulary(vocabulary_config, Corpus("file", "none", [["ab a \né"], ["b"]]))
    separator = [len(vocabulary) - 1]
    expected = [index for lines in documents for index in (*vocabulary.encode(lines).tolist(), *separator)]
    assert vocabulary.encode_documents(documents).tolist() == expected[:-1]


def test_build_vocabulary_with_separator_takes_no_text_for_it() -> None:
    corpus = Corpus("file", "none", [["a <|endoftext|> b"], ["a"]])
    vocabulary = build_vocabulary(VocabularyConfig(kind="word", size=4), corpus)
    assert (vocabulary.tokens, len(vocabulary)) == (("<unk>", "a", "<|endoftext|>"), 4)
    assert vocabulary.encode_documents(corpus.documents).tolist() == [1, 2, 0, 3, 1]
    assert vocabulary.decode([1, 3, 1]) == "a <|endoftext|> a"
    assert Vocabulary("char", ("<unk>", "a"), True).decode([1, 2, 1]) == "a<|endoftext|>a"
    assert Vocabulary("byte", (), True).decode([97, 256, 97]) == "a<|endoftext|>a"
    assert len(set(vocabulary.names)) == len(vocabulary)


def test_build_dataset_scope_training_counts_separators_as_tokens() -> None:
    corpus = Corpus("file", "none", [["ab"], ["cd"], ["ef"]])
    dataset = build_dataset(corpus, CorpusConfig(validation_fraction=0.5), VocabularyConfig(scope="training"))
    assert dataset.vocabulary.tokens == ("<unk>", "a", "b", "c")
    assert (list(np.asarray(dataset.train_tokens)), list(np.asarray(dataset.validation_tokens))) == (
        [1, 2, 4, 3],
        [0, 4, 0, 0],
    )


@settings(deadline=None)  # a loaded machine is slow
@given(st.lists(st.lists(st.text("abc", min_size=1))), st.sampled_from(["\n", "\r\n", "\r"]))
def test_end_of_line_is_a_token_per_newline_as_published_figures_count_them(
    lines: list[list[str]], newline: str
) -> None:
    text = "".join(" ".join(words) + newline for words in lines)
    corpus = Corpus("file", "none", [[text]])
    vocabulary = build_vocabulary(VocabularyConfig(kind="word", end_of_line=True), corpus)
    ids = vocabulary.encode_documents(corpus.documents)
    expected = [token for words in lines for token in [*words, "\n"]]  # as readers of WikiText append <eos> to a line
    assert [vocabulary.tokens[index] for index in ids] == expected
    assert vocabulary.decode(ids) == text.replace(newline, "\n")
    assert vocabulary_from_json(vocabulary.to_json().encode(), "file").encode([text]).tolist() == ids.tolist()
    cleaned = clean_text(text, CorpusConfig(cleaning="d2l"))
    np.testing.assert_array_equal(vocabulary.encode(cleaned), ids)


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize("max_tokens", [0, 6])
@pytest.mark.parametrize("scope", ["corpus", "training"])
def test_build_dataset_scope_gives_vocabulary_of_all_tokens_or_of_those_trained_on(
    kind: str, max_tokens: int, scope: str
) -> None:
    lines = ["c a b", "a b z", "", "x c c y"] if kind == "word" else ["cab", "abz", "", "xccy"]
    corpus_config = CorpusConfig(max_tokens=max_tokens, validation_fraction=0.5)
    dataset = build_dataset(Corpus("file", "d2l", [lines]), corpus_config, VocabularyConfig(kind=kind, scope=scope))
    tokens = {("corpus", 0): "cabzxy", ("corpus", 6): "cabzxy", ("training", 0): "abc", ("training", 6): "cab"}
    assert dataset.vocabulary.tokens == ("<unk>", *tokens[scope, max_tokens])
    train, validation = ("cab", "abz") if max_tokens else ("cabab", "zxccy")
    assert list(train) == [dataset.vocabulary.tokens[index] for index in np.asarray(dataset.train_tokens)]
    known = [token if token in dataset.vocabulary.tokens else "<unk>" for token in validation]
    assert known == [dataset.vocabulary.tokens[index] for index in np.asarray(dataset.validation_tokens)]
    assert (dataset.unknown_shares["validation"] > 0) == (scope == "training")


def test_build_dataset_scope_training_applies_size_and_frequency_to_the_counted_tokens() -> None:
    corpus, corpus_config = Corpus("file", "none", [["aabbcd" + "dddd"]]), CorpusConfig(validation_fraction=0.4)

    def tokens(**fields: Any) -> tuple[Any, ...]:
        return build_dataset(corpus, corpus_config, VocabularyConfig(**fields)).vocabulary.tokens[1:]

    assert tokens(scope="training", min_frequency=2) == tokens(scope="training", size=3) == ("a", "b")
    assert tokens(scope="corpus", min_frequency=2) == ("d", "a", "b")
    assert tokens(scope="corpus", size=3) == ("d", "a")


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
        {"kind": "char", "tokens": ["<unk>"], "separator": 1},
    ],
)
def test_vocabulary_from_json_rejects_invalid_content(content: list[Any] | dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"vocabulary.json: not a vocabulary"):
        vocabulary_from_json(json.dumps(content).encode(), "vocabulary.json")


@pytest.mark.parametrize(
    ("share", "text", "is_large"),
    [(0, "", False), (1e-6, ", 0.0001% <unk>", False), (0.2, ", 20% <unk>", False), (1 / 3, ", 33.3% <unk>", True)],
)
def test_unknown_share_is_shown_as_percentage_and_warned_about(share: float, text: str, is_large: bool) -> None:
    assert format_unknown_share(share) == text
    assert bool(unknown_warnings({"training": share})) == is_large


@pytest.mark.parametrize("kind", ["char", "word", "byte"])
def test_build_vocabulary_from_a_file_equals_the_one_that_was_written(tmp_path: Path, kind: str) -> None:
    corpus = Corpus("file", "none", [[b"b a b"]] if kind == "byte" else [["b a b"]])
    vocabulary = build_vocabulary(VocabularyConfig(kind=kind), corpus)
    (tmp_path / "vocabulary.json").write_text(vocabulary.to_json())
    config = VocabularyConfig(kind=kind, file=str(tmp_path / "vocabulary.json"))
    assert build_vocabulary(config, Corpus("other", "none", [["c d a"]])) == vocabulary
    assert build_dataset(corpus, CorpusConfig(), config).vocabulary == vocabulary


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, "char", "cannot be read"),
        ('{"kind": "char", "tokens": []}', "char", "not a vocabulary"),
        ('{"kind": "word", "tokens": ["<unk>"]}', "char", "its tokens are of kind word, and vocabulary.kind = char"),
    ],
)
def test_build_vocabulary_from_an_invalid_file_raises_user_error(
    tmp_path: Path, content: str | None, kind: str, message: str
) -> None:
    path = tmp_path / "vocabulary.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        build_vocabulary(VocabularyConfig(kind=kind, file=str(path)), Corpus("file", "none", [["a"]]))
    assert str(error.value).startswith(f"vocabulary.file = {path}: {message}")


@pytest.mark.parametrize("fields", [{"size": 3}, {"min_frequency": 2}, {"scope": "training"}])
def test_vocabulary_file_with_fields_of_a_new_vocabulary_raises_user_error(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="do not apply to it; remove them"):
        VocabularyConfig(file="vocabulary.json", **fields)
