"""Generation: what sampling promises, prefixes, saved states and ensembles, against plain formulations."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import job
from test_evaluate import train

from job.config.inference import GenerateConfig
from job.config.model import ModelConfig
from job.config.toml import override_config
from job.data.vocabulary import UNKNOWN_ID
from job.errors import UserError
from job.inference.ensemble import Ensemble
from job.inference.generate import (
    BLOCK_TOKENS,
    continue_greedily,
    generate_text,
    generate_texts,
    load_model,
    read_tokens,
)
from job.inference.sampling import sample_generator, sample_tokens, token_probabilities
from job.nn.language_model import LanguageModel, build_model
from job.nn.state import State
from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.training.checkpoint import LoadedCheckpoint

TEXT = "It was the best of times,\nit was the worst of times:\n" * 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model of characters."""
    folder = tmp_path_factory.mktemp("storage")
    (folder / "text").write_text(TEXT)
    return train(folder, "run", folder / "text", **{"stream.batch_size": 4, "train.epochs": 2})


@pytest.fixture(scope="module")
def other_run(run: Path) -> Path:
    """A run of another architecture with the same vocabulary."""
    flags = {"stream.batch_size": 4, "model.cell": "gru", "model.embedding_size": 3, "model.num_layers": 2}
    return train(run.parent, "other", run.parent / "text", **flags)


@pytest.fixture(scope="module")
def loaded(run: Path, other_run: Path) -> list[LoadedCheckpoint]:
    return [open_checkpoint(Folder(str(folder))) for folder in (run, other_run)]


def generate(checkpoints: Sequence[LoadedCheckpoint], **fields: Any) -> list[str]:
    """The continuations of a prefix."""
    values = {"prefix": "It was", "length": 70, "temperature": 1.0, **fields}
    config = override_config(checkpoints[0].config, {f"generate.{name}": value for name, value in values.items()})
    return generate_texts(checkpoints, config).continuations


def test_generate_with_logits_that_are_not_finite_raises_and_the_sample_of_a_run_is_its_prefix(
    loaded: list[LoadedCheckpoint],
) -> None:
    weights = {**loaded[0].weights, "linear.bias": torch.full_like(loaded[0].weights["linear.bias"], torch.nan)}
    diverged = replace(loaded[0], weights=weights)
    for temperature in (0, 1):
        with pytest.raises(UserError, match="the model's largest logit is nan; use another checkpoint"):
            generate([diverged], temperature=temperature)
    assert generate_text(diverged, diverged.config) == diverged.config.generate.prefix


# --- probabilities ---


