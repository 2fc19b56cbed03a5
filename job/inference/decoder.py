"""A model that advances the state of many lanes by a token at a time, for generation and serving.

Axes: B lanes, V tokens of the vocabulary.
"""

import torch
from torch import Tensor

from job.nn.language_model import LanguageModel
from job.nn.state import State, cat_states, map_state


class Decoder:
    """Advances any number of lanes; their logits and states have the same bits as if each were alone.

    Args:
        model: put into evaluation mode; its weights must not change afterwards
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns logits (B, V) and the state after a token of each lane.

        Args:
            tokens_B: token ids, int64
            state: of the lanes before the token, which does not change; None: zeros
        """
        # One lane at a time: the last bits of torch's operators depend on the number of lanes and on a lane's place.
        pairs = [self._step_alone(tokens_B, state, lane) for lane in range(len(tokens_B))]
        return torch.cat([logits_1V for logits_1V, _ in pairs]), cat_states([state for _, state in pairs])

    def _step_alone(self, tokens_B: Tensor, state: State, lane: int) -> tuple[Tensor, State]:
        # A copy, since the address of a tensor, too, has an effect on its last bits.
        lane_state = map_state(lambda tensor: tensor[:, lane : lane + 1].clone(), state)
        logits_11V, lane_state = self.model(tokens_B[None, lane : lane + 1], lane_state)
        return logits_11V[0], lane_state

    def generate_greedy(self, first_B: Tensor, state: State, length: int) -> Tensor | None:
        """Decodes greedily in few calls of the kernel.

        Args:
            first_B: the last token of each lane before the generated ones, int64
            state: of the lanes before that token; None: zeros
            length: number of tokens to generate

        Returns:
            Tokens (length, B), or None if the kernel does not support this model or device.
        """
        return self.model.generate_greedy(first_B, state, length)
