"""Serving: streams that are generated together against ``generate``, states, limits, and the HTTP API."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from conftest import ROOT, job, not_none, start_job, wait_until
from test_evaluate import train

from job.config.inference import GenerateConfig
from job.config.schema import Config
from job.config.toml import override_config
from job.data.vocabulary import Vocabulary
from job.errors import UserError
from job.inference.ensemble import Ensemble
from job.inference.generate import BLOCK_TOKENS, generate_texts
from job.run.run_dir import open_checkpoint
from job.serving import guard
from job.serving.api import _continuation
from job.serving.connection import Connection
from job.serving.conversations import Conversation, Conversations, ServedModel
from job.serving.engine import Engine
from job.serving.guard import MAX_BODY_BYTES
from job.serving.prefix import encode_text
from job.serving.server import Server, build_server, listen, load_models, page_address, read_token
from job.serving.streams import MAX_UNREAD, EndEvent, Stream, TokenEvent
from job.serving.text_stream import TextStream
from job.storage import Folder
from job.training.checkpoint import LoadedCheckpoint

TEXT = "It was the best of times — été —\nit was the worst of times:\n" * 60
SCRIPT = "<script>document.title='hacked'</script>"
TOKEN = "0123456789abcdef"


def train_kind(folder: Path, kind: str, **flags: Any) -> LoadedCheckpoint:
    (folder / "text").write_text(TEXT)
    values: dict[str, Any] = {"vocabulary.kind": kind, "stream.batch_size": 4, "train.epochs": 2, **flags}
    return open_checkpoint(Folder(str(train(folder, kind, folder / "text", **values))))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedCheckpoint]:
    """Models of the kinds of tokens."""
    folder = tmp_path_factory.mktemp("kinds")
    flags: dict[str, dict[str, Any]] = {
        "char": {"model.cell": "lstm"},
        "byte": {"model.cell": "gru", "model.num_layers": 2},
        "word": {"vocabulary.end_of_line": "true"},
        "bpe": {"vocabulary.size": 300, "model.cell": "minlstm"},
    }
    return {kind: train_kind(folder, kind, **flags[kind]) for kind in flags}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, LoadedCheckpoint]) -> dict[str, ServedModel]:
    served = load_models(list(checkpoints.values()), Config())
    return dict(zip(checkpoints, served, strict=True))


class Collector:
    """An engine, and the events of its streams as they come."""

    def __init__(self, models: Sequence[ServedModel], **options: Any) -> None:
        self.events: dict[Stream, list[TokenEvent | EndEvent]] = {}
        self.order: list[Stream] = []  # in which streams ended
        self.condition = threading.Condition()
        self.engine = Engine(models, self._collect, **options)

    def _collect(self, streams: Sequence[Stream]) -> None:
        with self.condition:
            for stream in streams:
                while stream.events and stream in self.events:
                    self.events[stream].append(event := stream.events.popleft())
                    self.order += [stream] if isinstance(event, EndEvent) else []
            self.condition.notify_all()

    def submit(self, stream: Stream, *, read: bool = True) -> bool:
        if read:
            self.events[stream] = []
        return self.engine.submit(stream)

    def wait(self, *streams: Stream) -> None:
        with self.condition:
            assert self.condition.wait_for(lambda: {*streams} <= {*self.order}, 60)

    def text(self, stream: Stream) -> str:
        self.wait(stream)
        return "".join(event.text for event in self.events[stream])

    def reason(self, stream: Stream) -> str:
        self.wait(stream)
        end = self.events[stream][-1]
        assert isinstance(end, EndEvent)
        return end.reason


@contextmanager
def collecting(models: Sequence[ServedModel], **options: Any) -> Iterator[Collector]:
    collector = Collector(models, **options)
    with closing(collector.engine):
        yield collector


def stream_of(model: ServedModel | Conversation, text: str = "It was", *, keep: bool = True, **fields: Any) -> Stream:
    conversation = model if isinstance(model, Conversation) else Conversation(model)
    ids = encode_text(text, conversation.model, conversation.end)
    return Stream(conversation, ids, text, GenerateConfig(**{"length": 40, **fields}), 3, keep)


def generated(checkpoint: LoadedCheckpoint, text: str, **fields: Any) -> str:
    values = {"length": 40, **fields, "prefix": text}
    config = override_config(checkpoint.config, {f"generate.{name}": value for name, value in values.items()})
    return generate_texts([checkpoint], config).continuations[0]


# --- streams ---


@pytest.mark.slow
def test_engine_gives_each_of_100_streams_the_text_of_generate(
    checkpoints: dict[str, LoadedCheckpoint], models: dict[str, ServedModel]
) -> None:
    """All kinds of tokens together, each stream with its own prefix, length and options."""
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.9},
    ]
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (
            ("char", "byte", "word", "bpe")[number % 4],
            ("It was", "it was the worst of times:\n", "the best of ")[number % 3],
            {"length": 20 + number % 23, "seed": number, **samplings[number // 4 % 4]},
        )
        for number in range(100)
    ]
    with collecting(list(models.values())) as collector:
        streams = [stream_of(models[kind], text, **fields) for kind, text, fields in cases]
        assert [collector.submit(stream) for stream in streams] == [True] * len(streams)
        texts = [collector.text(stream) for stream in streams]
    assert texts == [generated(checkpoints[kind], text, **fields) for kind, text, fields in cases]
    assert len({*texts}) > 50


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
@pytest.mark.parametrize("stop", ["t", "of", "t w", "not there", "s\n"])
def test_stream_with_stop_ends_where_generate_does(
    kind: str, stop: str, checkpoints: dict[str, LoadedCheckpoint], models: dict[str, ServedModel]
) -> None:
    fields: dict[str, Any] = {"temperature": 0.8, "seed": 3, "stop": stop, "length": 60}
    with collecting([models[kind]]) as collector:
        stream = stream_of(models[kind], **fields)
        collector.submit(stream)
        text, reason = collector.text(stream), collector.reason(stream)
    assert text == generated(checkpoints[kind], "It was", **fields)
    assert (reason == "stop") == (stop in generated(checkpoints[kind], "It was", **{**fields, "stop": ""}))


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_conversation_of_three_turns_is_one_continuation(
    kind: str, checkpoints: dict[str, LoadedCheckpoint], models: dict[str, ServedModel]
) -> None:
    """The state is carried from turn to turn, also the blank between two words."""
    conversation = Conversation(models[kind])
    with collecting([models[kind]]) as collector:
        turns: list[Stream] = []
        for length in (7, 0, 23):
            stream = stream_of(conversation, "" if turns else "It was", length=length)
            collector.submit(stream)
            collector.wait(stream)
            turns.append(stream)
        text = "".join(map(collector.text, turns))
    assert text == generated(checkpoints[kind], "It was", length=30)


def test_conversation_with_text_in_second_turn_reads_it_after_the_first(
    checkpoints: dict[str, LoadedCheckpoint], models: dict[str, ServedModel]
) -> None:
    conversation = Conversation(models["char"])
    with collecting([models["char"]]) as collector:
        first = stream_of(conversation, "It was", length=0)
        collector.submit(first)
        collector.wait(first)
        second = stream_of(conversation, " the be")
        collector.submit(second)
        assert collector.text(second) == generated(checkpoints["char"], "It was the be")


def test_stream_that_is_not_kept_leaves_the_state(models: dict[str, ServedModel]) -> None:
    conversation = Conversation(models["char"])
    with collecting([models["char"]]) as collector:
        streams = [stream_of(conversation, "It was", keep=False) for _ in range(2)]
        for stream in streams:
            collector.submit(stream)
            collector.wait(stream)
        assert conversation.saved is None
        assert collector.text(streams[0]) == collector.text(streams[1])


def test_stream_of_the_same_conversation_replaces_the_one_before(models: dict[str, ServedModel]) -> None:
    conversation = Conversation(models["char"])
    with collecting([models["char"]]) as collector:
        streams = [stream_of(conversation, "It was", length=100_000), stream_of(conversation, "", length=3)]
        assert [collector.submit(stream) for stream in streams] == [True] * len(streams)
        assert [collector.reason(stream) for stream in streams] == ["cancelled", "length"]
        assert collector.order == streams


def test_token_events_have_probabilities_of_the_distribution_they_are_drawn_from(
    models: dict[str, ServedModel],
) -> None:
    with collecting([models["char"]]) as collector:
        streams = [stream_of(models["char"], temperature=1.0, top_k=top_k, seed=1) for top_k in (0, 2)]
        for stream in streams:
            collector.submit(stream)
            collector.wait(stream)
    for stream, count in zip(streams, (3, 2), strict=True):
        for event in collector.events[stream][:-1]:
            assert isinstance(event, TokenEvent)
            values = [value for _, value in event.alternatives]
            assert len(values) == count
            assert values == sorted(values, reverse=True)
            assert event.probability == pytest.approx(dict(event.alternatives).get(event.id, event.probability))
            assert sum(values) == pytest.approx(1) if count == 2 else sum(values) < 1


def test_engine_beyond_its_limit_refuses_streams_until_one_is_cancelled(models: dict[str, ServedModel]) -> None:
    with collecting([models["char"]], max_streams=2) as collector:
        streams = [stream_of(models["char"], length=100_000) for _ in range(3)]
        assert [collector.submit(stream) for stream in streams] == [True, True, False]
        collector.engine.cancel(streams[0])
        assert collector.reason(streams[0]) == "cancelled"
        assert collector.engine.num_streams == 1
        assert collector.submit(streams[2])


def test_stream_whose_client_does_not_read_pauses_alone(models: dict[str, ServedModel]) -> None:
    with collecting([models["char"]]) as collector:
        unread, other = (stream_of(models["char"], length=2 * MAX_UNREAD) for _ in range(2))
        collector.submit(unread, read=False)
        collector.submit(other)
        collector.wait(other)
        assert len(unread.events) == MAX_UNREAD
        collector.events[unread] = []
        collector._collect([unread])
        collector.engine.wake()
        assert collector.text(unread) == collector.text(other)


def test_long_prefix_lets_other_streams_continue(
    checkpoints: dict[str, LoadedCheckpoint], models: dict[str, ServedModel]
) -> None:
    """The short stream generates a token after each block of the long one, and so ends first."""
    text = (TEXT * 200)[: 100 * BLOCK_TOKENS]
    with collecting([models["char"]]) as collector:
        long, short = stream_of(models["char"], text), stream_of(models["char"], length=50)
        collector.submit(long)
        collector.submit(short)
        assert collector.text(long) == generated(checkpoints["char"], text)
        assert collector.order == [short, long]


def test_stream_of_model_that_fails_ends_and_the_engine_continues(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(models["char"])

    def fail(*_: object) -> None:
        raise MemoryError

    with collecting([models["char"], models["byte"]]) as collector:
        broken, other = stream_of(conversation, length=100_000), stream_of(models["byte"])
        collector.submit(broken)
        monkeypatch.setattr(models["char"].ensemble, "step", fail)
        assert collector.reason(broken) == "failed"
        assert conversation.saved is None
        collector.submit(other)
        assert collector.reason(other) == "length"


def test_stream_that_is_cancelled_while_it_reads_leaves_the_state(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble, conversation = models["char"].ensemble, Conversation(models["char"])
    advance = ensemble.advance
    with collecting([models["char"]]) as collector:
        collector.submit(first := stream_of(conversation, length=20))
        collector.wait(first)
        before = conversation.saved, conversation.end
        broken = stream_of(conversation, "a" * (2 * BLOCK_TOKENS))

        def advance_and_cancel(*arguments: Any) -> Any:
            broken.is_cancelled = True
            return advance(*arguments)

        monkeypatch.setattr(ensemble, "advance", advance_and_cancel)
        collector.submit(broken)
        assert collector.reason(broken) == "cancelled"
        assert conversation.saved is before[0] and conversation.end == before[1]


def test_streams_whose_states_do_not_fit_together_end_and_the_engine_continues(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("sizes of tensors must match")

    with collecting([models["char"], models["byte"]]) as collector, monkeypatch.context() as patch:
        patch.setattr("job.serving.streams.cat_states", fail)
        broken = stream_of(models["char"], length=100_000)
        collector.submit(broken)
        assert collector.reason(broken) == "failed"
        patch.undo()
        patch.setattr("job.serving.streams.map_state", fail)  # by which the state of a stream leaves the others'
        pair = [stream_of(models["char"], length=100_000), stream_of(models["byte"], length=3)]
        for stream in pair:
            collector.submit(stream)
        collector.engine.cancel(pair[0])
        assert {collector.reason(stream) for stream in pair} <= {"failed", "length"}
        patch.undo()
        other = stream_of(models["char"])
        collector.submit(other)
        assert collector.reason(other) == "length"


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_state_of_conversation_holds_no_memory_of_the_text_before_it(kind: str, models: dict[str, ServedModel]) -> None:
    conversation = Conversation(models[kind])
    with collecting([models[kind]]) as collector:
        stream = stream_of(conversation, TEXT, length=0)
        collector.submit(stream)
        collector.wait(stream)
    for state in not_none(conversation.saved).states:
        for tensor in state if isinstance(state, tuple) else (not_none(state),):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_text_stream_withholds_parts_of_characters_and_of_stop() -> None:
    stream = TextStream(Vocabulary("byte", ()), None, "", "é!")
    assert [stream.push(token) for token in "aéé?".encode()] == ["a", "", "", "", "é", "é?"]
    assert [stream.push(token) for token in "é!x".encode()] == ["", "", "", ""]
    assert stream.has_stopped
    assert stream.finish() == ""


def test_text_stream_at_end_returns_what_is_not_a_character() -> None:
    stream = TextStream(Vocabulary("byte", ()), None, "", "")
    data = b"\xff\xff\xc3x\xe2\x82"
    texts = [stream.push(token) for token in data] + [stream.finish()]
    assert "".join(texts) == data.decode(errors="replace")


def test_run_that_generates_unk_is_served_with_it(checkpoints: dict[str, LoadedCheckpoint]) -> None:
    """As ``generate`` does with the run's own configuration."""
    for unknown in (False, True):
        config = override_config(checkpoints["char"].config, {"generate.unknown": unknown})
        (model,) = load_models([replace(checkpoints["char"], config=config)], Config())
        logits_BV, _ = model.ensemble.step(torch.tensor([1]), [None])
        assert bool(logits_BV[0, 0].isfinite()) == unknown


