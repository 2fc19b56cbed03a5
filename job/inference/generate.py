"""Loads a checkpoint's model and generates the continuation of a prefix.

Axes: N tokens of the prefix, T steps, B lanes, V tokens of the vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from job.config.schema import BUILTIN_CELLS, Config, CorpusConfig, GenerateConfig, ModelConfig
from job.data.corpus import clean_text
from job.data.dataset import Dataset
from job.data.tokens import Tokens, blocks
from job.data.vocabulary import UNKNOWN, Vocabulary
from job.errors import UserError
from job.nn.language_model import LanguageModel, build_model_with_weights
from job.training.checkpoint import LoadedCheckpoint

# Length of a prefix that is taken from the text.
PREFIX_CHARACTERS = 12
PREFIX_WORDS = 3
MAX_NAMED_TOKENS = 10  # of a prefix, in a notice
NO_CUSTOM_CELL = ModelConfig()


def load_model(
    checkpoint: LoadedCheckpoint, model_config: ModelConfig = NO_CUSTOM_CELL, weights_choice: str = "auto"
) -> LanguageModel:
    """Returns the checkpoint's model on the CPU, in the dtype of its weights, which become the model's own.

    Args:
        checkpoint: the weights and their configuration
        model_config: its cell as the user gave it; what is stored with a checkpoint must not choose the code to import
        weights_choice: ``evaluate.weights``

    Raises:
        UserError: the checkpoint's cell is neither the user's nor built in, or there is no average of the weights
    """
    config = checkpoint.config
    if config.model.cell not in (model_config.cell, *BUILTIN_CELLS):
        problem = (
            f"{checkpoint.checkpoint.path}: model.cell = {config.model.cell}: code named by a file is not imported"
        )
        raise UserError(problem, f"if you trust it, add --model.cell {config.model.cell}, or cell= in Python")
    vocabulary_size, weights = len(checkpoint.vocabulary), checkpoint.select_weights(weights_choice)
    dtype = next((weight.dtype for weight in weights.values() if weight.is_floating_point()), torch.float32)
    stored = replace(config.model, cell_class=model_config.cell_class)
    return build_model_with_weights(stored, vocabulary_size, config.run.seed, weights, dtype, "checkpoint")


def generate_text(checkpoint: LoadedCheckpoint, config: Config) -> str:
    """Returns the prefix, as the user typed it, and its continuation by the checkpoint's model.

    Args:
        checkpoint: gives the model, the vocabulary and the cleaning of the prefix
        config: its ``generate`` section, ``evaluate.weights``, ``run.seed``, and the cell of ``model`` as the user gave
            it

    Raises:
        UserError: none of the prefix's tokens is in the vocabulary, or as ``load_model``
    """
    vocabulary, prefix = checkpoint.vocabulary, config.generate.prefix
    ids = encode_prefix(prefix, checkpoint.config.corpus, vocabulary)
    model = load_model(checkpoint, config.model, config.evaluate.weights)
    if vocabulary.unknown_id is not None and not config.generate.unknown:
        bias = model.linear.bias  # copied, since the checkpoint's weights must not change
        bias.data = bias.data.index_fill(0, torch.tensor(vocabulary.unknown_id), -math.inf)
    prefixes_NB = torch.from_numpy(ids.astype(np.int64))[:, None]
    tokens_TB = generate_batch(model, prefixes_NB, config.generate, config.run.seed)
    continuation = vocabulary.decode(tokens_TB[:, 0].tolist())
    has_blank = prefix[-1].isspace() or not continuation or continuation[0].isspace()
    needs_blank = vocabulary.kind == "word" and not has_blank
    return prefix + " " * needs_blank + continuation


def prefix_warnings(config: Config, vocabulary: Vocabulary) -> list[str]:
    """Returns a warning that names the tokens of the prefix that are not in the vocabulary, if there are any."""
    tokens = vocabulary.unknown_tokens(clean_text(config.generate.prefix, config.corpus))
    names = ", ".join(map(repr, tokens[:MAX_NAMED_TOKENS])) + ", …" * (len(tokens) > MAX_NAMED_TOKENS)
    return [f"generate.prefix: not in the vocabulary, and read as {UNKNOWN}: {names}"] if tokens else []


def resolve_prefix(prefix: str, corpus_config: CorpusConfig, dataset: Dataset) -> str:
    """Returns the prefix, or the beginning of the training text in place of a default that the text does not have.

    Args:
        prefix: ``generate.prefix``; checked unless it is the default
        corpus_config: its cleaning
        dataset: the vocabulary and the text

    Raises:
        UserError: none of the prefix's tokens is in the vocabulary
    """
    vocabulary, tokens = dataset.vocabulary, dataset.train_tokens
    if prefix == GenerateConfig.prefix:
        ids = vocabulary.encode(clean_text(prefix, corpus_config))
        is_known = vocabulary.is_text(ids) if vocabulary.has_unknown else _occur(ids, tokens)
        prefix = prefix if is_known.all() else _first_known_text(vocabulary, tokens)
    encode_prefix(prefix, corpus_config, vocabulary)
    return prefix


def _occur(ids: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Returns whether each id occurs among the tokens, of which it reads no more than needed."""
    is_known = np.zeros(len(ids), bool)
    for block in blocks(tokens):
        is_known |= np.isin(ids, block)
        if is_known.all():
            break
    return is_known


