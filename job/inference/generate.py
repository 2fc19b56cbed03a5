"""Loads a checkpoint's model and generates continuations of a prefix.

Axes: N tokens of the prefix, T steps, B lanes, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from job.config.inference import GenerateConfig
from job.config.model import BUILTIN_CELLS, ModelConfig
from job.config.schema import Config
from job.data.vocabulary import Vocabulary
from job.errors import NonFiniteLogits, UserError
from job.inference.ensemble import Ensemble, check_same_vocabulary
from job.inference.prefix import encode_prefix, read_prefix
from job.inference.sampling import sample_generator, sample_tokens
from job.inference.saved_state import SavedState, check_no_file, read_state, write_state
from job.nn.language_model import LanguageModel, build_model_with_weights
from job.nn.state import State, cat_states
from job.training.checkpoint import LoadedCheckpoint, weights_sha256

BATCH_LANES = 64  # that are sampled at a time
BLOCK_TOKENS = 1024  # of a prefix, per call of the model
STOP_INTERVAL = 32  # tokens between two searches for generate.stop
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
    model = build_model_with_weights(stored, vocabulary_size, config.run.seed, weights, dtype, "checkpoint")
    model.reset_token = checkpoint.vocabulary.reset_token(config.corpus)
    return model


@dataclass(frozen=True)
class Generated:
    """A prefix, as the user typed it, and its continuations."""

    prefix: str
    continuations: list[str]

    @property
    def texts(self) -> list[str]:
        """The prefix with each of its continuations."""
        return [self.prefix + continuation for continuation in self.continuations]


def generate_text(checkpoint: LoadedCheckpoint, config: Config) -> str:
    """Returns ``generate.prefix``, as the user typed it, and one continuation: the sample of a run.

    There is no continuation if the last step of training made the model's logits infinite or NaN.

    Raises:
        UserError: as ``generate_texts``
    """
    sample = replace(config.generate, prefix_file="", num_samples=1, save_state="", load_state="")
    try:
        return generate_texts([checkpoint], replace(config, generate=sample)).texts[0]
    except NonFiniteLogits:
        return read_prefix(sample)


def generate_texts(checkpoints: Sequence[LoadedCheckpoint], config: Config) -> Generated:
    """Returns the prefix and its continuations by a model.

    Args:
        checkpoints: of one model, or of several whose mean of probabilities is used; the first gives the vocabulary
            and the cleaning of the prefix
        config: its ``generate`` section, ``evaluate.weights``, ``run.seed``, and the cell of ``model`` as the user gave
            it

    Raises:
        UserError: none of the prefix's tokens is in the vocabulary, a file cannot be read or written, a checkpoint has
            another vocabulary than the first one, a model's logits are not finite, or as ``load_model``
    """
    check_same_vocabulary(checkpoints)
    generate_config, vocabulary = config.generate, checkpoints[0].vocabulary
    check_no_file(generate_config.save_state)
    prefix = read_prefix(generate_config)
    needs_ids = prefix or not generate_config.load_state
    ids = encode_prefix(prefix, checkpoints[0].config.corpus, vocabulary) if needs_ids else np.empty(0, np.int32)
    models = [load_model(checkpoint, config.model, config.evaluate.weights) for checkpoint in checkpoints]
    needs_digests = generate_config.save_state or generate_config.load_state
    digests = [weights_sha256(model.state_dict()) for model in models] if needs_digests else []
    ensemble = Ensemble(models, None if generate_config.unknown else vocabulary.unknown_id)
    saved = read_state(generate_config.load_state, ensemble, digests) if generate_config.load_state else None
    state = read_tokens(ensemble, ids, saved)
    if generate_config.save_state:
        write_state(generate_config.save_state, state, digests)
    seed = config.run.seed if generate_config.seed < 0 else generate_config.seed
    samples = _generate_samples(ensemble, state, generate_config, seed, vocabulary)
    return Generated(
        prefix, [continuation_text(ids, state.token, prefix, vocabulary, generate_config.stop) for ids in samples]
    )


def continuation_text(ids: list[int], previous: int, prefix: str, vocabulary: Vocabulary, stop: str) -> str:
    """Returns the text of generated tokens up to ``stop``, with a blank if it is needed after the prefix."""
    text = vocabulary.decode_after(previous, ids) if prefix else vocabulary.decode(ids)
    has_blank = not prefix or prefix[-1].isspace() or not text or text[0].isspace()
    text = " " * (vocabulary.kind == "word" and not has_blank) + text
    return text.partition(stop)[0] if stop else text


@torch.no_grad()
def read_tokens(ensemble: Ensemble, ids: np.ndarray, saved: SavedState | None = None) -> SavedState:
    """Returns the state after a prefix, in memory that does not depend on its length.

    Args:
        ensemble: the models
        ids: token ids (N,), N at least 1 unless there is a saved state
        saved: the state before the prefix; None: zero
    """
    states: list[State] = [None] * len(ensemble.models) if saved is None else saved.states
    ids = ids if saved is None else np.concatenate([[saved.token], ids])
    device = ensemble.models[0].linear.weight.device
    for start in range(0, len(ids) - 1, BLOCK_TOKENS):
        block = ids[start : min(start + BLOCK_TOKENS, len(ids) - 1)]
        states = ensemble.advance(torch.from_numpy(block.astype(np.int64))[:, None].to(device), states)
    return SavedState(states, int(ids[-1]))


def _generate_samples(
    ensemble: Ensemble, state: SavedState, generate_config: GenerateConfig, seed: int, vocabulary: Vocabulary
) -> list[list[int]]:
    """Returns the token ids of ``generate.num_samples`` continuations, which may go on after ``generate.stop``."""
    length, first_1 = generate_config.length, torch.tensor([state.token])
    if not generate_config.temperature:
        return [continue_greedily(ensemble, first_1, state.states, length)[:, 0].tolist()]
    samples: list[list[int]] = []
    for first in range(0, generate_config.num_samples, BATCH_LANES):
        numbers = range(first, min(first + BATCH_LANES, generate_config.num_samples))
        states_B = [cat_states([lane] * len(numbers)) for lane in state.states]
        generators = [sample_generator(seed, number) for number in numbers]
        has_ended = StopCondition(vocabulary, generate_config.stop, len(numbers))
        first_B = first_1.expand(len(numbers))
        tokens_TB = continue_randomly(ensemble, first_B, states_B, generate_config, generators, has_ended)
        samples += tokens_TB.T.tolist()
    return samples


@torch.no_grad()
def continue_greedily(ensemble: Ensemble, first_B: Tensor, states: list[State], length: int) -> Tensor:
    """Returns the token ids (length, B), int64, of the most likely tokens, as ``predict_ch8`` of the d2l book does.

    Args:
        ensemble: the models
        first_B: each lane's last token before those, int64
        states: of each model before that token
        length: number of tokens

    Source: section 9.5 of https://d2l.ai
    """
    greedy_TB = ensemble.generate_greedy(first_B, states, length)
    if greedy_TB is not None:
        return greedy_TB
    tokens_TB, inputs_B = first_B.new_empty(length, len(first_B)), first_B
    for step in range(length):
        logits_BV, states = ensemble.step(inputs_B, states)
        inputs_B = torch.argmax(logits_BV, 1, out=tokens_TB[step])
    return tokens_TB


@torch.no_grad()
def continue_randomly(
    ensemble: Ensemble,
    first_B: Tensor,
    states: list[State],
    generate_config: GenerateConfig,
    generators: Sequence[torch.Generator],
    has_ended: "StopCondition",
) -> Tensor:
    """Returns the token ids (T, B), int64, of sampled tokens.

    The arguments that ``continue_greedily`` has not are:

    Args:
        generate_config: number of tokens, and how they are chosen
        generators: of each lane
        has_ended: whether fewer tokens are enough
    """
    tokens_TB, inputs_B = first_B.new_empty(generate_config.length, len(first_B)), first_B
    for step in range(len(tokens_TB)):
        logits_BV, states = ensemble.step(inputs_B, states)
        tokens_TB[step] = inputs_B = sample_tokens(logits_BV, generate_config, generators)
        if (step + 1) % STOP_INTERVAL == 0 and has_ended(tokens_TB[: step + 1]):
            return tokens_TB[: step + 1]
    return tokens_TB


class StopCondition:
    """Whether ``generate.stop`` has occurred in all of some continuations."""

    def __init__(self, vocabulary: Vocabulary, stop: str, num_lanes: int) -> None:
        self.vocabulary, self.stop, self.lanes = vocabulary, stop, set(range(num_lanes))
        self.tail = STOP_INTERVAL + len(stop.encode())  # tokens, each of a byte or more

    def __call__(self, tokens_TB: Tensor) -> bool:
        """Searches the last tokens of each lane; called after every ``STOP_INTERVAL`` of them."""
        for lane in list(self.lanes if self.stop else ()):
            ids_T = tokens_TB[:, lane]
            if self._occurs(ids_T[-self.tail :]) and self._occurs(ids_T):  # the tail may begin inside a character
                self.lanes.discard(lane)
        return not self.lanes

    def _occurs(self, ids_T: Tensor) -> bool:
        return self.stop in self.vocabulary.decode(ids_T.tolist())