# --- conversations ---


def test_conversations_beyond_their_number_or_age_are_removed(models: dict[str, ServedModel]) -> None:
    now = [0.0]
    conversations = Conversations(2, 10.0, lambda: now[0])
    first, second = (conversations.create(models["char"]) for _ in range(2))
    assert conversations.get(first.id) is first
    third = conversations.create(models["char"])
    assert conversations.get(second.id) is None  # used least recently
    now[0] = 9.0
    assert conversations.get(third.id) is third
    now[0] = 11.0
    assert conversations.get(first.id) is None
    assert len(conversations) == 1


# --- HTTP ---


@contextmanager
def serving(models: Sequence[ServedModel], host: str = "127.0.0.1", token: str = "") -> Iterator[tuple[Server, str]]:
    """A server in a thread, and the address of its page."""
    with listen(host, "0") as listener:
        server = build_server(models, host, token)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(models: dict[str, ServedModel]) -> Iterator[tuple[Server, str]]:
    with serving(list(models.values())) as pair:
        yield pair


@pytest.fixture
def url(served: tuple[Server, str]) -> str:
    return served[1]


def post(url: str, body: Any = None, **options: Any) -> requests.Response:
    return requests.post(url, json=body, timeout=60, **options)


def start_conversation(url: str, model: str = "char") -> str:
    """The address of a new conversation."""
    created = post(f"{url}/v1/conversations", {"model": model})
    assert created.status_code == 201
    return f"{url}/v1/conversations/{created.json()['id']}"


