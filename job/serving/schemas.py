"""What the API accepts and returns, as JSON; its OpenAPI schema is made of these classes."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from job.config.inference import GenerateConfig

MAX_LENGTH = 10_000  # tokens that a request may generate
MAX_ALTERNATIVES = 50
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelInfo(BaseModel):
    """A model that is served."""

    name: str
    step: int = Field(description="training step of its checkpoint")
    description: str = Field(description="cell and sizes")
    vocabulary: str = Field(description="kind of its tokens: char, byte, word or bpe")
    vocabulary_size: int


class ConversationRequest(_Request):
    """A new conversation."""

    model: str | None = Field(None, description="name of a model; the first one if it is left out")


class ConversationInfo(BaseModel):
    """A conversation, whose recurrent state is on the server."""

    id: str
    model: str


class NextRequest(_Request):
    """A text that is read after the conversation, which does not change, and how the next token is chosen."""

    text: str = Field("", description="text to read first")
    tokens: list[TokenId] = Field([], description="token ids to read after the text")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: the most likely token (greedy)")
    top_k: int = Field(0, ge=0, lt=2**31, description="sample from the k most likely tokens; 0: from all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens of this total probability")
    alternatives: int = Field(5, ge=0, le=MAX_ALTERNATIVES, description="number of likely tokens to report")


class GenerateRequest(NextRequest):
    """A text that is read after the conversation, and how it is continued, with the options of ``generate``."""

    length: int = Field(GenerateConfig.length, ge=0, le=MAX_LENGTH, description="number of tokens")
    seed: int = Field(-1, ge=-1, lt=2**63, description="seed of the sampling; -1: that of the run")
    stop: str = Field("", max_length=1000, description="text before which the continuation ends; empty: none")
    keep: bool = Field(True, description="continue the conversation with this text; false: leave its state as it is")
    stream: bool = Field(True, description="send events as tokens are generated; false: one object at the end")


class Alternative(BaseModel):
    """A token, and its probability."""

    id: int
    text: str
    probability: float


class TokenInfo(Alternative):
    """A generated token: the event ``token``. Its text may be empty if it is the part of a character."""

    alternatives: list[Alternative]


class EndInfo(BaseModel):
    """The end of a continuation: the event ``end``."""

    reason: str = Field(description="length, stop, cancelled or failed")
    text: str = Field(description="text that follows the last token's, such as that of an incomplete character")


class Continuation(BaseModel):
    """A whole continuation."""

    text: str
    reason: str
    tokens: list[TokenInfo]


class NextTokens(BaseModel):
    """The most likely next tokens."""

    tokens: list[Alternative]


class ErrorDetail(BaseModel):
    """What is wrong with a request."""

    status: int
    message: str


class ErrorInfo(BaseModel):
    """An error."""

    error: ErrorDetail
