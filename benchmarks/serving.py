"""Tokens per second of 100 streams that are generated together, and one after the other; also over HTTP.

python -m benchmarks.serving [--rounds N]
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import Pool

import torch

from benchmarks import measure
from job.config.inference import GenerateConfig
from job.config.model import ModelConfig
from job.config.text import CorpusConfig
from job.data.vocabulary import Vocabulary
from job.inference.ensemble import Ensemble
from job.nn.language_model import build_model
from job.serving.conversations import Conversation, ServedModel
from job.serving.engine import Engine
from job.serving.prefix import encode_text
from job.serving.server import build_server, listen
from job.serving.streams import EndEvent, Stream

STREAMS, LENGTH, UNITS, ALTERNATIVES = 100, 100, 256, 5
VOCABULARY = Vocabulary("char", ("<unk>", *"abcdefghijklmnopqrstuvwxyz "))
OPTIONS = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8, "top_p": 0.9}}


def served_model(cell: str) -> ServedModel:
    model = build_model(ModelConfig(cell=cell, hidden_size=UNITS), len(VOCABULARY), 0)
    return ServedModel(cell, 0, Ensemble([model], 0), VOCABULARY, CorpusConfig(), 0, cell)


class EngineClient:
    """Waits for streams of an engine without HTTP."""

    def __init__(self, model: ServedModel) -> None:
        self.model, self.num_open, self.condition = model, 0, threading.Condition()
        self.engine = Engine([model], self._on_events)

    def _on_events(self, streams: Sequence[Stream]) -> None:
        ended = 0
        for stream in streams:
            while stream.events:
                ended += isinstance(stream.events.popleft(), EndEvent)
        if ended:
            with self.condition:
                self.num_open -= ended
                self.condition.notify()

    def generate(self, count: int, options: dict[str, float]) -> None:
        ids = encode_text("time traveller", self.model, "")
        self.num_open = count
        for seed in range(count):
            config = GenerateConfig(length=LENGTH, seed=seed, top_p=options.get("top_p", 1.0),
                                    temperature=options["temperature"])  # fmt: skip
            assert self.engine.submit(Stream(Conversation(self.model), ids, "r", config, ALTERNATIVES))
        with self.condition:
            self.condition.wait_for(lambda: not self.num_open)

    def measure(self, options: dict[str, float], together: bool) -> float:
        """Tokens per second."""
        started = time.perf_counter()
        for _ in range(1 if together else STREAMS):
            self.generate(STREAMS if together else 1, options)
        return STREAMS * LENGTH / (time.perf_counter() - started)


async def fetch(port: int, method: str, path: str, body: object = None) -> bytes:
    """The response to a request, read to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    response = await reader.read()
    writer.close()
    return response


async def fetch_stream(port: int, options: dict[str, float], seed: int) -> None:
    created = await fetch(port, "POST", "/v1/conversations", {})
    name = json.loads(created.partition(b"\r\n\r\n")[2])["id"]
    body = {"text": "time traveller", "length": LENGTH, "seed": seed, "alternatives": ALTERNATIVES, **options}
    response = await fetch(port, "POST", f"/v1/conversations/{name}/generate", body)
    assert response.count(b"event: token") == LENGTH, response[:300]


async def fetch_all(port: int, options: dict[str, float], together: bool) -> float:
    started = time.perf_counter()
    streams = [fetch_stream(port, options, seed) for seed in range(STREAMS)]
    if together:
        await asyncio.gather(*streams)
    else:
        for stream in streams:
            await stream
    return STREAMS * LENGTH / (time.perf_counter() - started)


def fetch_in_process(port: int, options: dict[str, float], together: bool) -> float:
    return asyncio.run(fetch_all(port, options, together))


def compare(name: str, rounds: int, run: Callable[[bool], float]) -> None:
    """Measures in turn and prints medians, and the ratio of each pair."""
    pairs = [(run(True), run(False)) for _ in range(rounds)]
    together, alone = (list(values) for values in zip(*pairs, strict=True))
    medians = f"{statistics.median(together):10,.0f}{statistics.median(alone):10,.0f}"
    print(f"  {name:<24}{medians}   {measure.ratios(together, alone)}", flush=True)


def compare_engine(model: ServedModel, rounds: int) -> None:
    client = EngineClient(model)
    for name, options in OPTIONS.items():
        compare(f"{model.name} {name}", rounds, partial(client.measure, options))
    client.engine.close()


def compare_http(model: ServedModel, rounds: int, clients: Pool) -> None:
    """With the clients in a process of their own, and the server in this one."""
    with listen("127.0.0.1", "0") as listener:
        server = build_server([model], "127.0.0.1", "")
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        arguments = listener.getsockname()[1], OPTIONS["sampled"]
        compare(
            f"{model.name} sampled, HTTP", rounds,
            lambda together: clients.apply(fetch_in_process, (*arguments, together)),
        )  # fmt: skip
        server.should_exit = True
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{measure.machine()}\ntokens per second of {STREAMS} streams of {LENGTH} characters, {UNITS} units:")
    print("together, one after the other, ratio: median (range)")
    with multiprocessing.get_context("spawn").Pool(1) as clients:
        for cell in ("rnn", "gru", "lstm"):
            model = served_model(cell)
            compare_engine(model, rounds)
            compare_http(model, rounds, clients)


if __name__ == "__main__":
    main()
