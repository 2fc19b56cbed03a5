"""The continuation of a prefix."""

import numpy as np
import torch
from torch import Tensor

from job.config.schema import Config, GenerateConfig
from job.data.corpus import clean_text
from job.data.vocabulary import Vocabulary
from job.errors import UserError
from job.inference.load import load_model
from job.nn.language_model import LanguageModel
from job.nn.state import State
from job.training.checkpoint import LoadedCheckpoint


def encode_prefix(prefix: str, cleaning: str, vocabulary: Vocabulary) -> np.ndarray:
    """The prefix as tokens, cleaned as the corpus was; UserError where none of them is known."""
    ids = vocabulary.encode(clean_text(prefix, cleaning))
    if not vocabulary.contains_known_token(ids):
        raise UserError(f"generate.prefix = {prefix!r}: the vocabulary knows nothing of it; choose another prefix")
    return ids


@torch.no_grad()
def generate_tokens(model: LanguageModel, prefix: np.ndarray, generate_config: GenerateConfig, seed: int) -> list[int]:
    """Tokens that follow the prefix (N,): greedily, or drawn where the temperature is above 0."""
    inputs_TB = torch.from_numpy(prefix.astype(np.int64))[:, None]
    return generate_batch(model, inputs_TB, generate_config, seed)[:, 0].tolist()


@torch.no_grad()
def generate_batch(model: LanguageModel, prefixes_NB: Tensor, generate_config: GenerateConfig, seed: int) -> Tensor:
    """Tokens that follow prefixes of one length, each in a lane of its own: (length, B).

    As in the d2l book (``predict_ch8``), the state is warmed up on all of the prefix but its last
    token, which then is the first input that asks for a new one.
    """
    if not generate_config.length:
        return prefixes_NB.new_empty(0, prefixes_NB.shape[1])
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    inputs_TB, found = prefixes_NB.to(device), []
    state: State = None
    if not generate_config.temperature:
        if len(inputs_TB) > 1:
            _, state = model(inputs_TB[:-1], state)
        spoken = model.generate_greedy(inputs_TB[-1], state, generate_config.length)
        if spoken is not None:
            return spoken
        inputs_TB = inputs_TB[-1:]
    for _ in range(generate_config.length):
        logits_TBV, state = model(inputs_TB, state)
        inputs_TB = _sample(logits_TBV[-1], generate_config.temperature, generator)[None]
        found.append(inputs_TB[0])
    return torch.stack(found)


def _sample(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token for each lane: the most likely one, or one drawn."""
    if not temperature:
        return logits_BV.argmax(1)
    above_BV = (logits_BV - logits_BV.amax(1, keepdim=True)).double()  # in which no temperature is too low
    odds_BV = torch.softmax(above_BV / temperature, 1)
    return torch.multinomial(odds_BV, 1, generator=generator)[:, 0]


def decode_continuation(vocabulary: Vocabulary, prefix: np.ndarray, continued: list[int]) -> str:
    """Prefix and continuation as one text."""
    return vocabulary.decode([*prefix.tolist(), *continued])


def generate_text(loaded: LoadedCheckpoint, config: Config) -> str:
    """The prefix and its continuation by a checkpoint's model."""
    prefix = encode_prefix(config.generate.prefix, loaded.config.corpus.cleaning, loaded.vocabulary)
    model = load_model(loaded)
    continued = generate_tokens(model, prefix, config.generate, config.run.seed)
    return decode_continuation(loaded.vocabulary, prefix, continued)
