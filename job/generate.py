"""The continuation of a prefix."""

import numpy as np
import torch
from torch import Tensor

from job import corpus
from job.config import Generate
from job.errors import UserError
from job.model import LanguageModel, State
from job.vocabulary import Vocabulary


def prefix_ids(prefix: str, cleaning: str, vocabulary: Vocabulary) -> np.ndarray:
    """The prefix as tokens, cleaned as the corpus was; UserError where none of them is known."""
    ids = vocabulary.encode(corpus.clean(prefix, cleaning))
    if not vocabulary.knows_some(ids):
        raise UserError(f"generate.prefix = {prefix!r}: the vocabulary knows nothing of it; choose another prefix")
    return ids


@torch.no_grad()
def continuation(model: LanguageModel, prefix: np.ndarray, options: Generate, seed: int) -> list[int]:
    """Tokens that follow the prefix (N,): greedily, or drawn where the temperature is above 0."""
    inputs_TB = torch.from_numpy(prefix.astype(np.int64))[:, None]
    return continuations(model, inputs_TB, options, seed)[:, 0].tolist()


@torch.no_grad()
def continuations(model: LanguageModel, prefixes_NB: Tensor, options: Generate, seed: int) -> Tensor:
    """Tokens that follow prefixes of one length, each in a lane of its own: (length, B).

    As in the d2l book (``predict_ch8``), the state is warmed up on all of the prefix but its last
    token, which then is the first input that asks for a new one.
    """
    if not options.length:
        return prefixes_NB.new_empty(0, prefixes_NB.shape[1])
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    inputs_TB, found = prefixes_NB.to(device), []
    state: State = None
    if not options.temperature:
        if len(inputs_TB) > 1:
            _, state = model(inputs_TB[:-1], state)
        spoken = model.speech(inputs_TB[-1], state, options.length)
        if spoken is not None:
            return spoken
        inputs_TB = inputs_TB[-1:]
    for _ in range(options.length):
        logits_TBV, state = model(inputs_TB, state)
        inputs_TB = _chosen(logits_TBV[-1], options.temperature, generator)[None]
        found.append(inputs_TB[0])
    return torch.stack(found)


def _chosen(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token for each lane: the most likely one, or one drawn."""
    if not temperature:
        return logits_BV.argmax(1)
    above_BV = (logits_BV - logits_BV.amax(1, keepdim=True)).double()  # in which no temperature is too low
    odds_BV = torch.softmax(above_BV / temperature, 1)
    return torch.multinomial(odds_BV, 1, generator=generator)[:, 0]


def text_of(vocabulary: Vocabulary, prefix: np.ndarray, continued: list[int]) -> str:
    """Prefix and continuation as one text."""
    return vocabulary.decode([*prefix.tolist(), *continued])
