"""Tokens of the tokenizers library: byte-level byte-pair encoding, and any ``tokenizer.json``."""

import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from conftest import job, result
from hypothesis import given, settings
from hypothesis import strategies as st
from test_command_line import SMALL, assert_user_error
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from job.config.text import CorpusConfig, VocabularyConfig
from job.data import bpe
from job.data.bpe import BpeVocabulary, train_bpe
from job.data.corpus import Corpus
from job.data.cuts import blocks_of, cut_text, last_cut
from job.data.dataset import build_dataset
from job.data.text_size import TextSize, measure_targets
from job.data.tokens import count_characters
from job.data.vocabulary_builder import build_vocabulary
from job.data.vocabulary_file import read_vocabulary, vocabulary_from_json
from job.errors import UserError
from job.inference.generate import continuation_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SAMPLE = "It's the time machine's time.\nOne, two – three 1234 äöü 漢字\n\n" * 3


@cache
def trained(has_separator: bool = False) -> BpeVocabulary:
    return train_bpe([SAMPLE], 290, has_separator=has_separator)


@pytest.mark.parametrize("has_separator", [False, True])
@settings(deadline=None)  # a loaded machine is slow
@given(text=TEXTS)
def test_decode_of_encoded_text_returns_it(text: str, has_separator: bool) -> None:
    vocabulary = trained(has_separator)
    ids = vocabulary.encode([text + "<|endoftext|>"])
    assert vocabulary.decode(ids) == text + "<|endoftext|>"
    assert count_characters(ids, vocabulary) == len(text) + 13
    assert not vocabulary.has_unknown
    assert ids.dtype == np.int32
    assert vocabulary.is_text(ids).all()


@settings(deadline=None, max_examples=20)  # a loaded machine is slow
@given(st.lists(st.text("abcdefgh ", max_size=9).map(lambda line: f"{line}\n"), min_size=1), st.randoms())
def test_train_bpe_gives_the_same_bytes_for_any_order_and_number_of_threads(lines: list[str], random: Random) -> None:
    """Many pairs are equally frequent, so that the order of merges shows any other influence."""
    text = "".join(lines)
    expected = train_bpe([text], 400).json
    pieces = list(cut_text(blocks_of(text, 7), lambda part: last_cut(part, "bpe")))
    for threads in ("true", "false"):
        random.shuffle(pieces)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TOKENIZERS_PARALLELISM", threads)
            assert train_bpe(iter(pieces), 400).json == expected


def test_train_bpe_gives_the_merges_of_other_machines() -> None:
    merges = json.loads(trained().json)["model"]["merges"]
    assert ["".join(pair) for pair in merges[:8]] == ["Ġt", "'s", "im", "ne", "Ġth", "Ġtim", "Ġtime", "12"]


def test_vocabulary_separator_is_the_last_id_and_of_the_size() -> None:
    corpus = Corpus("file", "none", [["a b a b"], ["<|endoftext|>"]])
    vocabulary = build_vocabulary(VocabularyConfig(kind="bpe", size=258), corpus)
    assert len(vocabulary) == 258
    ids = vocabulary.encode_documents(corpus.documents)
    assert (ids == 257).sum() == 1
    assert vocabulary.decode(ids) == "a b a b<|endoftext|><|endoftext|>"
    assert count_characters(ids, vocabulary) == 7 + 1 + 13
    assert vocabulary.names[-1] == " <|endoftext|>"
    assert len(set(vocabulary.names)) == len(vocabulary)


def test_decode_of_incomplete_character_replaces_it() -> None:
    vocabulary = train_bpe(["a"], 257)
    assert vocabulary.decode(vocabulary.encode(["a漢"])[:-1]) == "a\ufffd"


@settings(deadline=None)  # a loaded machine is slow
@given(TEXTS, st.integers(1, 40))
def test_encode_of_large_text_in_batches_is_that_of_the_library(text: str, size: int) -> None:
    text, vocabulary = SAMPLE + text + "\n" + SAMPLE, trained()
    expected = Tokenizer.from_str(vocabulary.json).encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "PIECE_CHARACTERS", size)
        assert vocabulary.encode([text]).tolist() == expected


def test_vocabulary_is_stored_and_read_again(tmp_path: Path) -> None:
    vocabulary = trained(True)
    file = tmp_path / "tokenizer.json"
    file.write_text(vocabulary.to_json())
    assert read_vocabulary(VocabularyConfig(kind="bpe", file=str(file))) == vocabulary
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary
    assert vocabulary != trained(False)
    assert Tokenizer.from_file(str(file)).token_to_id("<|endoftext|>") == len(vocabulary) - 1


