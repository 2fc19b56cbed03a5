"""Conversations: the recurrent states that the server keeps, bounded in number and age."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from job.config.text import CorpusConfig
from job.data.vocabulary import Vocabulary
from job.inference.ensemble import Ensemble
from job.inference.saved_state import SavedState

MAX_CONVERSATIONS = 1000
MAX_AGE_S = 3600.0  # since a conversation was used last


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that is served.

    Args:
        name: of its run, which may be any text; unique among the models
        step: of its checkpoint
        ensemble: the model
        vocabulary: its tokens
        corpus_config: how its prefix is cleaned
        seed: of the sampling where a request has none
        description: its cell and sizes
    """

    name: str
    step: int
    ensemble: Ensemble
    vocabulary: Vocabulary
    corpus_config: CorpusConfig
    seed: int
    description: str


@dataclass(eq=False)
class Conversation:
    """A model's state after the text that was read and generated so far.

    Args:
        model: the model
        id: a name that cannot be guessed
        saved: the state, written by the engine's thread only; None before the first token
        end: the last character of the text so far
    """

    model: ServedModel
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    saved: SavedState | None = None
    end: str = ""


class Conversations:
    """The conversations by id. The one that was used least recently is removed if there are too many.

    Args:
        max_count: largest number
        max_age_s: seconds without use after which a conversation is removed
        clock: seconds since any moment
    """

    def __init__(
        self,
        max_count: int = MAX_CONVERSATIONS,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_count, self.max_age_s, self.clock = max_count, max_age_s, clock
        self._entries: OrderedDict[str, tuple[Conversation, float]] = OrderedDict()  # with the time of the last use

    def __len__(self) -> int:
        return len(self._entries)

    def create(self, model: ServedModel) -> Conversation:
        """Adds a conversation with a zero state."""
        conversation = Conversation(model)
        self._use(conversation)
        return conversation

    def get(self, conversation_id: str) -> Conversation | None:
        """Returns the conversation, which counts as its use; None if there is none, or not any more."""
        self._remove_old()
        entry = self._entries.get(conversation_id)
        if entry is None:
            return None
        self._use(entry[0])
        return entry[0]

    def reset(self, conversation: Conversation) -> None:
        """Replaces a conversation by one of the same id with a zero state; streams of the old one do not change it."""
        self._use(Conversation(conversation.model, conversation.id))

    def delete(self, conversation: Conversation) -> None:
        """Removes a conversation."""
        del self._entries[conversation.id]

    def _use(self, conversation: Conversation) -> None:
        self._entries[conversation.id] = conversation, self.clock()
        self._entries.move_to_end(conversation.id)
        self._remove_old()

    def _remove_old(self) -> None:
        oldest = self.clock() - self.max_age_s
        while self._entries and (len(self._entries) > self.max_count or next(iter(self._entries.values()))[1] < oldest):
            self._entries.popitem(last=False)
