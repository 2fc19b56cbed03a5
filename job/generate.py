"""The continuation of a prefix."""

import numpy as np
import torch

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
    """Tokens that follow the prefix (N,): greedily, or drawn where the temperature is above 0.

    As in the d2l book (``predict_ch8``), the state is warmed up on all of the prefix but its last
    token, which then is the first input that asks for a new one.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    state: State = None
    inputs_TB = torch.from_numpy(prefix.astype(np.int64))[:, None].to(device)
    found: list[int] = []
    for _ in range(options.length):
        logits_TBV, state = model(inputs_TB, state)
        logits_V = logits_TBV[-1, 0]
        if options.temperature:
            odds_V = torch.softmax(logits_V.float() / options.temperature, 0)
            token = int(torch.multinomial(odds_V, 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        found.append(token)
        inputs_TB = torch.tensor([[token]], device=device)
    return found


def text_of(vocabulary: Vocabulary, prefix: np.ndarray, continued: list[int]) -> str:
    """Prefix and continuation as one text."""
    return vocabulary.decode([*prefix.tolist(), *continued])
