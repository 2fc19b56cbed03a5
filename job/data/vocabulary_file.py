"""Reads the files of vocabularies: ``vocabulary.json``, and ``tokenizer.json`` of the tokenizers library."""

from collections.abc import Collection
from typing import Any

from job.config.text import VocabularyConfig
from job.data.bpe import BpeVocabulary, tokenizer_from_json
from job.data.vocabulary import UNKNOWN, Vocabulary
from job.documents import parse_json
from job.errors import UserError, error_origin, report_os_error
from job.storage import Folder

_MAX_BYTES = 1 << 28  # of a file


def read_vocabulary(vocabulary_config: VocabularyConfig) -> Vocabulary:
    """Reads the vocabulary that ``vocabulary.file`` names. Raises UserError as ``build_vocabulary``."""
    origin, path = f"vocabulary.file = {vocabulary_config.file}", Folder.resolve(vocabulary_config.file)
    with report_os_error(f"{origin}: cannot be read"):
        vocabulary = read_vocabulary_file(path.parent, path.name, origin)
    if vocabulary.kind != vocabulary_config.kind:
        problem = f"{origin}: its tokens are of kind {vocabulary.kind}, and vocabulary.kind = {vocabulary_config.kind}"
        raise UserError(problem, "set the same kind")
    return vocabulary


def find_vocabulary(names: Collection[str]) -> str | None:
    """Returns the name of the vocabulary among the names of a folder's files; None if there is none."""
    return next((cls.file_name for cls in (Vocabulary, BpeVocabulary) if cls.file_name in names), None)


def read_vocabulary_file(folder: Folder, name: str, origin: str) -> Vocabulary:
    """Reads a file of a vocabulary, whose size is limited. Raises UserError as ``vocabulary_from_json``, or OSError."""
    return vocabulary_from_json(folder.read(name, _MAX_BYTES), origin)


def vocabulary_from_json(data: bytes, file: str) -> Vocabulary:
    """Reads the content of a ``vocabulary.json`` or ``tokenizer.json``.

    Args:
        data: the file's bytes
        file: the file's path, for the message

    Raises:
        UserError: the data is not a vocabulary, or needs the tokenizers library, which is not installed
    """
    try:
        content = parse_json(data)
        with error_origin(file):
            return tokenizer_from_json(data) if "model" in content else _vocabulary_of(content)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{file}: not a vocabulary") from None


def _vocabulary_of(content: dict[str, Any]) -> Vocabulary:
    kind, tokens, has_separator = content["kind"], content["tokens"], content.get("separator", False)
    "".join(tokens).encode()  # raises if a token is not text
    is_valid = isinstance(tokens, list) and len(set(tokens)) == len(tokens) and isinstance(has_separator, bool)
    is_valid = is_valid and (tokens == [] if kind == "byte" else kind in ("char", "word") and tokens[0] == UNKNOWN)
    if not is_valid:
        raise ValueError("not a vocabulary")
    return Vocabulary(kind, tuple(tokens), has_separator)
