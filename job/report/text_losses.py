"""The loss of each token of the beginning of the validation text, and the tokens that were likelier.

Axes: T steps, B lanes (one), V tokens of the vocabulary.
"""

from typing import Any

import numpy as np
import torch

from job.config.model import ModelConfig
from job.config.schema import Config
from job.data.dataset import Dataset
from job.data.tokens import Tokens
from job.data.vocabulary import Vocabulary
from job.errors import UserError
from job.inference.generate import load_model
from job.nn.language_model import LanguageModel
from job.nn.state import State
from job.run.run_dir import check_same_text
from job.run.setup import read_dataset
from job.run.text_cache import TextCache
from job.training.checkpoint import LoadedCheckpoint

NUM_CHARACTERS = 1000
NUM_ALTERNATIVES = 5
WINDOW_STEPS = 64  # per call of the model
MAX_LOGITS = 1 << 22  # per call; bounds the memory


def read_text_losses(
    loaded: LoadedCheckpoint, config: Config, dataset: Dataset | None, model_config: ModelConfig, cache: TextCache
) -> list[list[Any]]:
    """Returns the tokens of the beginning of the validation text, as ``compute_losses``.

    Args:
        loaded: the model's checkpoint
        config: of the run, which names the text
        dataset: what the run was trained on; None: read it again
        model_config: its cell as the user gave it
        cache: opens large texts

    Raises:
        UserError: there is no validation text, it cannot be read any more or has changed, the cell is not known, or a
            loss is not finite
    """
    if not config.corpus.validation_setting:
        raise UserError("the run has no validation text", "set corpus.validation_fraction or corpus.validation_source")
    model = load_model(loaded, model_config)
    if dataset is None:
        dataset = read_dataset(config, cache=cache, known=loaded.vocabulary).dataset
        check_same_text([loaded.checkpoint], dataset)
    return compute_losses(model, loaded.vocabulary, dataset.validation_tokens[: NUM_CHARACTERS + 1])


def compute_losses(model: LanguageModel, vocabulary: Vocabulary, tokens: Tokens) -> list[list[Any]]:
    """Returns of each token but the first its text, its loss in nats, and the likeliest tokens with probabilities.

    Args:
        model: the model; its state is zero before the first token
        vocabulary: of the tokens
        tokens: token ids (T + 1,); the texts of those that are returned have about NUM_CHARACTERS
    """
    model.eval()
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    texts = _texts(vocabulary, ids.tolist())
    rows: list[list[Any]] = []
    state: State = None
    num_steps = max(1, min(WINDOW_STEPS, MAX_LOGITS // len(vocabulary)))
    for window in (ids[start : start + num_steps + 1, None] for start in range(0, len(ids) - 1, num_steps)):
        losses, alternatives, state = _evaluate_window(model, window, state)
        for nats, likely in zip(losses, alternatives, strict=True):
            names = [[_text(vocabulary, token), round(value, 4)] for token, value in likely]
            rows.append([texts[len(rows) + 1], round(nats, 4), names])
        if sum(len(row[0]) for row in rows) >= NUM_CHARACTERS:
            break
    return rows


@torch.no_grad()
def _evaluate_window(
    model: LanguageModel, tokens_TB: torch.Tensor, state: State
) -> tuple[list[float], list[list[tuple[int, float]]], State]:
    """Returns the loss of each target, the likeliest tokens at its place with their probabilities, and the state."""
    logits_TBV, state = model(tokens_TB[:-1], state)
    log_TV = torch.log_softmax(logits_TBV[:, 0].double(), 1)
    nats_T = -log_TV.gather(1, tokens_TB[1:])[:, 0]
    if not log_TV.isfinite().all():  # the indices of the largest are not valid then
        raise UserError("the losses of the validation text are not finite")
    top_TK = log_TV.topk(min(NUM_ALTERNATIVES, log_TV.shape[1]))
    pairs = zip(top_TK.indices.tolist(), top_TK.values.exp().tolist(), strict=True)
    return nats_T.tolist(), [list(zip(*pair, strict=True)) for pair in pairs], state


def _text(vocabulary: Vocabulary, token: int) -> str:
    """Returns the text of a token; of a byte that is no character, its value, since all others look alike."""
    text = vocabulary.decode([token])
    is_shown = vocabulary.kind != "byte" or text in "\t\n\r" or (text.isprintable() and text != "\ufffd")
    return text if is_shown else f"\\x{token:02x}"


def _texts(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    """Returns the text of each token, with the blank that follows a word."""
    blank = " " if vocabulary.kind == "word" else ""
    return [text if text == "\n" else text + blank for text in (_text(vocabulary, token) for token in ids)]