def random_logits(seed: int, size: int = 40) -> torch.Tensor:
    return torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("top_k", [1, 2, 7, 39, 40, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_token_probabilities_with_top_k_are_those_of_the_k_most_likely(top_k: int, temperature: float) -> None:
    logits = random_logits(top_k)
    found = token_probabilities(logits, GenerateConfig(temperature=temperature, top_k=top_k))
    for row, probabilities in zip(logits, found, strict=True):
        kept = set(sorted(range(40), key=lambda index: -float(row[index]))[:top_k])
        weights = [np.exp(float(row[index]) / temperature) * (index in kept) for index in range(40)]
        assert set(np.flatnonzero(probabilities.numpy())) == kept
        np.testing.assert_allclose(probabilities / probabilities.sum(), np.array(weights) / sum(weights), rtol=1e-6)


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_token_probabilities_with_top_p_are_those_of_the_smallest_nucleus(top_p: float) -> None:
    logits = random_logits(3)
    found = token_probabilities(logits, GenerateConfig(temperature=1.0, top_p=top_p))
    for row, probabilities in zip(logits.double().softmax(1), found, strict=True):
        kept, total = set(), 0.0
        for index in sorted(range(40), key=lambda index: -float(row[index])):
            if total < top_p:
                kept.add(index)
                total += float(row[index])
        assert set(np.flatnonzero(probabilities.numpy())) == kept
        np.testing.assert_allclose(probabilities / probabilities.sum(), [
            float(row[index]) / total if index in kept else 0 for index in range(40)
        ], rtol=1e-6)  # fmt: skip


def test_token_probabilities_with_both_take_the_nucleus_of_the_k_most_likely() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    found = token_probabilities(logits, GenerateConfig(temperature=1.0, top_k=2, top_p=0.57))
    np.testing.assert_array_equal(found.numpy() > 0, [[False, True, False, False]])  # 0.4 / 0.7 > 0.57
    found = token_probabilities(logits, GenerateConfig(temperature=1.0, top_k=2, top_p=0.58))
    np.testing.assert_array_equal(found.numpy() > 0, [[False, True, False, True]])


def test_token_probabilities_of_equal_logits_keep_the_lowest_ids() -> None:
    found = token_probabilities(torch.zeros(1, 100), GenerateConfig(temperature=1.0, top_k=3))
    assert np.flatnonzero(found[0].numpy()).tolist() == [0, 1, 2]


def test_token_probabilities_at_temperature_limits_are_greedy_and_uniform() -> None:
    logits = random_logits(1)
    cold = token_probabilities(logits, GenerateConfig(temperature=1e-300))
    assert torch.equal(cold, torch.nn.functional.one_hot(logits.argmax(1), 40).double())
    hot = token_probabilities(logits, GenerateConfig(temperature=1e300))
    np.testing.assert_allclose(hot, 1 / 40, rtol=1e-12)


@pytest.mark.parametrize("size", [2, 40, 5000])
def test_sample_tokens_are_those_that_multinomial_draws(size: int) -> None:
    config = GenerateConfig(temperature=1.0, top_p=0.9)
    found, expected = ([sample_generator(4, number) for number in range(3)] for _ in range(2))
    for seed in range(20):
        logits = random_logits(seed, size)
        rows = zip(token_probabilities(logits, config), expected, strict=True)
        tokens = [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]
        assert sample_tokens(logits, config, found).tolist() == tokens


def test_sample_tokens_have_the_frequencies_of_their_probabilities() -> None:
    config = GenerateConfig(temperature=0.7, top_k=5)
    logits, generator, count = random_logits(5)[:1], sample_generator(11, 3), 4_000
    tokens = [int(sample_tokens(logits, config, [generator])) for _ in range(count)]
    probabilities = token_probabilities(logits, config)[0].numpy()
    probabilities /= probabilities.sum()
    frequencies = np.bincount(tokens, minlength=40) / count
    assert (
        np.abs(frequencies - probabilities) < 5 * np.sqrt(probabilities * (1 - probabilities) / count) + 1e-12
    ).all()


@pytest.mark.parametrize(("name", "value"), [("top_k", 3), ("top_p", 0.5), ("num_samples", 2)])
def test_generate_config_of_greedy_decoding_with_fields_of_sampling_raises(name: str, value: Any) -> None:
    problem = rf"generate.{name} = {value}: generate.temperature = 0 is greedy decoding; raise the temperature, or set"
    with pytest.raises(UserError, match=problem):
        GenerateConfig(**{name: value})
    GenerateConfig(temperature=0.1, **{name: value})


# --- samples ---


@pytest.mark.parametrize("models", [1, 2])
def test_generate_texts_of_a_seed_are_the_same_for_any_number_of_continuations(
    loaded: list[LoadedCheckpoint], models: int
) -> None:
    fields: dict[str, Any] = {"seed": 5, "length": 30, "top_p": 0.95}
    expected = generate(loaded[:models], num_samples=19, **fields)
    assert len(set(expected)) == 19
    for num_samples in (1, 2, 8, 9):
        assert generate(loaded[:models], num_samples=num_samples, **fields) == expected[:num_samples]
    assert generate(loaded[:models], **{**fields, "seed": 6})[0] not in expected


def test_generate_texts_seed_is_that_of_the_run_unless_given(loaded: list[LoadedCheckpoint]) -> None:
    seed = loaded[0].config.run.seed
    assert generate(loaded[:1]) == generate(loaded[:1], seed=seed) != generate(loaded[:1], seed=seed + 1)


def test_generate_texts_equals_plain_sampling_with_the_seed(loaded: list[LoadedCheckpoint]) -> None:
    """The loop of earlier versions, whose texts stay the same."""
    model, vocabulary = load_model(loaded[0]), loaded[0].vocabulary
    generator, ids = torch.Generator().manual_seed(9), []
    inputs, state = torch.from_numpy(vocabulary.encode(["It was"]).astype(np.int64))[:, None], None
    with torch.no_grad():
        for _ in range(70):
            logits, state = model(inputs, state)
            logits[:, :, UNKNOWN_ID] = -torch.inf
            probabilities = torch.softmax((logits[-1] - logits[-1].amax()).double() / 0.8, 1)
            inputs = torch.multinomial(probabilities, 1, generator=generator)
            ids.append(int(inputs))
    assert generate(loaded[:1], temperature=0.8, seed=9) == [vocabulary.decode(ids)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop", ["t", "s, it", "\n", "nowhere", "ünïcode"])
def test_generate_texts_end_before_the_stop_text(loaded: list[LoadedCheckpoint], temperature: float, stop: str) -> None:
    fields: dict[str, Any] = {"temperature": temperature, "length": 200, "num_samples": 9 if temperature else 1}
    expected = [text.partition(stop)[0] for text in generate(loaded[:1], **fields)]
    assert generate(loaded[:1], stop=stop, **fields) == expected


def test_generate_texts_with_stop_computes_no_more_than_needed(
    loaded: list[LoadedCheckpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    step = Ensemble.step

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(Ensemble, "step", count)
    generate(loaded[:1], stop="t", length=10_000)
    assert len(calls) < 1000


# --- prefixes ---


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "mingru"])
@pytest.mark.parametrize("length", [1, 2, BLOCK_TOKENS, BLOCK_TOKENS + 1, BLOCK_TOKENS + 2, 3 * BLOCK_TOKENS + 7])
def test_read_tokens_in_blocks_equals_one_call(cell: str, length: int) -> None:
    model = build_model(ModelConfig(cell=cell, hidden_size=24), 28, 0).double()
    ids = np.random.default_rng(0).integers(0, 28, length)
    found = read_tokens(Ensemble([model]), ids)
    assert found.token == ids[-1]
    expected: State = None
    if length > 1:
        with torch.no_grad():
            _, expected = model(torch.from_numpy(ids[:-1])[:, None], None)
    torch.testing.assert_close(found.states[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "start"), [("char", "\n"), ("byte", "\n")])
def test_generate_with_an_empty_prefix_begins_after_a_newline(tmp_path: Path, kind: str, start: str) -> None:
    (tmp_path / "text").write_text(TEXT)
    run = train(tmp_path, "run", tmp_path / "text", **{"stream.batch_size": 4, "vocabulary.kind": kind})
    expected = job("generate", run, "--generate.prefix", start).out
    assert job("generate", run, "--generate.prefix", "").out == expected.removeprefix(start)


def test_generate_with_an_empty_prefix_begins_after_the_separator(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    flags = {"stream.batch_size": 4, "corpus.separator": "true"}
    run = train(tmp_path, "run", tmp_path / "*.txt", **flags)
    checkpoint = open_checkpoint(Folder(str(run)))
    ids = continue_without_unknown([load_model(checkpoint)], [len(checkpoint.vocabulary) - 1], 30)
    ended = job("generate", run, "--generate.prefix", "", "--generate.length", 30)
    assert ended.out == checkpoint.vocabulary.decode(ids) + "\n"


def test_generate_with_an_empty_prefix_and_no_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no newline here " * 200)
    run = train(tmp_path, "run", tmp_path / "text", **{"stream.batch_size": 4})
    ended = job("generate", run, "--generate.prefix", "")
    message = "generate.prefix is empty, and the vocabulary has no separator or newline to begin with; give a text"
    assert (ended.status, ended.err) == (2, f"error: {message} to continue\n")


def test_generate_prefix_file_is_the_prefix(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = job("generate", run, "--generate.prefix", "the worst\n").out
    (tmp_path / "prefix").write_bytes(b"\xef\xbb\xbfthe worst\n")
    for address in (str(tmp_path / "prefix"), (tmp_path / "prefix").as_uri()):
        assert job("generate", run, "--generate.prefix_file", address).out == expected
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"the worst\n")))
    assert job("generate", run, "--generate.prefix_file", "-").out == expected
    monkeypatch.setattr("sys.stdin", None)
    ended = job("generate", run, "--generate.prefix_file", "-")
    message = "generate.prefix_file = -: there is no standard input; give a file"
    assert (ended.status, ended.err) == (2, f"error: {message}\n")


def test_generate_prefix_of_a_run_with_a_file_replaces_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prefix").write_text("best")
    flags = {"stream.batch_size": 4, "generate.prefix_file": tmp_path / "prefix", "generate.prefix": "the"}
    with_file = train(tmp_path, "run", run.parent / "text", **flags)
    assert (with_file / "sample.txt").read_text().startswith("the")
    assert job("generate", with_file).out.startswith("best")
    assert job("generate", with_file, "--generate.prefix", "times").out.startswith("times")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "generate.prefix_file = PATH: cannot be read: "),
        (b"the\xe9", [], "generate.prefix_file = PATH: not UTF-8 at byte 3; convert it to UTF-8"),
        (b"a", ["--generate.prefix", "b"], "generate.prefix_file = PATH: generate.prefix is given, too; give one of"),
        (b"XYZ", [], "generate.prefix = 'XYZ': none of its tokens is in the vocabulary"),
    ],
)
def test_generate_with_an_unusable_prefix_file_is_one_line(
    run: Path, tmp_path: Path, content: bytes | None, flags: list[str], message: str
) -> None:
    path = tmp_path / "prefix"
    if content is not None:
        path.write_bytes(content)
    ended = job("generate", run, "--generate.prefix_file", path, *flags)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith(f"error: {message.replace('PATH', str(path))}")


