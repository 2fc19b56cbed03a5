"""Streams: continuations that are being generated, and the batch that advances those of a model together.

Axes: B lanes, one for each stream; V tokens of the vocabulary; N tokens that are read.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from job.config.inference import GenerateConfig
from job.inference.generate import BLOCK_TOKENS
from job.inference.prefix import start_tokens
from job.inference.sampling import draw_tokens, sample_generator, token_probabilities
from job.inference.saved_state import SavedState
from job.nn.state import State, cat_states, map_state
from job.serving.conversations import Conversation, ServedModel
from job.serving.text_stream import TextStream

MAX_UNREAD = 256  # events of a stream, which pauses until its client has read some


@dataclass(frozen=True)
class TokenEvent:
    """A generated token.

    Args:
        id: its id
        text: the text that it completes
        probability: under the distribution that it was drawn from; of greedy decoding, under that of the model
        alternatives: the most likely tokens, by id, and their probabilities
    """

    id: int
    text: str
    probability: float
    alternatives: list[tuple[int, float]]


@dataclass(frozen=True)
class EndEvent:
    """The end of a stream: why it ended (``length``, ``stop``, ``cancelled``, ``failed``), and text withheld so far."""

    reason: str
    text: str = ""


class Stream:
    """A continuation of a conversation.

    Args:
        conversation: where it begins
        ids: token ids (N,) that are read before anything is generated
        before: the text so far with theirs, of which only the end counts
        generate_config: length, stop, and how tokens are chosen
        num_alternatives: number of alternatives that are reported for each token
        keep: whether the conversation continues after the stream; otherwise its state does not change
    """

    def __init__(
        self,
        conversation: Conversation,
        ids: np.ndarray,
        before: str,
        generate_config: GenerateConfig,
        num_alternatives: int = 0,
        keep: bool = True,
    ) -> None:
        self.conversation, self.ids, self.before = conversation, ids, before
        self.generate_config, self.num_alternatives, self.keep = generate_config, num_alternatives, keep
        seed = conversation.model.seed if generate_config.seed < 0 else generate_config.seed
        self.generator = sample_generator(seed, 0)
        self.events: deque[TokenEvent | EndEvent] = deque()
        self.is_cancelled = False  # set by any thread
        self.num_generated = 0

    @property
    def model(self) -> ServedModel:
        """The model of the conversation."""
        return self.conversation.model

    @property
    def is_paused(self) -> bool:
        """Whether its client has to read events first."""
        return len(self.events) >= MAX_UNREAD

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to generate."""
        return self.num_generated >= self.generate_config.length or self.text.has_stopped

    def begin(self) -> None:
        """Continues from the state in which the conversation is now."""
        saved, ids = self.conversation.saved, self.ids
        if saved is None and not len(ids):
            ids = start_tokens(self.model.vocabulary)
        self.unread = ids if saved is None else np.concatenate([[saved.token], ids])
        self.states: list[State] = [None] * len(self.model.ensemble.models) if saved is None else saved.states
        self.token = int(self.unread[-1])
        self.before = self.before or self.conversation.end
        self.text = TextStream(
            self.model.vocabulary, self.token if self.before else None, self.before, self.generate_config.stop
        )

    def read_block(self) -> int:
        """Reads the next block of tokens but the last one, as ``read_tokens``; returns how many it read."""
        block = self.unread[: min(BLOCK_TOKENS, len(self.unread) - 1)]
        if len(block):
            tokens_TB = torch.from_numpy(block.astype(np.int64))[:, None]
            states = self.model.ensemble.advance(tokens_TB, self.states)
            self.states = [map_state(Tensor.clone, state) for state in states]  # which may be views of the whole block
        self.unread = self.unread[len(block) :]
        return len(block)

    def add(self, token: int, probability: float, alternatives: list[tuple[int, float]]) -> None:
        """Appends a generated token."""
        self.token = token
        self.num_generated += 1
        text = self.text.push(token)
        self.before = text[-1:] or self.before
        self.events.append(TokenEvent(token, text, probability, alternatives))

    def end(self, reason: str) -> None:
        """Ends it, and lets the conversation continue after it, unless it failed or has not read all of its text."""
        rest = self.text.finish()
        if self.keep and reason != "failed" and len(self.unread) == 1:
            self.conversation.saved = SavedState(self.states, self.token)
            self.conversation.end = rest[-1:] or self.before[-1:]
        self.events.append(EndEvent(reason, rest))


class Batch:
    """The streams of a model that generate, with their states side by side."""

    def __init__(self, model: ServedModel) -> None:
        self.ensemble = model.ensemble
        self.streams: list[Stream] = []
        self.states: list[State] = []

    def set_streams(self, streams: Sequence[Stream]) -> None:
        """Sets which streams the next step advances; those that leave own their state again."""
        wanted, present = set(streams), set(self.streams)
        if wanted == present:
            return
        for lane, stream in enumerate(self.streams):
            if stream not in wanted:
                stream.states = self._select([lane])
        lanes = [lane for lane, stream in enumerate(self.streams) if stream in wanted]
        joining = [stream for stream in streams if stream not in present]
        parts = [self._select(lanes)] * bool(lanes) + [stream.states for stream in joining]
        self.states = [cat_states(list(of_model)) for of_model in zip(*parts, strict=True)]
        self.streams = [self.streams[lane] for lane in lanes] + joining

    def clear(self) -> None:
        """Removes all streams, without their states."""
        self.streams, self.states = [], []

    def _select(self, lanes: list[int]) -> list[State]:
        """Returns a copy of the states of some lanes."""
        return [map_state(lambda tensor: tensor[:, lanes], state) for state in self.states]

    def step(self) -> None:
        """Appends a token to each stream."""
        tokens_B = torch.tensor([stream.token for stream in self.streams])
        logits_BV, self.states = self.ensemble.step(tokens_B, self.states)
        choose_tokens(self.streams, logits_BV)


def choose_tokens(streams: Sequence[Stream], logits_BV: Tensor) -> None:
    """Appends a token to each stream, chosen as ``generate`` does; streams of the same options at a time."""
    groups: dict[tuple[float, int, float], list[int]] = {}
    for lane, stream in enumerate(streams):
        options = stream.generate_config
        groups.setdefault((options.temperature, options.top_k, options.top_p), []).append(lane)
    for lanes in groups.values():
        _choose_alike([streams[lane] for lane in lanes], logits_BV[lanes])


def _choose_alike(streams: Sequence[Stream], logits_BV: Tensor) -> None:
    generate_config = streams[0].generate_config
    if generate_config.temperature:
        probabilities_BV = token_probabilities(logits_BV, generate_config)
        tokens_B = draw_tokens(probabilities_BV, [stream.generator for stream in streams])
    else:
        tokens_B, probabilities_BV = logits_BV.argmax(1), logits_BV.double().softmax(1)
    probabilities_BV = probabilities_BV / probabilities_BV.sum(1, keepdim=True)
    chosen_B = probabilities_BV.gather(1, tokens_B[:, None])[:, 0].tolist()
    count = min(max(stream.num_alternatives for stream in streams), logits_BV.shape[1])
    values_BK, ids_BK = (x.tolist() for x in probabilities_BV.topk(count, 1))
    for lane, (stream, token) in enumerate(zip(streams, tokens_B.tolist(), strict=True)):
        best = list(zip(ids_BK[lane], values_BK[lane], strict=True))[: stream.num_alternatives]
        stream.add(token, chosen_B[lane], [(index, value) for index, value in best if value > 0])