def events(response: requests.Response) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events of a response."""
    assert response.headers["content-type"].startswith("text/event-stream")
    pairs = [block.splitlines() for block in response.content.decode().split("\n\n") if block]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def error_of(response: requests.Response) -> tuple[int, str]:
    """The status and message of an error, which is JSON."""
    error = response.json()["error"]
    assert error["status"] == response.status_code
    assert len(error["message"].splitlines()) == 1
    return response.status_code, error["message"]


def pause_reading(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Lets the ensemble wait before it reads a block. Returns whether it does, and what lets it continue."""
    is_reading, may_continue, advance = threading.Event(), threading.Event(), ensemble.advance

    def read_block(*arguments: Any) -> Any:
        is_reading.set()
        assert may_continue.wait(60)
        return advance(*arguments)

    monkeypatch.setattr(ensemble, "advance", read_block)
    return is_reading, may_continue


def test_generate_over_http_streams_the_text_of_generate(url: str, checkpoints: dict[str, LoadedCheckpoint]) -> None:
    for kind, checkpoint in checkpoints.items():
        body = {"text": "It was", "length": 30, "temperature": 0.8, "top_k": 9, "seed": 5, "alternatives": 2}
        conversation = start_conversation(url, kind)
        *tokens, end = events(post(f"{conversation}/generate", {**body, "keep": False}))
        text = "".join(data["text"] for _, data in [*tokens, end])
        fields = {name: body[name] for name in ("length", "temperature", "top_k", "seed")}
        assert text == generated(checkpoint, "It was", **fields)
        assert [name for name, _ in tokens] == ["token"] * 30
        assert end == ("end", {"reason": "length", "text": end[1]["text"]})
        assert all(len(data["alternatives"]) == 2 for _, data in tokens)
        whole = post(f"{conversation}/generate", {**body, "stream": False}).json()
        assert (whole["text"], whole["tokens"]) == (text, [data for _, data in tokens])