def _find_first(tokens: Tokens, is_wanted: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """Returns the index of the first token that is wanted, of which it reads no more than needed."""
    start = 0
    for block in blocks(tokens):
        wanted = is_wanted(block)
        if wanted.any():
            return start + int(np.argmax(wanted))
        start += len(block)
    return None


def _first_known_text(vocabulary: Vocabulary, tokens: Tokens) -> str:
    """Returns the first known characters or words, without blanks before them unless there are only blanks."""
    blank_ids = [index for index in range(len(vocabulary)) if not vocabulary.decode([index]).strip()]
    start = _find_first(tokens, lambda block: vocabulary.is_text(block) & ~np.isin(block, blank_ids))
    if start is None:
        start = _find_first(tokens, vocabulary.is_text)
    if start is None:
        problem = "vocabulary: contains no token of the training text"
        raise UserError(problem, "raise vocabulary.size or lower vocabulary.min_frequency")
    beginning = np.asarray(tokens[start : start + 4 * PREFIX_CHARACTERS])  # a character has up to four bytes
    num_known = np.cumprod(vocabulary.is_text(beginning)).sum()
    text = vocabulary.decode(beginning[:num_known].tolist())
    text = text.lstrip() or text
    return " ".join(text.split()[:PREFIX_WORDS]) or text if vocabulary.kind == "word" else text[:PREFIX_CHARACTERS]


def encode_prefix(prefix: str, corpus_config: CorpusConfig, vocabulary: Vocabulary) -> np.ndarray:
    """Returns the token ids (N,) of a prefix, cleaned as the corpus was.

    Raises:
        UserError: it is empty, or none of its tokens is in the vocabulary
    """
    ids = vocabulary.encode(clean_text(prefix, corpus_config))
    if not prefix:
        raise UserError("generate.prefix is empty", "give a text to continue")
    if not len(ids):
        is_d2l = corpus_config.cleaning == "d2l"
        reason = "letters from A to Z, and corpus.cleaning = d2l keeps only those" if is_d2l else "words"
        raise UserError(f"generate.prefix = {prefix!r}: contains no {reason}", "choose another prefix")
    if vocabulary.is_unknown(ids).all():
        problem = f"generate.prefix = {prefix!r}: none of its tokens is in the vocabulary"
        raise UserError(problem, "choose another prefix")
    return ids


@torch.no_grad()
def generate_batch(model: LanguageModel, prefixes_NB: Tensor, generate_config: GenerateConfig, seed: int) -> Tensor:
    """Continues prefixes of equal length, as ``predict_ch8`` of the d2l book does (section 9.5).

    Args:
        model: put into evaluation mode
        prefixes_NB: token ids, int64, N at least 1
        generate_config: length and temperature; temperature 0 is greedy decoding
        seed: seed of the sampling

    Returns:
        Token ids (length, B), int64.
    """
    length, temperature = generate_config.length, generate_config.temperature
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    inputs_TB, state = prefixes_NB.to(device), None
    if not temperature:
        if len(inputs_TB) > 1:
            _, state = model(inputs_TB[:-1], state)
        greedy_TB = model.generate_greedy(inputs_TB[-1], state, length)
        if greedy_TB is not None:
            return greedy_TB
        inputs_TB = inputs_TB[-1:]
    generated_TB = inputs_TB.new_empty(length, inputs_TB.shape[1])
    for step in range(length):
        logits_TBV, state = model(inputs_TB, state)
        generated_TB[step] = _sample(logits_TBV[-1], temperature, generator)
        inputs_TB = generated_TB[step : step + 1]
    return generated_TB


def _sample(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Returns the most likely token of each lane at temperature 0, else a random one."""
    if not temperature:
        return logits_BV.argmax(1)
    # Shifted to a maximum of 0 and in float64, so that no temperature is too low.
    shifted_BV = (logits_BV - logits_BV.amax(1, keepdim=True)).double()
    probabilities_BV = torch.softmax(shifted_BV / temperature, 1)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
