"""``corpus.documents = reset``: runs, evaluation and generation, and what does not depend on it."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ended, job, result, rows

from job.config.model import BUILTIN_CELLS, ModelConfig
from job.config.text import CorpusConfig
from job.data.lanes import split_evenly
from job.data.vocabulary import Vocabulary
from job.distributed.gradient_sync import AllReduceGradients, Batch, DeterministicGradients, LossModule, assign_lanes
from job.inference.ensemble import Ensemble
from job.inference.generate import continue_greedily, load_model
from job.nn.language_model import LanguageModel, build_model
from job.nn.state import State
from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.training.loop import evaluate_lanes

SEPARATOR = 6
FLAGS = {
    "stream.batch_size": 5, "stream.num_steps": 9, "model.cell": "gru", "model.hidden_size": 32, "model.num_layers": 2,
    "model.dropout": 0.2, "train.epochs": 2, "train.checkpoint_every": 4, "generate.length": 5, "scale.workers": 0,
    "generate.prefix": "the", "corpus.validation_fraction": 0.2, "corpus.documents": "reset",
    "optimizer.averaging": "mean", "train.precision": "fp32",
}  # fmt: skip


def train(storage: Path, name: str, source: Path, **flags: object) -> Ended:
    values = FLAGS | {"corpus.source": source, "run.storage": storage, "run.name": name}
    values |= {key.replace("__", "."): value for key, value in flags.items()}
    return job("train", *(word for key, value in values.items() for word in (f"--{key}", value)))


def outcome(run: Path) -> tuple[str, float, str]:
    """The final weights, the last validation loss, and the sample of a run."""
    summary = result(run)
    return summary["weights_sha256"], rows(run, "validation")[-1]["nats"], summary["generated"]


@pytest.fixture(scope="module")
def documents(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 documents of one or two lines, of which windows contain parts of several."""
    lines = [line[:15] for line in prose.read_text().splitlines()[:60]]
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def reset_run(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that resets."""
    storage = tmp_path_factory.mktemp("runs")
    ended = train(storage, "reset", documents)
    assert ended.status == 0, ended.err
    return storage / "reset"


@pytest.mark.slow
def test_train_that_resets_differs_from_one_that_joins(documents: Path, reset_run: Path, tmp_path: Path) -> None:
    assert train(tmp_path, "join", documents, corpus__documents="join").status == 0
    weights, nats, _ = outcome(tmp_path / "join")
    assert weights != outcome(reset_run)[0]
    assert nats != outcome(reset_run)[1]
    ended = train(tmp_path, "join", documents, train__epochs=3)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert 'corpus.documents ("join" → "reset")' in ended.err


@pytest.mark.slow
def test_train_that_resets_and_is_resumed_equals_an_uninterrupted_one(
    documents: Path, reset_run: Path, tmp_path: Path
) -> None:
    for max_steps in (6, 7, 0):
        assert train(tmp_path, "resumed", documents, train__max_steps=max_steps).status == 0
    assert result(tmp_path / "resumed")["steps"] > 30
    assert outcome(tmp_path / "resumed") == outcome(reset_run)


@pytest.mark.slow
def test_train_that_resets_from_a_store_made_without_it_equals_one_from_the_text(
    documents: Path, reset_run: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert job("prepare", "--corpus.source", documents, "--corpus.store", store).status == 0
    assert "corpus.documents" not in (store / "manifest.json").read_text()
    assert train(tmp_path, "stored", store).status == 0
    assert outcome(tmp_path / "stored") == outcome(reset_run)


@pytest.mark.cluster
def test_train_that_resets_on_two_workers_equals_one(documents: Path, tmp_path: Path, on_cluster: None) -> None:
    for workers in (0, 2):
        ended = train(tmp_path, str(workers), documents, scale__workers=workers, train__reproducible="true")
        assert ended.status == 0, ended.err
    assert outcome(tmp_path / "2") == outcome(tmp_path / "0")


@pytest.mark.parametrize("cell", [*BUILTIN_CELLS, "cells:DecayCell"])
def test_gradients_of_lane_groups_that_reset_add_up_to_those_of_all_lanes(cell: str) -> None:
    model = build_model(ModelConfig(cell=cell, hidden_size=32), SEPARATOR + 1, 3)
    model.reset_token = SEPARATOR
    tokens = torch.randint(0, SEPARATOR + 1, (14, 7), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:-1], tokens[1:], torch.zeros(3), torch.zeros(0, 7, dtype=torch.int32))
    with torch.no_grad():
        _, state = model(tokens, None)
    gradients: list[list[Any]] = []
    for sync in (AllReduceGradients(LossModule(model, 91), assign_lanes(7)),
                 DeterministicGradients(LossModule(model, 91), assign_lanes(7, 3))):  # fmt: skip
        stats, last = sync(batch, state)
        gradients.append(
            [stats[0], *(last if isinstance(last, tuple) else [last]), *(p.grad for p in model.parameters())]
        )
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def nats_alone(model: LanguageModel, tokens: np.ndarray) -> float:
    """The loss of all tokens but the first; the documents one by one, each from a zero state."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    starts = [index for index in range(1, len(ids) - 1) if ids[index] == SEPARATOR]
    total = 0.0
    for start, stop in pairwise([0, *starts, len(ids) - 1]):
        state: State = None
        for index in range(start, stop):
            logits, state = model(ids[index].view(1, 1), state)
            total -= float(logits[0, 0].log_softmax(0)[ids[index + 1]])
    return total


@torch.no_grad()
@pytest.mark.parametrize("cell", [*BUILTIN_CELLS, "cells:DecayCell"])
def test_evaluate_lanes_that_reset_is_the_sum_over_documents(cell: str) -> None:
    model = build_model(ModelConfig(cell=cell, hidden_size=32), SEPARATOR + 1, 3).double()
    tokens = np.random.default_rng(0).integers(0, SEPARATOR + 1, 150).astype(np.uint8)
    expected = nats_alone(model, tokens)
    assert evaluate_lanes(model, tokens, [range(1)], 1, 7)[0] != pytest.approx(expected, rel=1e-6)
    model.reset_token = SEPARATOR
    for num_steps in (1, 7, 1000):
        assert evaluate_lanes(model, tokens, [range(1)], 1, num_steps)[0] == pytest.approx(expected, rel=1e-12)
    lanes = evaluate_lanes(model, tokens, [range(2), range(2, 4)], 4, 7)
    by_lane = [nats_alone(model, tokens[lane.start : lane.stop + 1]) for lane in split_evenly(149, 4)]
    assert lanes == pytest.approx([sum(by_lane[:2]), sum(by_lane[2:])], rel=1e-12)


@pytest.mark.slow
def test_evaluate_and_generate_follow_the_checkpoint(reset_run: Path, documents: Path, tmp_path: Path) -> None:
    loaded = open_checkpoint(Folder(str(reset_run)))
    assert load_model(loaded).reset_token == len(loaded.vocabulary) - 1
    reset = json.loads(job("evaluate", reset_run, "--corpus.source", documents, "--json").out)
    model = load_model(loaded).double()
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    tokens = loaded.vocabulary.encode_documents([[text] for text in texts])
    (nats,) = evaluate_lanes(model, tokens, [range(1)], 1, 5)
    assert reset["nats_per_token"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-6)
    validated = tokens[len(tokens) - round(0.2 * len(tokens)) :]
    validation = sum(evaluate_lanes(model, validated, [range(lane, lane + 1) for lane in range(5)], 5, 9))
    assert outcome(reset_run)[1] == pytest.approx(validation / (len(validated) - 1), rel=1e-6)
    model.reset_token = None
    (carried,) = evaluate_lanes(model, tokens, [range(1)], 1, 5)
    assert abs(carried - nats) > 1e-4 * nats
    for verb in ("evaluate", "generate"):
        ended = job(verb, reset_run, "--corpus.documents", "join")
        assert (ended.status, ended.err.count("\n")) == (2, 1)
        assert "corpus.documents is fixed by the checkpoint" in ended.err


@pytest.mark.parametrize("cell", ["lstm", "minlstm", "cells:DecayCell"])
def test_generated_separator_resets_the_state(cell: str) -> None:
    """What follows a separator is the same whatever was before it."""
    model = build_model(ModelConfig(cell=cell, hidden_size=32), SEPARATOR + 1, 3)
    model.reset_token = SEPARATOR
    for weight in model.parameters():
        weight.data *= 4
    ensemble, separators = Ensemble([model]), torch.full((5,), SEPARATOR)
    prefixes = torch.randint(0, SEPARATOR, (6, 5), generator=torch.Generator().manual_seed(0))
    after_prefix = continue_greedily(ensemble, separators, ensemble.advance(prefixes, [None]), 30)
    assert torch.equal(after_prefix, continue_greedily(ensemble, separators, [None], 30))
    model.reset_token = None
    ensemble = Ensemble([model])
    assert not torch.equal(
        after_prefix, continue_greedily(ensemble, separators, ensemble.advance(prefixes, [None]), 30)
    )


def test_reset_token_is_the_separator_of_a_vocabulary_that_has_one() -> None:
    reset, join = CorpusConfig(documents="reset"), CorpusConfig()
    assert Vocabulary("byte", (), has_separator=True).reset_token(reset) == 256
    assert Vocabulary("char", ("<unk>", "a"), has_separator=True).reset_token(reset) == 2
    assert Vocabulary("char", ("<unk>", "a"), has_separator=True).reset_token(join) is None
    assert Vocabulary("byte", ()).reset_token(reset) is None


@pytest.mark.parametrize("verb", ["train", "tune", "doctor"])
def test_reset_without_a_separator_is_an_error_before_anything_starts(verb: str, prose: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    space = '[search.space]\n"optimizer.learning_rate" = { uniform = [1, 2] }\n'
    config.write_text(f'[search]\ntrials = 2\nmetric = "perplexity"\n{space}')
    flags = ["--corpus.documents", "reset", "--run.storage", tmp_path / "runs", "--scale.workers", 0]
    words = [config] if verb == "tune" else []
    ended = job(verb, *words, "--corpus.source", prose, *flags)
    problem = "corpus.documents = reset: the vocabulary has no separator"
    if verb == "doctor":
        assert (ended.status, ended.out.count(problem)) == (1, 1)
    else:
        assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)
        assert problem in ended.err
    assert not (tmp_path / "runs").exists()


def test_reset_with_tokens_of_another_trainer_needs_a_vocabulary_with_separator(tmp_path: Path) -> None:
    (np.arange(4000) % 5 + 1).astype("<u2").tofile(tmp_path / "flat.bin")
    flags = {"corpus__validation_fraction": 0, "train__max_steps": 3, "vocabulary__file": tmp_path / "v.json"}
    content: dict[str, object] = {"kind": "char", "tokens": ["<unk>", *"abcde"]}
    for has_separator in (False, True):
        (tmp_path / "v.json").write_text(json.dumps(content | {"separator": True} if has_separator else content))
        ended = train(tmp_path / "runs", "flat", tmp_path / "flat.bin", **flags, generate__prefix="abc")
        assert ended.status == (0 if has_separator else 2), ended.err
        assert (tmp_path / "runs").exists() == has_separator
