"""Texts in all formats, compressions and encodings: the same tokens as from a plain text file."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import math
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import job, result
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config.schema import Config
from job.config.text import CorpusConfig, VocabularyConfig
from job.data.compression import BLOCK_BYTES, FREE_BYTES, compression, decompress, decompress_stream
from job.data.corpus import Corpus, read_corpus
from job.data.dataset import build_dataset
from job.data.parse import parse_file
from job.data.source import find_files
from job.errors import UserError
from job.run.run_dir import open_checkpoint
from job.storage import Folder

TEXT = "Zwölf Boxkämpfer\njagen Viktor quer\r\nüber den großen Sylter Deich 🌊\n" * 20
KINDS = ["char", "word", "byte"]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
DOCUMENTS = st.lists(TEXTS, min_size=1, max_size=6)


def read(path: Path, kind: str = "char", **fields: object) -> Corpus:
    return read_corpus(CorpusConfig(source=str(path), cleaning="none", **fields), kind)  # type: ignore[arg-type]


def tokens(path: Path, kind: str, **fields: object) -> tuple[list[int], tuple[str, ...]]:
    corpus = read(path, kind, **fields)
    dataset = build_dataset(corpus, CorpusConfig(), VocabularyConfig(kind=kind))
    return np.asarray(dataset.train_tokens).tolist(), dataset.vocabulary.names


def json_lines(documents: Sequence[str | None], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 2**70, field: document}) + "\n" for document in documents).encode()


def parquet(values: Sequence[object], field: str = "text", **options: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": list(range(len(values))), field: list(values)})
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


Writer = Callable[[Sequence[str]], bytes]
FORMATS: dict[str, Writer] = {".jsonl": json_lines, ".ndjson": json_lines, ".parquet": parquet}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_read_corpus_of_any_format_and_compression_gives_the_tokens_of_the_plain_text(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    (tmp_path / "plain.txt").write_bytes(TEXT.encode())
    expected = tokens(tmp_path / "plain.txt", kind)
    for name, data in {"text.txt": TEXT.encode(), **{f"a{ext}": make([TEXT]) for ext, make in FORMATS.items()}}.items():
        file = tmp_path / (name + suffix)
        file.write_bytes(COMPRESSIONS[suffix](data))
        assert tokens(file, kind) == expected, name


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_read_corpus_recognizes_compression_and_parquet_without_their_names(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    (tmp_path / "plain").write_bytes(TEXT.encode())
    for name, data in (("text", TEXT.encode()), ("table", parquet([TEXT]))):
        (tmp_path / name).write_bytes(COMPRESSIONS[suffix](data))
        assert tokens(tmp_path / name, kind) == tokens(tmp_path / "plain", kind)


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_read_corpus_with_byte_order_mark_needs_no_encoding(tmp_path: Path, mark: str) -> None:
    marks = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}
    (tmp_path / "data").write_bytes(marks.get(mark, b"") + TEXT.encode(mark))
    for encoding in ("utf-8", "latin-1", "utf-16-le"):
        assert read(tmp_path / "data", encoding=encoding).documents == [[TEXT]]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "UTF-32BE", "utf8", "U8"])
@pytest.mark.parametrize("kind", KINDS)
def test_read_corpus_with_encoding_gives_the_tokens_of_utf_8(tmp_path: Path, encoding: str, kind: str) -> None:
    text = "Zwölf Boxkämpfer\r\njagen"
    (tmp_path / "plain").write_bytes(text.encode())
    (tmp_path / "other").write_bytes(text.encode(encoding))
    assert tokens(tmp_path / "other", kind, encoding=encoding) == tokens(tmp_path / "plain", kind)


@pytest.mark.parametrize("encoding", ["hex", "rot13", "none", "", "undefined"])
def test_encoding_that_is_none_of_text_is_refused(encoding: str) -> None:
    with pytest.raises(UserError, match=r"corpus.encoding = .*: is not a text encoding"):
        CorpusConfig(encoding=encoding)


@settings(deadline=None)  # a loaded machine is slow
@given(text=TEXTS, encoding=st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]))
def test_parse_file_of_encoded_text_returns_it(text: str, encoding: str) -> None:
    text = text.replace("\0", "").lstrip("\ufeff")
    assert parse_file("a.txt", text.encode(encoding), CorpusConfig()) == text


@settings(deadline=None)  # a loaded machine is slow
@given(documents=DOCUMENTS, suffix=st.sampled_from(list(COMPRESSIONS)), name=st.sampled_from(list(FORMATS)))
def test_parse_file_of_documents_returns_them(documents: list[str], suffix: str, name: str) -> None:
    data = COMPRESSIONS[suffix](FORMATS[name](documents))
    assert parse_file(f"a{name}{suffix}", data, CorpusConfig()) == documents


@settings(max_examples=30, deadline=None)  # a loaded machine is slow
@given(data=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 3000), max_size=3))
def test_decompress_of_several_streams_returns_all(data: bytes, cuts: list[int]) -> None:
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [data[start:stop] for start, stop in zip(bounds, [*bounds[1:], len(data)], strict=True)]
    for compress in list(COMPRESSIONS.values())[1:]:
        assert decompress(b"".join(map(compress, parts))) == data


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_decompress_stream_of_empty_and_short_streams_yields_full_blocks(suffix: str) -> None:
    compress, contents = COMPRESSIONS[suffix], [b"", b"\xff", b"", b"\xfe" + bytes(BLOCK_BYTES), b"", bytes(5)]
    data = b"".join(map(compress, contents))
    method = compression(data)
    assert method
    blocks = [*decompress_stream(io.BytesIO(data), method, len(data))]
    assert b"".join(blocks) == b"".join(contents)
    assert [*map(len, blocks)] == [BLOCK_BYTES, 7]  # so that the first has a whole byte order mark, and none is empty


@pytest.mark.parametrize("suffix", list(COMPRESSIONS)[1:])
def test_decompress_of_damaged_file_names_the_place(suffix: str) -> None:
    data = COMPRESSIONS[suffix](random.Random(0).randbytes(300_000))
    middle = len(data) // 2
    damaged = [data[:-9], data + b"more", data[:middle] + b"damaged" + data[middle + 7 :]]
    for broken in damaged[: 2 if suffix == ".zst" else 3]:  # pyarrow's zstd writes no checksum
        with pytest.raises(UserError, match=r"data are corrupt or cut off near byte [0-9,]+: ") as caught:
            decompress(broken)
        assert caught.value.remedy
    assert decompress(data)


@pytest.mark.parametrize("suffix", list(COMPRESSIONS)[1:])
def test_decompress_of_a_bomb_is_refused(suffix: str) -> None:
    with pytest.raises(UserError, match=r"larger than [0-9,]+ bytes after decompression"):
        decompress(COMPRESSIONS[suffix](bytes(FREE_BYTES + (4 << 20))))


@pytest.mark.slow
def test_parse_file_of_parquet_bomb_is_refused() -> None:
    """A few bytes of a dictionary are any number of long values."""
    data = parquet(["long " * 20_000] * 2000, use_dictionary=True, compression="zstd")
    with pytest.raises(UserError, match="the field text is larger than"):
        parse_file("a.parquet", data, CorpusConfig())


def test_find_files_of_a_folder_skips_named_pipes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    os.mkfifo(tmp_path / "b.txt")
    assert [file.name for file in find_files(str(tmp_path))[1]] == [str(tmp_path / "a.txt")]


def test_parse_file_of_parquet_columns_of_similar_names_reads_the_named_one() -> None:
    def file_of(columns: list[tuple[str, Any]]) -> bytes:
        stream = pyarrow.BufferOutputStream()
        names = [name for name, _ in columns]
        table = pyarrow.Table.from_arrays([pyarrow.array([value]) for _, value in columns], names=names)
        pyarrow.parquet.write_table(table, stream)
        return bytes(stream.getvalue().to_pybytes())

    data = file_of([("a", {"b": "inner"}), ("a.b", "outer")])  # both have the path a.b
    assert parse_file("a.parquet", data, CorpusConfig(text_field="a.b")) == ["outer"]
    with pytest.raises(UserError, match="has 2 columns text"):
        parse_file("a.parquet", file_of([("text", "one"), ("text", "two")]), CorpusConfig())


WRONG_FILES = [
    ("a.jsonl", json_lines(["one"], "body"), "line 1: has no field text but id, body; set corpus.text_f"),
    ("a.jsonl", json_lines(["one"]) + b'\n\n{"text": "two"', "line 4: not JSON at column 15: Expecting ','"),
    ("a.jsonl", json_lines(["one"]) + b"[1]", "line 2: not a JSON object"),
    ("a.jsonl", b'{"text": "a"}, {"text": "b"}\n{"text": [{}\n{}]}', "line 1: not JSON at column 14: Extra data"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 1, "a": [{}\n{}]}\n{}, {}', "line 2: not JSON at column 21"),
    ("a.jsonl", b'{"text": 5}', "line 1: the field text is not text, but number"),
    ("a.jsonl", b'{"text": "a\\ud800"}', r"line 1: not text, character 1 is half of a pair, U\+D800"),
    ("a.jsonl", b'{"a":' * 100_000, "line 1: not JSON: nested too deeply"),
    ("a.jsonl", b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    ("a.jsonl", b"", "contains no text"),
    ("a.parquet", parquet(["one"], "body"), "has no field text but id, body; set corpus.text_field"),
    ("a.parquet", parquet([1]), "the field text is not text, but int64"),
    ("a.parquet", parquet([["one"]]), "the field text is not text, but list"),
    ("a.parquet", parquet([b"one"]), "the field text is not text, but binary"),
    (
        "a.parquet",
        parquet(["one" * 999], compression="none")[:-40],
        "its Parquet data are corrupt before byte [0-9,]+: ",
    ),
    ("a.parquet", parquet([None, ""]), "contains no text"),
    ("a.parquet", parquet([]), "the field text is not text, but null"),
    ("a.txt.gz", gzip.compress(b"\xff\xfe\0"), "not UTF-16 at byte 2"),
    ("tar.txt.gz", gzip.compress(b"text.txt".ljust(257, b"\0") + b"ustar"), "a tar archive; extract the text"),
]
# As bytes, any content of a gzip file is valid.
WRONG_CASES = [(kind, *file) for kind in KINDS for file in WRONG_FILES if kind != "byte" or ".gz" not in file[0]]


@pytest.mark.parametrize(
    ("kind", "name", "data", "problem"),
    WRONG_CASES,
    ids=[f"{kind}-{name}-{problem}" for kind, name, _, problem in WRONG_CASES],  # gzip data contain the time
)
def test_read_corpus_of_wrong_file_is_one_error_with_name_and_place(
    tmp_path: Path, kind: str, name: str, data: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"corpus.source = {re.escape(str(tmp_path / name))}: {problem}") as caught:
        read(tmp_path / name, kind)
    assert "\n" not in str(caught.value)
    if problem != "contains no text":
        (tmp_path / "b.txt").write_text("good")
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: .*{name}: "):
            read(tmp_path, kind)


def test_read_corpus_of_damaged_parquet_at_any_byte_is_read_or_refused(tmp_path: Path) -> None:
    data = parquet(["some text", "some more"] * 50, compression="none")
    for position in range(0, len(data), 7):
        broken = data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]
        try:
            parse_file("a.parquet", broken, CorpusConfig())
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017  some bytes do not matter


def test_read_corpus_of_folder_reads_its_texts_in_order_of_their_names(tmp_path: Path) -> None:
    files = {"b/a.txt": "2", "a.txt": "1", "c.md": "3", "d.rst": "4", ".e.txt": "-", ".git/f.txt": "-", "g.py": "-"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "e.TXT.gz").write_bytes(gzip.compress(b"5"))
    (tmp_path / "loop").symlink_to(tmp_path)
    for source in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"):
        assert read_corpus(CorpusConfig(source=source), "char").documents == [["1\n2\n3\n4\n5"]]
    (tmp_path / "b" / "none").mkdir()
    with pytest.raises(UserError, match="a folder without files of text"):
        read(tmp_path / "b" / "none")


@pytest.mark.parametrize(
    ("pattern", "text"), [("*.txt", "1"), ("**/*.txt", "1\n2\n3"), ("b*/*", "2"), ("*/c/d.txt", "3"), ("e*/f*", "4")]
)
def test_read_corpus_with_glob_in_a_uri_reads_what_matches(tmp_path: Path, pattern: str, text: str) -> None:
    for name, content in {"a.txt": "1", "b/b.txt": "2", "b/c/d.txt": "3", "e*/f*": "4"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert read_corpus(CorpusConfig(source=f"file://{tmp_path}/{pattern}"), "char").documents == [[text]]
    with pytest.raises(UserError, match="no file matches"):
        read_corpus(CorpusConfig(source=f"file://{tmp_path}/no*"), "char")


@pytest.mark.parametrize("kind", KINDS)
def test_read_corpus_keeps_documents_apart_and_joins_text_files(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.jsonl").write_bytes(json_lines(["three", None, "", "four\n"]))
    (tmp_path / "d.parquet").write_bytes(parquet(["five", None]))
    (tmp_path / "e.txt").write_text("six")
    joined = "onetwo" if kind == "byte" else "one\ntwo"

    def texts(has_separator: bool = True, separator: bool = False) -> list[str]:
        config = CorpusConfig(source=str(tmp_path), separator=separator)
        documents = read_corpus(config, kind, has_separator=has_separator).documents
        return [line.decode() if isinstance(line, bytes) else str(line) for lines in documents for line in lines]

    assert texts() == [joined, "three", "four\n", "five", "six"]
    assert texts(separator=True) == ["one", "two", "three", "four\n", "five", "six"]
    (text,) = texts(has_separator=False)
    if kind != "byte":
        assert text == "one\ntwo\nthree\nfour\nfive\nsix"


@pytest.mark.parametrize("kind", KINDS)
def test_read_corpus_of_one_text_never_has_a_separator(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "b.txt").write_bytes(b"")
    assert tokens(tmp_path, kind, separator=True) == tokens(tmp_path / "a.txt", kind)


@pytest.mark.parametrize("cleaning", ["none", "d2l"])
def test_newlines_are_kept_or_normalized(tmp_path: Path, cleaning: str) -> None:
    (tmp_path / "a").write_bytes(b"one\r\ntwo\rthree\n")
    config = CorpusConfig(source=str(tmp_path / "a"), cleaning=cleaning)
    lines = ["one", "two", "three", ""]
    assert read_corpus(config, "char").documents == [["one\r\ntwo\rthree\n"] if cleaning == "none" else lines]
    config = CorpusConfig(source=str(tmp_path / "a"), cleaning=cleaning, newlines="normalize")
    assert read_corpus(config, "char").documents == [["one\ntwo\nthree\n"] if cleaning == "none" else lines]


def test_newlines_of_bytes_and_end_of_line_of_characters_are_refused() -> None:
    with pytest.raises(UserError, match=r"corpus.newlines = normalize: vocabulary.kind = byte keeps all bytes"):
        Config(corpus=CorpusConfig(newlines="normalize"), vocabulary=VocabularyConfig(kind="byte"))
    with pytest.raises(UserError, match=r"vocabulary.end_of_line = true: vocabulary.kind = char has newlines"):
        Config(vocabulary=VocabularyConfig(end_of_line=True))


FLAGS = [
    "--scale.workers", 0, "--stream.batch_size", 4, "--stream.num_steps", 8, "--model.hidden_size", 8,
    "--train.max_steps", 5, "--generate.length", 5,
]  # fmt: skip


def train(tmp_path: Path, source: Path, kind: str, **fields: object) -> dict[str, Any]:
    flags = [word for name, value in fields.items() for word in (f"--{name.replace('__', '.')}", value)]
    arguments = ["--corpus.source", source, "--vocabulary.kind", kind, "--run.storage", tmp_path / "runs"]
    ended = job("train", *FLAGS, *arguments, "--run.name", f"{source.name}-{kind}", *flags)
    assert ended.status == 0, ended.err
    return result(tmp_path / "runs" / f"{source.name}-{kind}")


def evaluate(run: Path, source: Path, *flags: object) -> str:
    ended = job("evaluate", run, "--corpus.source", source, *flags)
    assert ended.status == 0, ended.err
    return ended.out.partition(" (step")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_evaluate_from_any_format_give_the_same_result(tmp_path: Path, kind: str) -> None:
    documents = ["one two\nthree", "four two one", "three three two four\n"] * 20
    files = {"a.jsonl": json_lines(documents), "b.jsonl.zst": COMPRESSIONS[".zst"](json_lines(documents)),
             "c.parquet": parquet(documents)}  # fmt: skip
    for number, document in enumerate(documents):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number:02}.txt").write_text(document)
    results = [train(tmp_path, tmp_path / "texts", kind, corpus__separator="true")]
    evaluations = {evaluate(tmp_path / "runs" / f"texts-{kind}", tmp_path / "texts")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        results.append(train(tmp_path, tmp_path / name, kind))
        evaluations.add(evaluate(tmp_path / "runs" / f"texts-{kind}", tmp_path / name))
    assert len({each["weights_sha256"] for each in results}) == len({each["generated"] for each in results}) == 1
    (evaluation,) = evaluations
    assert f"over {results[0]['corpus']['tokens'] - 1} targets" in evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_with_a_vocabulary_without_separator_joins_documents_by_newlines(tmp_path: Path, kind: str) -> None:
    documents = ["one two\nthree", "four two one\n", "three three two four"]
    (tmp_path / "text").write_text("\n".join(documents) * 20)
    train(tmp_path, tmp_path / "text", kind)
    (tmp_path / "joined").write_text("one two\nthree\nfour two one\nthree three two four")
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents))
    run = tmp_path / "runs" / f"text-{kind}"
    assert evaluate(run, tmp_path / "a.jsonl") == evaluate(run, tmp_path / "joined")


@pytest.mark.parametrize("has_documents", [False, True])
def test_evaluate_counts_separators_and_ends_of_lines_as_one_character(tmp_path: Path, has_documents: bool) -> None:
    lines = ["one two", "", "three", "four two", "one"]
    texts = ["\n".join(lines[:3]), "\n".join(lines[3:])] if has_documents else ["\n".join(lines)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts * 12))
    flags = {"vocabulary__end_of_line": "true", "stream__num_steps": 2}
    train(tmp_path, tmp_path / "a.jsonl", "word", **flags)
    (tmp_path / "b.jsonl").write_bytes(json_lines(texts))
    _, bits, nats, targets = map(
        float, re.findall(r"[0-9.]+", evaluate(tmp_path / "runs" / "a.jsonl-word", tmp_path / "b.jsonl"))
    )
    assert targets == len(" \n ".join(lines).replace("\n", "N").split()) - 1
    assert bits == pytest.approx(nats * targets / math.log(2) / len("\n".join(lines).removeprefix("one")), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_init_from_a_model_without_separator_places_its_weights(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text").write_text("one two three " * 30)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one two three " * 15] * 2))
    train(tmp_path, tmp_path / "text", kind)
    init = tmp_path / "runs" / f"text-{kind}"
    train(tmp_path, tmp_path / "a.jsonl", kind, model__init=init, train__max_steps=1, optimizer__learning_rate=1e-30)
    old, new = (open_checkpoint(Folder(str(tmp_path / "runs" / name))) for name in (init.name, f"a.jsonl-{kind}"))
    assert new.vocabulary.has_separator
    bias, old_bias = (loaded.weights["linear.bias"].tolist() for loaded in (new, old))
    old_ids = {name: index for index, name in enumerate(old.vocabulary.names)}
    assert bias[:-1] == [old_bias[old_ids[name]] for name in new.vocabulary.names[:-1]]