# --- saved states ---


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"seed": 3, "num_samples": 3}], ids=["greedy", "sampled"])
def test_generate_from_a_saved_state_equals_generation_from_the_prefix(
    loaded: list[LoadedCheckpoint], tmp_path: Path, models: int, fields: dict[str, Any]
) -> None:
    path = str(tmp_path / "state.safetensors")
    expected = generate(loaded[:models], **fields)
    assert generate(loaded[:models], save_state=path, **fields) == expected
    assert generate(loaded[:models], load_state=path, prefix="", **fields) == expected


def test_generate_from_a_saved_state_continues_with_a_prefix(run: Path, tmp_path: Path) -> None:
    state, second = tmp_path / "first", tmp_path / "second"
    whole = job("generate", run, "--generate.prefix", "it was the worst", "--generate.length", 40).out
    saved = job("generate", run, "--generate.prefix", "it was", "--generate.length", 0, "--generate.save_state", state)
    assert (saved.status, saved.out) == (0, "it was\n")
    flags = ["--generate.length", 40, "--generate.load_state", state]
    continued = job("generate", run, "--generate.prefix", " the worst", *flags, "--generate.save_state", second)
    assert "it was" + continued.out == whole
    last = job("generate", run, "--generate.length", 40, "--generate.load_state", second)
    assert "it was the worst" + last.out == whole


