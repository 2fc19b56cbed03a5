"""The text of generated tokens as they arrive one by one: in sum the continuation that ``generate`` prints."""

from job.data.vocabulary import Vocabulary

REPLACEMENT = "\ufffd"  # as which bytes are decoded that are not, or not yet, a character


class TextStream:
    """Decodes tokens one by one. Withholds text that later tokens may change, or that may begin ``stop``.

    Args:
        vocabulary: of the tokens
        previous: the token before the first; None if the text begins with the first
        before: the text before the first token, of which only the end counts; empty if it begins with it
        stop: the text before which the continuation ends; empty: none
    """

    def __init__(self, vocabulary: Vocabulary, previous: int | None, before: str, stop: str) -> None:
        self.vocabulary, self.previous, self.stop = vocabulary, previous, stop
        self.pending: list[int] = []  # tokens whose text may not be complete
        self.num_returned = 0  # characters of the pending tokens' text
        self.held = ""  # text that may begin ``stop``
        self.has_stopped = False
        self.has_blank = vocabulary.kind == "word" and before[-1:].isspace()  # before the first word

    def push(self, token: int) -> str:
        """Returns the text that a token completes."""
        self.pending.append(token)
        text = self._pending_text()
        complete = text.removesuffix(REPLACEMENT)
        added, self.num_returned = complete[self.num_returned :], len(complete)
        if complete == text:
            self.previous, self.pending, self.num_returned, self.has_blank = token, [], 0, False
        return self._until_stop(added)

    def finish(self) -> str:
        """Returns the text that is withheld after the last token."""
        rest = self._until_stop(self._pending_text()[self.num_returned :]) if self.pending else ""
        return rest + self.held

    def _pending_text(self) -> str:
        if self.previous is None:
            return self.vocabulary.decode(self.pending)
        if self.vocabulary.kind != "word":
            return self.vocabulary.decode_after(self.previous, self.pending)
        before = self.vocabulary.decode([self.previous])
        text = self.vocabulary.decode([self.previous, *self.pending])[len(before) :]
        return text.removeprefix(" ") if self.has_blank else text

    def _until_stop(self, added: str) -> str:
        if self.has_stopped:
            return ""
        text, found, _ = (self.held + added).partition(self.stop) if self.stop else (self.held + added, "", "")
        self.has_stopped = bool(found)
        num_held = 0 if found else max(n for n in range(max(1, len(self.stop))) if text.endswith(self.stop[:n]))
        self.held = text[len(text) - num_held :]
        return text[: len(text) - num_held]
