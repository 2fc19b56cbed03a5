"""Opens the tokens that ``corpus.source`` names: a token store, or files of another trainer, on a disk or elsewhere."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from job.config.field import format_value
from job.config.schema import FIELDS
from job.config.text import CorpusConfig, VocabularyConfig
from job.data.indexed import parse_index
from job.data.manifest import FORMAT, MANIFEST, REMEDY, SHARD_FILE, Manifest, read_manifest
from job.data.source import BUILT_IN
from job.data.tokens import ShardedTokens, Shards, blocks, token_sha256
from job.data.vocabulary import Vocabulary
from job.data.vocabulary_file import find_vocabulary, read_vocabulary_file
from job.errors import UserError, error_origin, report_os_error
from job.paths import is_uri
from job.storage import Folder

_MAX_VERIFIED_BYTES = 256 << 20  # of a store on a disk, whose checksums each run verifies within a second
_NUM_SAMPLES, _SAMPLE_TOKENS = 128, 16 << 10  # of larger files of another trainer, evenly spaced
# The settings that decide the tokens. Others, such as the encoding of the text, do not apply to a store.
_FIXED = ("corpus.cleaning", "corpus.newlines", "vocabulary.kind", "vocabulary.end_of_line")
_OPTIONAL = ("vocabulary.size", "vocabulary.min_frequency", "vocabulary.scope")
_TRAINING_PART = ("corpus.max_tokens", "corpus.validation_fraction")  # whose tokens vocabulary.scope = training counts


@dataclass(frozen=True)
class StoredTokens:
    """The tokens of a store, or of files of another trainer.

    Args:
        tokens: token ids (tokens,), which are not read
        vocabulary: that of the tokens
        cleaning: the cleaning of the text, d2l or none
        num_characters: number of characters, or of tokens if it is not known
        target_characters: number of characters of all tokens but the first; None if it is not known
        sha256: digest of the tokens: as int32 if they are in one file, else that of the digests of the shards
    """

    tokens: ShardedTokens
    vocabulary: Vocabulary
    cleaning: str
    num_characters: int
    target_characters: int | None
    sha256: str

    def sha256_of_first(self, num_tokens: int) -> str:
        """Returns the digest of the first tokens; that of many, or in an object store, is made without reading them."""
        if num_tokens == len(self.tokens):
            return self.sha256
        is_local = self.tokens.shards.folder.local_path is not None
        if is_local and num_tokens * self.tokens.dtype.itemsize <= _MAX_VERIFIED_BYTES:
            return token_sha256(self.tokens[:num_tokens])
        return hashlib.sha256(f"{self.sha256} {num_tokens}".encode()).hexdigest()


OpenText = Callable[[CorpusConfig, VocabularyConfig, Vocabulary | None, str], StoredTokens | None]  # as open_stored


def open_stored(
    corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig, vocabulary: Vocabulary | None, reads_flat: bool,
    field: str = "corpus.source",
) -> StoredTokens | None:  # fmt: skip
    """Opens the tokens that ``corpus.source`` names; returns None if it names a text.

    Args:
        corpus_config: the source, and what is to agree with the store
        vocabulary_config: what is to agree with the store
        vocabulary: of the ids in files that are no store; None: such files are an error
        reads_flat: whether a ``.bin`` file without an index contains uint16 ids, as nanoGPT writes them
        field: what gave the source, for messages

    Raises:
        UserError: the files are damaged, or do not agree with the configuration or with the vocabulary
    """
    source = corpus_config.source
    with error_origin(f"{field} = {source}"), report_os_error("cannot be read"):
        path = _locate(source)
        if path is None:
            return None
        if is_store(path):  # a storage that cannot be reached at all is reported at once
            path = replace(path, retry=True)
            return _open_store(path, corpus_config, vocabulary_config, vocabulary)
        shards = _find_files(path, len(vocabulary or ()), reads_flat)
        if shards and vocabulary is None:
            raise UserError("contains token ids, whose vocabulary is not given", "set vocabulary.file")
        return _check_tokens(shards, vocabulary, corpus_config.cleaning) if shards and vocabulary else None


def _locate(source: str) -> Folder | None:
    """Returns the place that a source names, None if it is a built-in text or on the web."""
    if source in BUILT_IN or source.startswith(("http://", "https://")):
        return None
    if not is_uri(source):
        return Folder(str(Path(os.path.expanduser(source)).absolute()))
    return Folder.resolve(source, is_named=True)


def is_store(path: Folder) -> bool:
    """Returns whether a folder is a store, even if it is damaged; a folder of texts may have a manifest, too."""
    if path.local_path is not None and not path.local_path.is_dir():
        return False
    names = path.names()
    has_shards = any(map(SHARD_FILE.fullmatch, names))
    return MANIFEST in names and (has_shards or FORMAT.encode() in path.read(MANIFEST))


def _find_files(path: Folder, num_ids: int, reads_flat: bool) -> Shards | None:
    """Returns the file of ids of a pair, or of a flat file; None if it is neither."""
    stem, _, suffix = path.name.rpartition(".")
    has_suffix, folder = suffix in ("bin", "idx"), path.parent
    if not has_suffix and folder.has(path.name):  # which is literal, and no prefix
        return None
    prefix = stem if has_suffix else path.name
    ids, index = f"{prefix}.bin", f"{prefix}.idx"
    size, file = folder.size(ids), folder / ids
    has_index = folder.size(index) is not None
    if size is None or not (has_index or (reads_flat and suffix == "bin")):
        return None
    dtype, length = parse_index(folder.read(index), str(folder / index)) if has_index else (np.dtype("<u2"), None)
    if length is not None and size != length * dtype.itemsize:
        raise UserError(f"{file}: has {size:,} bytes, which are not the sequences of its index", "copy both again")
    if num_ids > np.iinfo(dtype).max + 1:
        problem = f"{file}: its ids are {dtype.name}, which cannot hold all {num_ids:,} tokens of vocabulary.file"
        raise UserError(problem, "give the vocabulary that the ids were made with")
    if not size or size % dtype.itemsize:
        raise UserError(f"{file}: has {size:,} bytes, which are no token ids of {dtype.itemsize} bytes")
    folder = replace(folder, retry=True)
    return Shards(folder, (ids,), (size // dtype.itemsize,), (0,), dtype, num_ids)


def _check_tokens(shards: Shards, vocabulary: Vocabulary, cleaning: str) -> StoredTokens:
    """Reads all tokens, or samples of many. Raises UserError if one is not in the vocabulary."""
    tokens = ShardedTokens.whole(shards)
    is_small = shards.folder.local_path is not None and len(tokens) * shards.dtype.itemsize <= _MAX_VERIFIED_BYTES
    samples = [tokens] if is_small else _read_samples(tokens)
    unknown = [sum(int(vocabulary.is_unknown(block).sum()) for block in blocks(sample)) for sample in samples]
    share = sum(unknown) / sum(map(len, samples))
    digests = [*map(token_sha256, samples)]
    sha256 = digests[0] if is_small else hashlib.sha256(f"{digests} {len(tokens)}".encode()).hexdigest()
    tokens = ShardedTokens.whole(replace(shards, unknown=(round(share * len(tokens)),)))
    return StoredTokens(tokens, vocabulary, "none" if cleaning == "auto" else cleaning, len(tokens), None, sha256)


def _read_samples(tokens: ShardedTokens) -> list[np.ndarray]:
    length = min(_SAMPLE_TOKENS, len(tokens))
    starts = [number * (len(tokens) - length) // (_NUM_SAMPLES - 1) for number in range(_NUM_SAMPLES)]
    return tokens.read_ranges([range(start, start + length) for start in starts])


def _open_store(
    folder: Folder, corpus_config: CorpusConfig, vocabulary_config: VocabularyConfig, vocabulary: Vocabulary | None
) -> StoredTokens:
    manifest = read_manifest(folder)
    settings = manifest.settings
    vocabulary_name = find_vocabulary(manifest.files)
    if not {*_FIXED, *_OPTIONAL, *_TRAINING_PART} <= set(settings) or not vocabulary_name:
        raise UserError(f"{MANIFEST}: it is not complete", REMEDY)
    _check_files(folder, manifest)
    _check_settings(settings, corpus_config.values() | vocabulary_config.values(), vocabulary is not None)
    stored = read_vocabulary_file(folder, vocabulary_name, str(folder / vocabulary_name))
    if vocabulary not in (None, stored):
        raise UserError("the store has another vocabulary", "prepare one with this vocabulary.file")
    tokens = ShardedTokens.whole(_shards(folder, manifest, len(stored)))
    return StoredTokens(
        tokens, stored, settings["corpus.cleaning"], manifest.characters, manifest.target_characters,
        manifest.token_sha256,
    )  # fmt: skip


def _shards(folder: Folder, manifest: Manifest, num_ids: int) -> Shards:
    shards = manifest.shards
    lengths, unknown = tuple(shard.tokens for shard in shards), tuple(shard.unknown for shard in shards)
    dtype = manifest.dtype.newbyteorder("<")
    return Shards(folder, tuple(shard.ids for shard in shards), lengths, unknown, dtype, num_ids)


def _check_settings(settings: dict[str, Any], given: dict[str, Any], has_vocabulary: bool) -> None:
    fixed: tuple[str, ...] = _FIXED[:2] if has_vocabulary else _FIXED
    optional = () if has_vocabulary else _OPTIONAL
    if optional and settings["vocabulary.scope"] == "training":
        fixed += _TRAINING_PART
    for name in (*fixed, *optional):
        if given[name] not in (settings[name], FIELDS[name].default if name in optional else "auto"):
            problem = (
                f"{name} = {format_value(given[name])}, and the store was made with {format_value(settings[name])}"
            )
            raise UserError(problem, "set the same, or prepare another store")


def _check_files(folder: Folder, manifest: Manifest) -> None:
    """Compares the files with the manifest: sizes, and checksums of the vocabulary and of a small store on a disk."""
    files, sizes = manifest.all_files, folder.sizes()
    for name, (size, _) in files.items():
        if sizes.get(name) != size:
            raise UserError(f"{name} is missing, or does not have the {size:,} bytes that {MANIFEST} states", REMEDY)
        if folder.local_path is not None:  # a worker would open it much later
            with report_os_error(f"{name}: cannot be read"), (folder.local_path / name).open("rb"):
                pass
    num_bytes = sum(size for size, _ in files.values())
    is_verified = folder.local_path is not None and num_bytes <= _MAX_VERIFIED_BYTES
    _verify(folder, files if is_verified else manifest.files)


def _verify(folder: Folder, files: dict[str, tuple[int, str]]) -> None:
    for name, (_, digest) in files.items():
        if folder.read_with(name, _sha256) != digest:
            raise UserError(f"{name} was changed: its checksum is wrong", REMEDY)


def _sha256(stream: pyarrow.NativeFile, _: int) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_store(source: str, field: str = "corpus.source") -> None:
    """Reads all files of a store. Raises UserError if a checksum is wrong; does nothing if it is no store."""
    folder = _locate(source)
    if folder is None:
        return
    with error_origin(f"{field} = {source}"), report_os_error("cannot be read"):
        if is_store(folder):
            folder = replace(folder, retry=True)
            _verify(folder, read_manifest(folder).all_files)
