"""Shared by the tests of serving: models, streams of an engine, a server and its clients."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from test_evaluate import train

from job.config.inference import GenerateConfig
from job.config.toml import override_config
from job.inference.ensemble import Ensemble
from job.inference.generate import generate_texts
from job.run.run_dir import open_checkpoint
from job.serving.conversations import Conversation, ServedModel
from job.serving.engine import Engine
from job.serving.prefix import encode_text
from job.serving.server import Server, build_server, listen
from job.serving.streams import EndEvent, Stream, TokenEvent
from job.storage import Folder
from job.training.checkpoint import LoadedCheckpoint

TEXT = "It was the best of times — été —\nit was the worst of times:\n" * 60
SCRIPT = "<script>document.title='hacked'</script>"
TOKEN = "0123456789abcdef"


def train_kind(folder: Path, kind: str, **flags: Any) -> LoadedCheckpoint:
    (folder / "text").write_text(TEXT)
    values: dict[str, Any] = {"vocabulary.kind": kind, "stream.batch_size": 4, "train.epochs": 2, **flags}
    return open_checkpoint(Folder(str(train(folder, kind, folder / "text", **values))))


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
