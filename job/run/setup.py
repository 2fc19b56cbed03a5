"""A configuration to what training needs: text, vocabulary, tokens, first weights; all checked."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from job.config.schema import Config
from job.data.corpus import read_corpus
from job.data.stream import Stream, split_validation
from job.data.vocabulary import Vocabulary, build_vocabulary
from job.errors import UserError
from job.inference.generate import encode_prefix
from job.nn.language_model import build_model, load_weights
from job.storage import Folder
from job.training.checkpoint import CorruptCheckpoint, parse_safetensors
from job.training.run_spec import RunSpec


def build_run_spec(config: Config, folder: Folder) -> tuple[RunSpec, np.ndarray]:
    """The plan that all workers share, and the tokens of the whole text (N,) int32.

    Everything that a user can have got wrong, and that can be known without a cluster, is a
    UserError here.
    """
    text = read_corpus(config.corpus, config.vocabulary.kind)
    config = replace(config, corpus=replace(config.corpus, source=text.source, cleaning=text.cleaning))
    vocabulary = build_vocabulary(config.vocabulary, text)
    tokens = vocabulary.encode(text.lines)[: config.corpus.max_tokens or None]
    training, validation = split_validation(tokens, config.corpus.validation_fraction)
    Stream(training, config.stream, config.run.seed).check_enough_tokens(config.train)
    if config.corpus.validation_fraction and len(validation) <= config.stream.batch_size:
        raise UserError(
            f"corpus.validation_fraction = {config.corpus.validation_fraction} keeps {len(validation)} tokens, "
            f"too few for stream.batch_size = {config.stream.batch_size} lanes: raise it or give more text"
        )
    encode_prefix(config.generate.prefix, config.corpus.cleaning, vocabulary)
    init = _first_weights(config, vocabulary)
    metadata: dict[str, Any] = {
        "source": text.source,
        "characters": text.num_characters,
        "tokens": len(tokens),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    return RunSpec(config, vocabulary, folder / "checkpoints", metadata, init), tokens


def _first_weights(config: Config, vocabulary: Vocabulary) -> bytes | None:
    """The file that ``model.init`` names, tried on a model, as the cell is by making one."""
    try:
        model = build_model(config.model, len(vocabulary), config.run.seed)
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # torch's allocator, or sizes beyond all
        raise UserError(f"model: does not fit into memory: {str(error).splitlines()[0]}; make it smaller") from None
    name = config.model.init
    if not name:
        return None
    try:
        data = Path(name).expanduser().read_bytes()
        load_weights(model, parse_safetensors(data, name), f"model.init = {name}")
    except CorruptCheckpoint as error:
        raise UserError(f"model.init = {error}") from None
    except OSError as error:
        raise UserError(f"model.init = {name}: cannot be read: {error.strerror}") from None
    return data