def test_build_dataset_of_bpe_counts_tokens() -> None:
    dataset = build_dataset(
        Corpus("file", "none", [[SAMPLE]]),
        CorpusConfig(validation_fraction=0.5),
        VocabularyConfig(kind="bpe", size=300),
    )
    tokens = np.concatenate([dataset.train_tokens, dataset.validation_tokens])
    assert dataset.vocabulary.decode(tokens) == SAMPLE
    assert set(dataset.unknown_shares.values()) == {0.0}


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2, "time": 3}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁the", -1.0), ("▁time", -2.0), ("s", -3.0)], 0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def byte_fallback() -> Tokenizer:
    tokens = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "t", "h", "e", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    blank = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def test_vocabulary_file_whose_tokens_are_bytes_counts_the_characters_of_the_text() -> None:
    vocabulary = vocabulary_from_json(byte_fallback().to_str().encode(), "file")
    text = "the 漢é\n the the"
    ids = vocabulary.encode([text])
    assert vocabulary.decode(ids) == text
    assert count_characters(ids[1:], vocabulary) == len(text) - len("the")
    assert measure_targets(ids, vocabulary) == TextSize(len(text) - 3, len(text.encode()) - 3, 3)


@pytest.mark.parametrize("make", [word_piece, unigram, byte_fallback])
def test_decode_after_a_token_has_the_blank_before_the_first(make: Callable[[], Tokenizer]) -> None:
    vocabulary = vocabulary_from_json(make().to_str().encode(), "file")
    ids = [vocabulary.tokens.index(token) for token in vocabulary.tokens if "the" in token] * 3
    assert vocabulary.decode(ids) == "the the the"
    assert vocabulary.decode_after(ids[0], ids[1:]) == " the the"
    assert continuation_text(ids[1:], ids[0], "the", vocabulary, "") == " the the"
    assert continuation_text(ids[1:], ids[0], "", vocabulary, "") == "the the"