def test_whole_continuation_is_sent_in_parts(models: dict[str, ServedModel]) -> None:
    """With 50 alternatives of 10,000 tokens it is too large to be kept."""

    async def groups() -> AsyncIterator[list[TokenEvent | EndEvent]]:
        for index in range(3):
            yield [TokenEvent(index, str(index), 0.5, [(2, 0.5)])]
        yield [EndEvent("length", "!")]

    async def read() -> list[str]:
        return [part async for part in _continuation(stream_of(models["char"]), groups())]

    parts = asyncio.run(read())
    assert len(parts) > 3
    whole = json.loads("".join(parts))
    assert (whole["text"], whole["reason"], [token["id"] for token in whole["tokens"]]) == ("012!", "length", [0, 1, 2])


def test_conversation_over_http_is_carried_and_reset(url: str, checkpoints: dict[str, LoadedCheckpoint]) -> None:
    conversation = start_conversation(url)
    body = {"text": "It was", "length": 10, "stream": False}
    first = post(f"{conversation}/generate", body).json()["text"]
    second = post(f"{conversation}/generate", {"length": 10, "stream": False}).json()["text"]
    assert first + second == generated(checkpoints["char"], "It was", length=20)
    assert post(f"{conversation}/reset").status_code == 204
    assert post(f"{conversation}/generate", body).json()["text"] == first
    assert requests.delete(conversation, timeout=60).status_code == 204
    assert error_of(post(f"{conversation}/generate", body))[0] == 404


