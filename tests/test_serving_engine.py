"""Streams that are generated together against ``generate``, their states, limits and faults, and conversations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import not_none
from serving import TEXT, collecting, generated, stream_of

from job.config.schema import Config
from job.config.toml import override_config
from job.data.vocabulary import Vocabulary
from job.inference.generate import BLOCK_TOKENS
from job.serving.conversations import Conversation, Conversations, ServedModel
from job.serving.server import load_models
from job.serving.streams import MAX_UNREAD, Stream, TokenEvent
from job.serving.text_stream import TextStream
from job.training.checkpoint import LoadedCheckpoint

pytestmark = pytest.mark.xdist_group("serving")  # one process, which trains the models once


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
