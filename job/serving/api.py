"""The HTTP API: JSON and server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from job.config.inference import GenerateConfig
from job.errors import UserError
from job.inference.prefix import start_tokens
from job.serving.conversations import Conversation, Conversations, ServedModel
from job.serving.engine import Engine
from job.serving.guard import error_response, server_sent_event
from job.serving.prefix import encode_text
from job.serving.schemas import (
    Continuation,
    ConversationInfo,
    ConversationRequest,
    ErrorInfo,
    GenerateRequest,
    ModelInfo,
    NextRequest,
    NextTokens,
)
from job.serving.streams import EndEvent, Stream, TokenEvent

Content = Callable[[Stream, AsyncIterator[list[TokenEvent | EndEvent]]], AsyncIterator[str]]  # of a response
RETRY_AFTER_S = 1
STATIC = Path(__file__).parent / "static"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorInfo, "description": text}
    for status, text in {
        400: "not JSON",
        401: "the token is missing or wrong",
        404: "no such model or conversation",
        409: "another request of the same conversation ended this one",
        413: "the body is too large",
        422: "a value is not valid, or the text has tokens that are not in the vocabulary",
        429: "too many streams: retry after the seconds in Retry-After",
        500: "the model failed",
    }.items()
}


class Service:
    """The models, their conversations and their streams, for the handlers of requests.

    Args:
        models: each with a name of its own
        conversations: empty at first
    """

    def __init__(self, models: Sequence[ServedModel], conversations: Conversations) -> None:
        self.models, self.conversations = {model.name: model for model in models}, conversations
        self.has_events: dict[Stream, asyncio.Event] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.engine = Engine(models, self._on_events)

    def _on_events(self, streams: Sequence[Stream]) -> None:
        assert self.loop
        self.loop.call_soon_threadsafe(self._wake, streams)

    def _wake(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            if stream in self.has_events:
                self.has_events[stream].set()

    def conversation(self, conversation_id: str) -> Conversation:
        """Returns a conversation. Raises HTTPException if there is none."""
        conversation = self.conversations.get(conversation_id)
        if conversation is None:
            raise HTTPException(404, "there is no such conversation, or not any more: create one")
        return conversation

    def start(self, stream: Stream) -> None:
        """Starts a stream, which ``finish`` has to follow. Raises HTTPException if there are too many."""
        self.loop = asyncio.get_running_loop()
        self.has_events[stream] = asyncio.Event()
        if not self.engine.submit(stream):
            del self.has_events[stream]
            problem = f"{self.engine.max_streams} continuations are generated already"
            raise HTTPException(429, f"{problem}; retry later", {"Retry-After": str(RETRY_AFTER_S)})

    def finish(self, stream: Stream) -> None:
        """Ends a stream if it has not ended: its client is gone."""
        self.engine.cancel(stream)
        del self.has_events[stream]

    async def events(self, stream: Stream) -> AsyncIterator[list[TokenEvent | EndEvent]]:
        """Yields the events of a stream that was started, as many as there are at a time."""
        events: list[TokenEvent | EndEvent] = []
        while not events or not isinstance(events[-1], EndEvent):
            await self.has_events[stream].wait()
            self.has_events[stream].clear()
            events = [stream.events.popleft() for _ in range(len(stream.events))]
            self.engine.wake()  # it may have been paused
            yield events


class _StreamResponse(StreamingResponse):
    """The events of a stream in some form, as they come; a disconnect ends the stream."""

    def __init__(self, service: Service, stream: Stream, content: Content, media_type: str) -> None:
        service.start(stream)
        super().__init__(content(stream, service.events(stream)), media_type=media_type)
        self.finish = partial(service.finish, stream)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if the client was gone before the first event
            self.finish()


class _ObjectResponse(_StreamResponse):
    """A JSON object of a stream, in parts. An HTTPException before the first part is the response."""

    def __init__(self, service: Service, stream: Stream, content: Content) -> None:
        super().__init__(service, stream, content, "application/json")

    async def stream_response(self, send: Send) -> None:
        """Sends the status with the first part."""
        start: list[Message] = []

        async def send_after_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.append(message)
                return
            while start:
                await send(start.pop())
            await send(message)

        await super().stream_response(send_after_start)


def _check_end(event: EndEvent) -> None:
    """Raises HTTPException if a stream that has no token did not end as its request asked for."""
    if event.reason == "failed":
        raise HTTPException(500, "the model failed, as the log of the server describes")
    if event.reason == "cancelled":
        raise HTTPException(409, "another request of the same conversation ended this one, or the server stops")


async def _prepare_stream(conversation: Conversation, request: NextRequest) -> Stream:
    """Returns the stream that a request describes. Raises UserError if its text or a value is not valid."""
    model = conversation.model
    fields: dict[str, Any] = {"length": 1, "temperature": request.temperature}
    fields |= {"top_k": request.top_k, "top_p": request.top_p}
    if isinstance(request, GenerateRequest):
        fields |= {"length": request.length, "seed": request.seed, "stop": request.stop}
    generate_config = GenerateConfig(**fields)
    ids = await run_in_threadpool(encode_text, request.text, model, conversation.end)
    tokens = np.array(request.tokens, np.int32)
    if request.tokens and max(request.tokens) >= len(model.vocabulary):
        problem = f"tokens: {max(request.tokens)} is not the id of a token"
        raise UserError(problem, f"there are {len(model.vocabulary)}")
    if conversation.saved is None and not len(ids) + len(tokens):
        start_tokens(model.vocabulary)  # raises UserError if there is none
    before = request.text[-1:] + model.vocabulary.decode(request.tokens[-1:])
    keep = isinstance(request, GenerateRequest) and request.keep
    return Stream(conversation, np.concatenate([ids, tokens]), before, generate_config, request.alternatives, keep)


def _alternatives(stream: Stream, pairs: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    decode = stream.model.vocabulary.decode
    return [{"id": index, "text": decode([index]), "probability": value} for index, value in pairs]


def _as_json(stream: Stream, event: TokenEvent | EndEvent) -> dict[str, Any]:
    """Returns the fields of TokenInfo or EndInfo, without the cost of making one for each token."""
    if isinstance(event, EndEvent):
        return {"reason": event.reason, "text": event.text}
    alternatives = _alternatives(stream, event.alternatives)
    return {"id": event.id, "text": event.text, "probability": event.probability, "alternatives": alternatives}


async def _server_sent_events(stream: Stream, events: AsyncIterator[list[TokenEvent | EndEvent]]) -> AsyncIterator[str]:
    async for group in events:
        yield "".join(
            server_sent_event("end" if isinstance(event, EndEvent) else "token", _as_json(stream, event))
            for event in group
        )


async def _continuation(stream: Stream, events: AsyncIterator[list[TokenEvent | EndEvent]]) -> AsyncIterator[str]:
    """Yields the whole continuation as one object, in parts: the tokens with their alternatives may be large."""
    texts, start, separator = [], '{"tokens": [', ""
    async for group in events:
        for event in group:
            texts.append(event.text)
            if isinstance(event, TokenEvent):
                yield start + separator + json.dumps(_as_json(stream, event))
                start, separator = "", ", "
            else:
                if start:
                    _check_end(event)
                yield f'{start}], "text": {json.dumps("".join(texts))}, "reason": {json.dumps(event.reason)}}}'


async def _next_tokens(stream: Stream, events: AsyncIterator[list[TokenEvent | EndEvent]]) -> AsyncIterator[str]:
    """Yields the alternatives of the only token as JSON."""
    pairs: list[tuple[int, float]] = []
    async for group in events:
        for event in group:
            if isinstance(event, TokenEvent):
                pairs += event.alternatives
            else:
                _check_end(event)
    yield json.dumps({"tokens": _alternatives(stream, pairs)})


def build_app(service: Service) -> FastAPI:
    """Returns the application: the API, its OpenAPI schema, and the page."""
    app = FastAPI(title="lanes", version=version("lanes"), docs_url=None, redoc_url=None, responses=_ERRORS)
    _add_error_handlers(app)
    _add_conversations(app, service)
    _add_generation(app, service)

    @app.get("/v1/models")
    async def list_models() -> list[ModelInfo]:
        """List the models."""
        return [
            ModelInfo(name=model.name, step=model.step, description=model.description,
                      vocabulary=model.vocabulary.kind, vocabulary_size=len(model.vocabulary))
            for model in service.models.values()
        ]  # fmt: skip

    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app


def _add_conversations(app: FastAPI, service: Service) -> None:
    @app.post("/v1/conversations", status_code=201)
    async def create_conversation(request: ConversationRequest) -> ConversationInfo:
        """Create a conversation with a model, from a zero state."""
        name = next(iter(service.models)) if request.model is None else request.model
        if name not in service.models:
            raise HTTPException(404, f"there is no model {name!r}")
        conversation = service.conversations.create(service.models[name])
        return ConversationInfo(id=conversation.id, model=name)

    @app.post("/v1/conversations/{conversation_id}/reset", status_code=204)
    async def reset_conversation(conversation_id: str) -> None:
        """Set the state of a conversation to zero."""
        service.conversations.reset(service.conversation(conversation_id))

    @app.delete("/v1/conversations/{conversation_id}", status_code=204)
    async def delete_conversation(conversation_id: str) -> None:
        """Delete a conversation."""
        service.conversations.delete(service.conversation(conversation_id))


def _add_generation(app: FastAPI, service: Service) -> None:
    events = {"description": "events `token` (TokenInfo) and `end` (EndInfo)", "content": {"text/event-stream": {}}}

    @app.post("/v1/conversations/{conversation_id}/generate", response_model=Continuation, responses={200: events})
    async def generate(conversation_id: str, request: GenerateRequest) -> Response:
        """Read a text and continue it; ends a continuation of the same conversation that is being generated."""
        stream = await _prepare_stream(service.conversation(conversation_id), request)
        if request.stream:
            return _StreamResponse(service, stream, _server_sent_events, "text/event-stream")
        return _ObjectResponse(service, stream, _continuation)

    @app.post("/v1/conversations/{conversation_id}/next", response_model=NextTokens)
    async def next_tokens(conversation_id: str, request: NextRequest) -> Response:
        """Return the most likely tokens after a text; the state of the conversation stays as it is."""
        stream = await _prepare_stream(service.conversation(conversation_id), request)
        return _ObjectResponse(service, stream, _next_tokens)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(UserError)
    async def on_user_error(_: Request, error: UserError) -> Response:
        return error_response(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not JSON: {first['ctx']['error']}")
        field = ".".join(map(str, first["loc"][1:]))
        return error_response(422, f"{field}: {first['msg']}" if field else first["msg"])

    @app.exception_handler(Exception)
    async def on_error(_: Request, error: Exception) -> Response:
        return error_response(500, "an error of the server, which its log describes")