def test_tokens_over_http_are_read_after_the_text(url: str, checkpoints: dict[str, LoadedCheckpoint]) -> None:
    """So that a client can choose an alternative, whatever its text is."""
    ids = checkpoints["char"].vocabulary.encode([" the"]).tolist()
    body = {"text": "It was", "tokens": ids, "stream": False, "length": 20}
    text = post(f"{start_conversation(url)}/generate", body).json()["text"]
    assert text == generated(checkpoints["char"], "It was the", length=20)


def test_next_tokens_over_http_are_sorted_and_leave_the_state(url: str, models: dict[str, ServedModel]) -> None:
    conversation = start_conversation(url)
    size = len(models["char"].vocabulary)
    answers = [post(f"{conversation}/next", {"text": "It was", "alternatives": 50}).json()["tokens"] for _ in range(2)]
    assert answers[0] == answers[1]
    values = [token["probability"] for token in answers[0]]
    assert len(values) == size - 1  # <unk> is never generated
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1)


WHOLE = pytest.mark.parametrize(("path", "body"), [("next", {}), ("generate", {"stream": False})])


@WHOLE
def test_request_whose_model_fails_is_status_500(
    path: str, body: dict[str, Any], url: str, models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(models["char"].ensemble, "step", fail)
    answer = post(f"{start_conversation(url)}/{path}", {"text": "It was", **body})
    assert error_of(answer) == (500, "the model failed, as the log of the server describes")


@WHOLE
def test_request_that_another_of_its_conversation_replaces_is_status_409(
    path: str,
    body: dict[str, Any],
    served: tuple[Server, str],
    models: dict[str, ServedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_reading, is_replaced = pause_reading(models["char"].ensemble, monkeypatch)
    server, url = served
    conversation = start_conversation(url)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post, f"{conversation}/{path}", {"text": TEXT, **body})  # of several blocks
        assert is_reading.wait(60)
        second = pool.submit(post, f"{conversation}/next", {"text": "It"})
        wait_until(lambda: len(server.service.has_events) == 2, 60, "the second request did not arrive", 0.01)
        is_replaced.set()
        assert error_of(first.result())[0] == 409
        assert second.result().status_code == 200


def test_client_that_does_not_read_is_disconnected_which_frees_its_place(
    served: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.serving.connection.READ_TIMEOUT_S", 0.1)
    server, url = served
    body = json.dumps({"text": "It was", "length": 10_000, "alternatives": 50}).encode()  # more than buffers hold
    path, port = start_conversation(url).partition("/v1/")[2], int(url.rpartition(":")[2])
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        head = f"POST /v1/{path}/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(1) == b"H"
        engine, state = server.service.engine, server.server_state
        wait_until(
            lambda: not (server.service.has_events or engine.num_streams or state.connections),
            60, "the client is still connected", 0.01,
        )  # fmt: skip
        received = b""
        with suppress(ConnectionResetError):
            while part := client.recv(1 << 20):
                received += part
    assert b"event: token" in received and b"event: end" not in received


REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "sent", [b"", REQUEST[:-2], b"POST /v1/conversations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"]
)
def test_client_that_sends_no_complete_request_is_disconnected(
    served: tuple[Server, str], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("job.serving.connection.REQUEST_TIMEOUT_S", 0.1)
    server, url = served
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as client:
        client.sendall(sent)
        assert client.recv(1) == b""
    wait_until(lambda: not server.server_state.connections, 60, "the client is still connected", 0.01)


def test_client_that_does_not_end_its_second_request_is_disconnected(served: tuple[Server, str]) -> None:
    """The first one, once it is complete, has all time that its answer takes."""
    server, url = served
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as client:
        client.sendall(REQUEST)
        assert client.recv(1) == b"H"
        connections = server.server_state.connections
        (connection,) = (other for other in connections if other.client == client.getsockname())  # type: ignore[union-attr]
        assert isinstance(connection, Connection)
        assert connection._request_timeout is None
        client.sendall(REQUEST[:-2])
        wait_until(lambda: connection._request_timeout, 60, "the second request is not limited", 0.01)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"text": "It was ☃"}, 422, "'☃'"),
        ({"text": 3}, 422, "text: "),
        ({"text": "a", "length": -1}, 422, "length: "),
        ({"text": "a", "length": 10**9}, 422, "length: "),
        ({"text": "a", "temperature": -1}, 422, "temperature: "),
        ({"text": "a", "top_k": 3}, 422, "greedy decoding"),
        ({"text": "a", "top_p": 0}, 422, "top_p: "),
        ({"text": "a", "tokens": [10**6]}, 422, "1000000 is not the id of a token"),
        ({"text": "a", "size": 3}, 422, "size: "),
        ({"text": "\ud800"}, 422, "text: "),
        ({"text": "a", "a\nb\r": 3}, 422, r"a\nb\x0d: "),
        ([], 422, ""),
    ],
)
def test_invalid_request_is_one_error_in_json(url: str, body: Any, status: int, message: str) -> None:
    found = error_of(post(f"{start_conversation(url)}/generate", body))
    assert found[0] == status
    assert message in found[1]


