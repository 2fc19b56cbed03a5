"""The HTTP API of ``serve``: what it answers to valid and invalid requests, and its schema."""

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from conftest import wait_until
from serving import (
    SCRIPT,
    TEXT,
    error_of,
    events,
    generated,
    pause_reading,
    post,
    start_conversation,
    stream_of,
)

from job.serving.api import _continuation
from job.serving.conversations import ServedModel
from job.serving.server import Server
from job.serving.streams import EndEvent, TokenEvent
from job.training.checkpoint import LoadedCheckpoint

pytestmark = pytest.mark.xdist_group("serving")  # one process, which trains the models once


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
