"""``model.init``: weights of another run, placed by token."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch.nn import functional as F

from job.config.config_file import load_config
from job.data.vocabulary import Vocabulary
from job.errors import UserError
from job.inference.generate import load_model
from job.nn.language_model import LanguageModel, build_model, load_weights
from job.run.run_dir import open_checkpoint
from job.run.setup import build_run_spec
from job.storage import Folder
from job.training.run_spec import RunSpec

LETTERS = "abcdefgh \n"
FLAGS = {
    "vocabulary.kind": "char", "stream.batch_size": "8", "stream.num_steps": "20", "model.hidden_size": "8",
    "run.seed": "3", "generate.prefix": "a", "scale.workers": "0", "train.max_steps": "3",
}  # fmt: skip


def random_text(letters: str, length: int, seed: int) -> str:
    """Letters of which the first are the most frequent."""
    weights = [1 / (index + 1) for index in range(len(letters))]
    return "".join(random.Random(seed).choices(letters, weights, k=length))


def random_words(words: list[str], length: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(words, [1 / (index + 1) for index in range(len(words))], k=length))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Any]:
    """Trains a run on a text; returns its folder."""

    def train_on(text: str, name: str = "first", **flags: Any) -> Path:
        (tmp_path / f"{name}.txt").write_text(text)
        values = {**FLAGS, **flags, "corpus.source": str(tmp_path / f"{name}.txt"), "run.storage": str(tmp_path)}
        arguments = [word for key, value in values.items() for word in (f"--{key}", value)]
        ended = job("train", *arguments, "--run.name", name)
        assert ended.status == 0, ended.err
        return tmp_path / name

    return train_on


def spec_of(tmp_path: Path, text: str, init: Path | str, **flags: Any) -> RunSpec:
    (tmp_path / "second.txt").write_text(text)
    flags = {**FLAGS, **flags, "corpus.source": str(tmp_path / "second.txt"), "model.init": str(init)}
    return build_run_spec(load_config(None, flags), Folder(str(tmp_path / "second")))


def model_of(spec: RunSpec) -> LanguageModel:
    model = build_model(spec.config.model, len(spec.dataset.vocabulary), spec.config.run.seed)
    load_weights(model, load_safetensors(spec.init), "init")
    return model


def loss_by_text(model: LanguageModel, vocabulary: Vocabulary, text: str) -> torch.Tensor:
    """The loss of each token of a text, as a model with this vocabulary sees it."""
    ids = torch.from_numpy(vocabulary.encode([text]).astype("int64"))[:, None]
    logits, _ = model.eval()(ids[:-1], None)
    return F.cross_entropy(logits.flatten(0, 1), ids[1:, 0], reduction="none")


@pytest.mark.parametrize(
    ("old_text", "new_text", "flags"),
    [
        ("aaab" * 1000, "abbb" * 1000, {}),
        (random_text(LETTERS, 3000, 0), random_text(LETTERS[::-1], 3000, 1), {"model.embedding_size": "4"}),
        (
            random_text(LETTERS, 3000, 0),
            random_text(LETTERS[::-1], 3000, 1),
            {"model.cell": "lstm", "model.num_layers": "2"},
        ),
        (random_text(LETTERS, 3000, 0), random_text(LETTERS[::-1], 3000, 1), {"model.cell": "cells:DecayCell"}),
        (
            random_words(["a", "b", "cc", "dd"], 1000, 0),
            random_words(["dd", "cc", "b", "a"], 1000, 1),
            {"vocabulary.kind": "word"},
        ),
    ],
)
def test_build_run_spec_init_of_other_token_ids_gives_the_same_losses(
    train: Callable[..., Any], tmp_path: Path, old_text: str, new_text: str, flags: dict[str, str]
) -> None:
    first = open_checkpoint(Folder(str(train(old_text, **flags))))
    spec = spec_of(tmp_path, new_text, tmp_path / "first", **flags)
    assert spec.dataset.vocabulary.tokens != first.vocabulary.tokens
    torch.testing.assert_close(
        loss_by_text(model_of(spec), spec.dataset.vocabulary, new_text),
        loss_by_text(load_model(first, spec.config.model), first.vocabulary, new_text),
    )


@pytest.mark.parametrize(
    ("old_text", "new_text", "flags"),
    [
        (random_text("abcdef", 9000, 0), random_text("fxaybz", 9000, 1), {}),
        (random_text("abcdef", 9000, 0), random_text("xfa", 9000, 1), {"model.embedding_size": "4"}),
        (
            random_words(["a", "b", "cc", "dd"], 3000, 0),
            random_words(["dd", "x", "a", "yy"], 3000, 1),
            {"vocabulary.kind": "word", "vocabulary.size": "4"},
        ),
    ],
)
def test_build_run_spec_init_keeps_initial_values_of_new_tokens(
    train: Callable[..., Any], tmp_path: Path, old_text: str, new_text: str, flags: dict[str, str]
) -> None:
    first = open_checkpoint(Folder(str(train(old_text, **flags))))
    spec = spec_of(tmp_path, new_text, tmp_path / "first", **flags)
    old_tokens, tokens = first.vocabulary.tokens, spec.dataset.vocabulary.tokens
    placed, initial = load_safetensors(spec.init), build_model(spec.config.model, len(tokens), 3).state_dict()
    columns = "embedding.weight" if "model.embedding_size" in flags else "rnn.weight_ih_l0"
    assert any(token not in old_tokens for token in tokens)
    for index, token in enumerate(tokens):
        for name in ("linear.weight", "linear.bias", columns):
            old, new, own = (weights[name] for weights in (first.weights, placed, initial))
            if name == "rnn.weight_ih_l0":
                old, new, own = old.T, new.T, own.T
            expected = old[old_tokens.index(token)] if token in old_tokens else own[index]
            assert torch.equal(new[index], expected)
    assert torch.equal(placed["rnn.weight_hh_l0"], first.weights["rnn.weight_hh_l0"])


def test_build_run_spec_init_of_run_checkpoint_file_and_uri_are_equal(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("aaab" * 3000)
    (checkpoint,) = (run / "checkpoints").iterdir()
    monkeypatch.setenv("RUNS", str(tmp_path))
    inits = [run, f"{run}/", checkpoint, f"{checkpoint}/model.safetensors", f"file://{run}", f"file://{checkpoint}"]
    inits += [f"file://{checkpoint}/model.safetensors", "$RUNS/first"]
    specs = [spec_of(tmp_path, "abbb" * 3000, init) for init in inits]
    assert len({spec.init for spec in specs}) == 1


@pytest.mark.parametrize(
    ("vocabulary", "flags", "message"),
    [
        (None, {}, "vocabulary.json is missing, and there is no vocabulary.file; copy the vocabulary.json"),
        ({"kind": "char", "tokens": ["<unk>", "a"]}, {}, "linear.bias is (3,), expected (2,)"),
        ({"kind": "word", "tokens": ["<unk>", "a", "b"]}, {}, "is a model of vocabulary.kind = word, not char"),
        ({"kind": "char", "tokens": ["a", "b"]}, {}, "vocabulary.json: not a vocabulary"),
        ({"kind": "byte", "tokens": []}, {}, "is a model of vocabulary.kind = byte, not char"),
        ({"kind": "char", "tokens": ["<unk>", "b", "a"]}, {"model.hidden_size": "9"}, "weights do not match the model"),
        ({"kind": "char", "tokens": ["<unk>", "b", "a"]}, {"model.embedding_size": "3"}, "embedding.weight is missing"),
    ],
)
def test_build_run_spec_init_with_unknown_tokens_raises_user_error(
    tmp_path: Path, vocabulary: dict[str, Any] | None, flags: dict[str, str], message: str
) -> None:
    save_file(build_model(load_config(None, FLAGS).model, 3, 0).state_dict(), str(tmp_path / "w.safetensors"))
    if vocabulary:
        (tmp_path / "vocabulary.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError) as error:
        spec_of(tmp_path, "aaab" * 3000, tmp_path / "w.safetensors", **flags)
    assert str(error.value).startswith(f"model.init = {tmp_path}/w.safetensors: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_build_run_spec_init_of_a_file_with_vocabulary_file_takes_its_tokens(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    (checkpoint,) = (train("aaab" * 3000) / "checkpoints").iterdir()
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "w.safetensors")
    flags = {"vocabulary.file": f"{checkpoint}/vocabulary.json"}
    specs = [spec_of(tmp_path, "abbb" * 3000, init, **flags) for init in (checkpoint, tmp_path / "w.safetensors")]
    assert specs[0].init == specs[1].init
    assert specs[0].dataset.vocabulary.tokens == ("<unk>", "a", "b")  # and not by the frequency in the new text


def test_build_run_spec_init_of_a_folder_without_checkpoint_raises_user_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run with a checkpoint nor a checkpoint"):
        spec_of(tmp_path, "aaab" * 3000, tmp_path / "empty")


def test_train_resumed_after_its_initial_weights_were_removed_continues(train: Callable[..., Any]) -> None:
    text = random_text(LETTERS, 4000, seed=1)
    first = train(text)
    second = train(text, "second", **{"model.init": str(first)})
    shutil.rmtree(first)
    train(text, "second", **{"model.init": str(first), "train.max_steps": "5"})
    assert json.loads((second / "result.json").read_text())["steps"] == 5
