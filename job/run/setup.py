"""A configuration to what training needs: text, vocabulary, tokens, first weights; all checked."""

from dataclasses import replace
from pathlib import Path

from job.config.schema import Config
from job.data.corpus import read_corpus
from job.data.dataset import build_dataset
from job.data.stream import Stream
from job.errors import UserError
from job.inference.generate import encode_prefix
from job.nn.language_model import build_model, load_weights
from job.storage import Folder
from job.training.checkpoint import parse_safetensors
from job.training.run_spec import RunSpec


def build_run_spec(config: Config, folder: Folder) -> RunSpec:
    """Reads the corpus, builds the dataset, and checks all that can be checked without a cluster.

    Args:
        config: as the user gave it
        folder: the run's folder; nothing is written to it

    Returns:
        What all workers need; its configuration has ``corpus.source`` and ``corpus.cleaning`` resolved.

    Raises:
        UserError: the corpus, the sizes or the first weights cannot be used as configured
    """
    corpus = read_corpus(config.corpus, config.vocabulary.kind)
    config = replace(config, corpus=replace(config.corpus, source=corpus.source, cleaning=corpus.cleaning))
    dataset = build_dataset(corpus, config.corpus, config.vocabulary)
    Stream(dataset.train_tokens, config.stream, config.run.seed).check_enough_tokens(config.train)
    num_validation = len(dataset.validation_tokens)
    if config.corpus.validation_fraction and num_validation <= config.stream.batch_size:
        raise UserError(
            f"corpus.validation_fraction = {config.corpus.validation_fraction} keeps {num_validation} tokens, "
            f"too few for stream.batch_size = {config.stream.batch_size} lanes: raise it or give more text"
        )
    encode_prefix(config.generate.prefix, config.corpus.cleaning, dataset.vocabulary)
    return RunSpec(config, dataset, folder / "checkpoints", _read_init(config, len(dataset.vocabulary)))


def _read_init(config: Config, vocabulary_size: int) -> bytes | None:
    """Reads the file that ``model.init`` names. Builds a model to check both the file and the cell."""
    try:
        model = build_model(config.model, vocabulary_size, config.run.seed)
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:  # torch's allocator, or sizes beyond all
        raise UserError(f"model: does not fit into memory: {str(error).splitlines()[0]}", "make it smaller") from None
    name = config.model.init
    if not name:
        return None
    try:
        data = Path(name).expanduser().read_bytes()
        weights = parse_safetensors(data)
    except ValueError as error:
        raise UserError(f"model.init = {name}: {error}") from None
    except OSError as error:
        raise UserError(f"model.init = {name}: cannot be read: {error.strerror}") from None
    load_weights(model, weights, f"model.init = {name}")
    return data