def test_generate_with_an_unusable_state_is_one_line(run: Path, other_run: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    job("generate", run, "--generate.save_state", state)
    content = state.read_bytes()

    def error(*words: object, flag: str = "load_state", path: Path = state) -> str:
        ended = job("generate", *words, f"--generate.{flag}", path)
        assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
        start = f"error: generate.{flag} = {path}: "
        assert ended.err.startswith(start)
        return ended.err.removeprefix(start)

    for models in ([other_run], [run, other_run]):
        assert error(*models) == "was saved with other models; give the runs that saved it, in the same order\n"
    assert error(run, path=tmp_path / "none").startswith("cannot be read: ")
    assert error(run, flag="save_state") == "exists; choose another file, or remove it\n"
    assert error(run, flag="save_state", path=tmp_path / "no" / "state") == "its folder does not exist; create it\n"
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert error(run) == "is damaged: its checksum is wrong; save the state again\n"
    for damaged in (content[:-9], b"text"):
        state.write_bytes(damaged)
        assert error(run).startswith("not a safetensors file: ")
    weights = next(run.glob("checkpoints/*/model.safetensors"))
    assert error(run, path=weights) == "is not a file that generate.save_state wrote\n"


# --- several runs, and the output ---


def continue_without_unknown(models: list[LanguageModel], ids: list[int], length: int) -> list[int]:
    """The most likely tokens by the mean of the probabilities of models, each of which reads all ids again."""
    start = len(ids)
    for _ in range(length):
        with torch.no_grad():
            logits = [model(torch.tensor(ids)[:, None], None)[0][-1, 0] for model in models]
        mean = torch.stack([row.double().softmax(0) for row in logits]).mean(0)
        mean[UNKNOWN_ID] = 0
        ids = [*ids, int(mean.argmax())]
    return ids[start:]


def test_generate_of_several_runs_is_by_the_mean_of_their_probabilities(
    run: Path, other_run: Path, loaded: list[LoadedCheckpoint]
) -> None:
    vocabulary = loaded[0].vocabulary
    prefix = vocabulary.encode(["it was"]).tolist()
    expected = continue_without_unknown([load_model(checkpoint) for checkpoint in loaded], prefix, 40)
    ended = job("generate", run, other_run, "--generate.prefix", "it was", "--generate.length", 40)
    assert ended.out == f"it was{vocabulary.decode(expected)}\n"
    alone = continue_without_unknown([load_model(loaded[1])], prefix, 40)
    assert job("generate", other_run, "--generate.prefix", "it was", "--generate.length", 40).out != ended.out
    assert vocabulary.decode(alone) != vocabulary.decode(expected)


def test_continue_greedily_of_a_model_twice_is_that_of_the_model() -> None:
    model = build_model(ModelConfig(cell="lstm", hidden_size=32), 28, 0)
    first = torch.tensor([3, 4])
    expected = continue_greedily(Ensemble([model], 0), first, [None], 20)
    again = build_model(ModelConfig(cell="lstm", hidden_size=32), 28, 0)
    assert torch.equal(continue_greedily(Ensemble([again, again], 0), first, [None, None], 20), expected)


def test_generate_prints_several_continuations_separated(run: Path) -> None:
    words = ["generate", run, "--generate.temperature", 1, "--generate.num_samples", 2, "--generate.prefix", "it"]
    found = json.loads(job(*words, "--json").out)
    first, second = found["continuations"]
    assert found["continuation"] == first != second
    assert job(*words).out == f"--- 1 of 2 ---\nit{first}\n--- 2 of 2 ---\nit{second}\n"
