"""A configuration to what training needs: text, vocabulary, tokens, first weights; all checked."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from job import checkpoint, corpus, model, vocabulary
from job.checkpoint import Unsound
from job.config import Config
from job.errors import UserError
from job.generate import prefix_ids
from job.storage import Folder
from job.stream import Stream
from job.trainer import Plan, parts_of_text


def prepare(options: Config, folder: Folder) -> tuple[Plan, np.ndarray]:
    """The plan that all workers share, and the tokens of the whole text (N,) int32.

    Everything that a user can have got wrong, and that can be known without a cluster, is a
    UserError here.
    """
    text = corpus.read(options.corpus, options.vocabulary.kind)
    options = replace(options, corpus=replace(options.corpus, source=text.source, cleaning=text.cleaning))
    words = vocabulary.build(options.vocabulary, text)
    tokens = words.encode(text.lines)[: options.corpus.max_tokens or None]
    training, validation = parts_of_text(tokens, options.corpus.validation_fraction)
    Stream(training, options.stream, options.run.seed).check(options.train)
    if options.corpus.validation_fraction and len(validation) <= options.stream.batch_size:
        raise UserError(
            f"corpus.validation_fraction = {options.corpus.validation_fraction} keeps {len(validation)} tokens, "
            f"too few for stream.batch_size = {options.stream.batch_size} lanes: raise it or give more text"
        )
    prefix_ids(options.generate.prefix, options.corpus.cleaning, words)
    init = _first_weights(options, words)
    facts: dict[str, Any] = {
        "source": text.source,
        "characters": text.characters,
        "tokens": len(tokens),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    return Plan(options, words, folder / "checkpoints", facts, init), tokens


def _first_weights(options: Config, words: vocabulary.Vocabulary) -> bytes | None:
    """The file that ``model.init`` names, tried on a model, as the cell is by making one."""
    try:
        net = model.build(options.model, len(words), options.run.seed)
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # torch's allocator, or sizes beyond all
        raise UserError(f"model: does not fit into memory: {str(error).splitlines()[0]}; make it smaller") from None
    name = options.model.init
    if not name:
        return None
    try:
        data = Path(name).expanduser().read_bytes()
        model.load_weights(net, checkpoint.tensors(data, name), f"model.init = {name}")
    except Unsound as error:
        raise UserError(f"model.init = {error}") from None
    except OSError as error:
        raise UserError(f"model.init = {name}: cannot be read: {error.strerror}") from None
    return data