@pytest.mark.parametrize("make", [word_piece, unigram])
def test_vocabulary_file_of_other_model_has_its_unknown_token(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(2)
    vocabulary = vocabulary_from_json(tokenizer.to_str().encode(), "file")
    assert vocabulary.unknown_id == 0
    ids = vocabulary.encode(["the times Q the"])
    assert vocabulary.is_unknown(ids).sum() == 1
    assert vocabulary.unknown_tokens(["the times Q the"]) == ["Q"]
    assert vocabulary.decode(vocabulary.encode(["the times the"])) == "the times the"
    assert count_characters(vocabulary.encode(["the times the"])[1:], vocabulary) == len(" times the")
    assert vocabulary.last_cut("the\ntime") == 0


def test_vocabulary_file_takes_last_token_as_separator_if_it_is_special() -> None:
    tokenizer = Tokenizer.from_str(trained().json)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    vocabulary = vocabulary_from_json(tokenizer.to_str().encode(), "file")
    assert vocabulary.has_separator
    assert len(vocabulary) == 292
    assert vocabulary.decode(vocabulary.encode_documents([["a"], ["</s>"]])) == "a</s></s>"
    tokenizer.add_tokens(["the time"])
    vocabulary = vocabulary_from_json(tokenizer.to_str().encode(), "file")
    assert not vocabulary.has_separator
    assert vocabulary.last_cut("the\ntime") == 0
    assert vocabulary.encode(["the time"]).tolist() == [292]


LLAMA_3 = (  # as in its tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def llama_3(is_known: bool = True) -> BpeVocabulary:
    """A tokenizer with the pre-tokenizer of Llama 3, or with another one."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3 if is_known else "a|b"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [SAMPLE, ".\n\n.\r\n" * 9], trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet)
    )
    vocabulary = vocabulary_from_json(tokenizer.to_str().encode(), "file")
    assert isinstance(vocabulary, BpeVocabulary)
    return vocabulary


@settings(deadline=None)  # a loaded machine is slow
@given(st.lists(st.one_of(st.sampled_from([*"\n\r. /a1'", "'s"]), TEXTS), max_size=30).map("".join), st.integers(1, 9))
def test_cuts_of_known_tokenizers_keep_the_tokens(text: str, size: int) -> None:
    vocabulary = llama_3()
    pieces = cut_text(blocks_of(text, size), vocabulary.last_cut)
    tokens = [index for piece in pieces for index in vocabulary.encode([piece]).tolist()]
    assert tokens == Tokenizer.from_str(vocabulary.json).encode(text, add_special_tokens=False).ids
    assert vocabulary.last_cut("one.\ntwo") == 5
    assert llama_3(is_known=False).last_cut("one.\ntwo") == 0


def changed(**values: Any) -> bytes:
    content = json.loads(trained().json)
    for name, value in values.items():
        content["model" if name in content["model"] else name] = (
            content["model"] | {name: value} if name in content["model"] else value
        )
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'"model"',
        b'{"model": {}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [{}]}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        trained().json[:-9].encode(),
        changed(merges=[["a", "absent"]]),
        changed(vocab={"a": 1}),
        changed(pre_tokenizer={"type": "evil.Module"}),
        changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}),
        changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # a panic in the library
    ],
    ids=range(14),
)
def test_vocabulary_file_that_is_damaged_reports_one_line(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        vocabulary_from_json(data, "tokenizer.json")
    assert re.fullmatch(r"tokenizer\.json: (not a vocabulary|its tokenizer cannot be read: .+)", str(caught.value))
    assert capfd.readouterr().err == ""


def test_vocabulary_file_is_read_without_standard_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained().json)
    code = "import os, sys; os.close(2); from job.data.vocabulary_file import vocabulary_from_json as read\n"
    code += "print(len(read(open(sys.argv[1], 'rb').read(), 'file')))"
    words = [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")]
    assert subprocess.run(words, capture_output=True, check=False).stdout == b"290\n"


@pytest.mark.parametrize("value", [-1, 2.5, True])
def test_vocabulary_file_ignores_fields_that_are_not_those_of_its_model(value: object) -> None:
    content = json.loads(trained().json)
    content["model"]["unk_id"] = value  # of Unigram only
    assert vocabulary_from_json(json.dumps(content).encode(), "file") == trained()


def test_vocabulary_file_ignores_dropout() -> None:
    vocabulary = vocabulary_from_json(changed(dropout=0.9), "file")
    assert vocabulary.encode([SAMPLE] * 2).tolist() == trained().encode([SAMPLE] * 2).tolist()


def test_bpe_without_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: train_bpe([SAMPLE], 290), lambda: vocabulary_from_json(trained().json.encode(), "file")):
        with pytest.raises(UserError, match=r"not installed; pip install tokenizers"):
            call()


@pytest.mark.parametrize(
    ("values", "message"),
    [({"size": 256}, "vocabulary.size = 256"), ({"size": 300, "scope": "training"}, "vocabulary.scope = training")],
)
def test_vocabulary_config_of_bpe_rejects_what_cannot_be_trained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VocabularyConfig(kind="bpe", **values)


def test_vocabulary_file_without_token_for_a_text_reports_one_line() -> None:
    tokenizer = Tokenizer(models.WordLevel({"the": 0}, unk_token="<unk>"))
    vocabulary = vocabulary_from_json(tokenizer.to_str().encode(), "file")
    with pytest.raises(UserError, match=r"^vocabulary: its tokenizer cannot encode the text: [^\n]*Missing[^\n]*$"):
        vocabulary.encode(["time"])


def test_train_bpe_raises_what_reading_its_text_raises() -> None:
    def pieces() -> Iterator[str]:
        yield SAMPLE
        raise UserError("cannot be read")

    with pytest.raises(UserError, match=r"^cannot be read$"):
        train_bpe(pieces(), 290)


@pytest.mark.slow
def test_run_of_bpe_resumes_evaluates_and_generates(prose: Path, tmp_path: Path) -> None:
    words = [*SMALL, "--corpus.source", prose, "--run.storage", tmp_path, "--vocabulary.kind", "bpe"]
    assert_user_error(job("train", *words), "vocabulary.kind = bpe: vocabulary.size is not set")
    words += ["--vocabulary.size", 300, "--stream.num_steps", 5, "--run.name"]
    assert job("train", *words, "whole", "--train.max_steps", 6).status == 0
    assert job("train", *words, "resumed", "--train.max_steps", 3).status == 0
    assert job("train", *words, "resumed", "--train.max_steps", 6).status == 0
    whole, resumed = result(tmp_path / "whole"), result(tmp_path / "resumed")
    assert whole["weights_sha256"] == resumed["weights_sha256"]
    assert whole["generated"] == resumed["generated"]
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").glob("*6-*")
    assert not (checkpoint / "vocabulary.json").exists()
    vocabulary = vocabulary_from_json((checkpoint / "tokenizer.json").read_bytes(), "tokenizer.json")
    (tmp_path / "text").write_text("漢 the time")
    ended = job("evaluate", tmp_path / "whole", "--corpus.source", tmp_path / "text", "--json")
    ids = vocabulary.encode(["漢 the time"])
    values = json.loads(ended.out)
    assert values["targets"] == len(ids) - 1
    bits = values["nats_per_token"] / math.log(2) * (len(ids) - 1) / (len("漢 the time") - 1)
    assert values["bits_per_character"] == pytest.approx(bits)
    generate = ["generate", tmp_path / "whole", "--generate.temperature", 1, "--generate.prefix"]
    assert job(*generate, "漢 the time").out.startswith("漢 the time")
    init = ["--model.init", tmp_path / "whole", "--vocabulary.file", checkpoint / "tokenizer.json"]
    flags = [*SMALL, "--corpus.source", prose, "--run.storage", tmp_path, "--vocabulary.kind", "bpe"]
    assert job("train", *flags, *init, "--run.name", "next", "--train.max_steps", 1).status == 0