def test_request_that_is_not_json_or_names_nothing_is_one_error(url: str) -> None:
    conversation = start_conversation(url)
    headers = {"content-type": "application/json"}
    for data in ('{"text": ', "", "[" * 100_000, b"\xff"):
        answer = requests.post(f"{conversation}/generate", data=data, headers=headers, timeout=60)
        assert error_of(answer)[0] in (400, 422)
    assert error_of(post(f"{url}/v1/conversations", {"model": SCRIPT}))[0] == 404
    assert error_of(requests.get(f"{url}/v1/nothing", timeout=60))[0] == 404
    assert error_of(requests.put(f"{url}/v1/models", timeout=60))[0] == 405
    assert error_of(requests.post(f"{conversation}/generate", data="text=a", timeout=60))[0] == 422


def test_body_of_10_mb_is_refused_and_never_in_memory(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    class Body(bytearray):
        def __iadd__(self, chunk: Any) -> "Body":  # type: ignore[misc]
            super().__iadd__(chunk)
            kept.append(len(self))
            return self

    monkeypatch.setattr(guard, "bytearray", Body, raising=False)
    body = {"text": "a" * 10_000_000}
    conversation = start_conversation(url)
    status, message = error_of(post(f"{conversation}/generate", body))
    assert (status, message) == (413, "the body has more than 1,048,576 bytes")
    chunks = (b"a" * 65536 for _ in range(160))  # without a Content-Length
    assert error_of(requests.post(f"{conversation}/generate", data=chunks, timeout=60))[0] == 413
    assert max(kept) <= MAX_BODY_BYTES


def test_streams_beyond_the_limit_get_429_until_a_client_is_gone(served: tuple[Server, str]) -> None:
    server, url = served
    engine = server.service.engine
    limit, engine.max_streams = engine.max_streams, 2
    try:
        body = {"text": "It was", "length": 10_000}
        clients = [post(f"{start_conversation(url)}/generate", body, stream=True) for _ in range(2)]
        refused = post(f"{start_conversation(url)}/generate", body)
        assert error_of(refused)[0] == 429
        assert int(refused.headers["retry-after"]) > 0
        clients[0].close()
        conversation = start_conversation(url)
        answers = list[int]()

        def is_accepted() -> bool:
            answers.append(post(f"{conversation}/generate", {"text": "It", "length": 1}).status_code)
            return answers[-1] != 429

        wait_until(is_accepted, 60, "the place of a closed connection is not free", 0.01)
        assert answers[-1] == 200
        clients[1].close()
    finally:
        engine.max_streams = limit
    wait_until(lambda: not engine.num_streams, 60, "a stream has no client but its place", 0.01)
    assert not server.service.has_events


def test_next_tokens_whose_client_is_gone_free_their_place(
    served: tuple[Server, str], models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a long text is read."""
    server, url = served
    is_reading, is_freed = pause_reading(models["char"].ensemble, monkeypatch)
    conversation = start_conversation(url)
    body = json.dumps({"text": TEXT}).encode()
    path, port = conversation.partition("/v1/")[2], int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = f"POST /v1/{path}/next HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert is_reading.wait(60)
    for _ in range(1000):
        if not server.service.has_events:
            break
        time.sleep(0.01)
    was_freed = not server.service.has_events
    is_freed.set()
    wait_until(lambda: not server.service.engine.num_streams, 60, "a stream has no client but its place", 0.01)
    assert was_freed


def test_hosts_and_origins_of_others_are_refused(url: str) -> None:
    port = url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert error_of(requests.get(f"{url}/v1/models", headers={"Host": host}, timeout=60))[0] == 403
        assert requests.get(url, headers={"Host": host}, timeout=60).status_code == 403
    for origin in ("http://evil.example", "null", f"http://localhost:{int(port) + 1}"):
        assert error_of(post(f"{url}/v1/conversations", {}, headers={"Origin": origin}))[0] == 403
    assert post(f"{url}/v1/conversations", {}, headers={"Origin": url}).status_code == 201
    assert requests.get(f"{url}/v1/models", headers={"Host": f"localhost:{port}"}, timeout=60).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "0:0:0:0:0:0:0:1"])
def test_loopback_address_that_is_served_is_an_allowed_host(host: str, models: dict[str, ServedModel]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        name = page_address(host, listener).removeprefix("http://").rstrip("/")
    server = build_server([models["char"]], host, "")
    server.service.engine.close()
    app = server.config.app
    assert isinstance(app, guard.Guard)
    for value, is_refused in ((name, False), ("localhost", False), ("127.0.0.3", True)):
        assert bool(app._refusal({"type": "http", "path": "/", "headers": [(b"host", value.encode())]})) == is_refused


def test_responses_have_a_strict_content_security_policy(url: str) -> None:
    for path in ("/", "/page.js", "/v1/models", "/nothing", "/openapi.json"):
        headers = requests.get(url + path, timeout=60).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_page_has_no_address_of_another_host() -> None:
    for path in (ROOT / "job" / "serving" / "static").iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text


def test_openapi_schema_describes_each_path(url: str) -> None:
    schema = requests.get(f"{url}/openapi.json", timeout=60).json()
    methods = {(path, method) for path, operations in schema["paths"].items() for method in operations}
    base = "/v1/conversations/{conversation_id}"
    assert methods == {
        ("/v1/models", "get"), ("/v1/conversations", "post"), (f"{base}/generate", "post"), (f"{base}/next", "post"),
        (f"{base}/reset", "post"), (base, "delete"),
    }  # fmt: skip
    generate = schema["paths"][f"{base}/generate"]["post"]
    assert {"200", "401", "413", "422", "429"} <= generate["responses"].keys()
    assert "text/event-stream" in generate["responses"]["200"]["content"]


def test_token_is_needed_for_the_api_where_there_is_one(models: dict[str, ServedModel]) -> None:
    with serving([models["char"]], "0.0.0.0", TOKEN) as (_, url):
        for value in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer é"):
            answer = requests.get(f"{url}/v1/models", headers={"Authorization": value.encode()}, timeout=60)
            assert error_of(answer)[0] == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": "gpu-7.example"}
        assert requests.get(f"{url}/v1/models", headers=headers, timeout=60).status_code == 200
        assert requests.get(url, timeout=60).status_code == 200  # the page asks for the token


def test_read_token_needs_one_unless_only_this_machine_can_connect(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert [read_token({}, host) for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3")] == [""] * 4
    assert read_token({"LANES_SERVE_TOKEN": TOKEN}, "0.0.0.0") == TOKEN
    assert read_token({"LANES_SERVE_TOKEN_FILE": str(tmp_path / "token")}, "127.0.0.1") == TOKEN
    for environment in ({}, {"LANES_SERVE_TOKEN": ""}, {"LANES_SERVE_TOKEN": "short"},
                        {"LANES_SERVE_TOKEN": f"{TOKEN} é"}, {"LANES_SERVE_TOKEN": f"{TOKEN}\n{TOKEN}"},
                        {"LANES_SERVE_TOKEN_FILE": str(tmp_path / "none")}):  # fmt: skip
        for host in ("0.0.0.0", "::", "gpu-7.example"):
            with pytest.raises(UserError, match="TOKEN"):
                read_token(environment, host)


# --- the command line ---


@pytest.fixture(scope="module")
def run(checkpoints: dict[str, LoadedCheckpoint]) -> Path:
    return Path(checkpoints["char"].checkpoint.path.address).parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the folder of a run or checkpoint is missing"),
        (("nothing",), "nothing"),
        (("RUN", "--port", "x"), "--port = x: is not a port"),
        (("RUN", "--port", "70000"), "--port = 70000: is not a port"),
        (("RUN", "--host", "0.0.0.0", "--port", "0"), "LANES_SERVE_TOKEN"),
        (("RUN", "--host", "192.0.2.1", "--port", "0"), "LANES_SERVE_TOKEN"),
        (("RUN", "--token", "x"), "unknown field token"),
        (("RUN", "--generate.length", "3"), "--generate.length"),
    ],
)
def test_serve_with_invalid_arguments_is_one_line(arguments: Sequence[str], message: str, run: Path) -> None:
    ended = job("serve", *(str(run) if word == "RUN" else word for word in arguments))
    assert (ended.status, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    assert message in ended.err


def test_serve_on_name_that_is_too_long_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANES_SERVE_TOKEN", TOKEN)
    ended = job("serve", run, "--port", "0", "--host", "a" * 70)
    assert (ended.status, len(ended.err.splitlines())) == (2, 1)
    assert f"--host = {'a' * 70}: is not an address or name" in ended.err


def test_serve_on_port_in_use_is_one_line(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ended = job("serve", run, "--port", other.getsockname()[1])
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert "in use" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_serve_stops_at_once_with_streams_open(number: signal.Signals, status: int, run: Path) -> None:
    process = start_job("serve", run, "--port", "0")
    line = not_none(process.stdout).readline()
    assert line.startswith("serving char at http://127.0.0.1:")
    url = line.split()[-1].rstrip("/")
    client = post(f"{start_conversation(url)}/generate", {"text": "It was", "length": 10_000}, stream=True)
    lines = client.iter_lines()
    assert next(lines) == b"event: token"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as stalled:
        if number == signal.SIGTERM:
            stalled.sendall(b"POST /v1/conversations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            assert requests.get(f"{url}/v1/models", timeout=60).status_code == 200  # after it has been read
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (status, "")
    assert b"event: end" in [*lines]
