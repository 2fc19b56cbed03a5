"""Custom cells: the protocol check, and training through the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job, not_none, result
from safetensors.torch import load_file

from job.config.model import ModelConfig
from job.distributed.gradient_sync import AllReduceGradients, Batch, DeterministicGradients, LossModule, assign_lanes
from job.errors import UserError
from job.nn.language_model import build_model


@pytest.mark.parametrize("cell", ["cells:DecayCell", "torch.nn:GRU"])
def test_build_model_accepts_cell_that_follows_the_state_protocol(cell: str) -> None:
    assert build_model(ModelConfig(cell=cell), 9, 0).has_custom_cell


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("cells:LaneFirstCell", "lane on axis 1"),
        ("cells:Missing", "cannot be imported: AttributeError"),
        ("cells:os", "not a torch.nn.Module"),
        ("torch.nn:Linear", r"does not implement outputs, state = cell\(inputs, state\): TypeError"),
    ],
)
def test_build_model_rejects_cell_that_violates_the_state_protocol(cell: str, message: str) -> None:
    with pytest.raises(UserError, match=f"model.cell = {cell}: .*{message}"):
        build_model(ModelConfig(cell=cell), 9, 0)


def test_gradients_of_cell_with_tuple_state_return_detached_tuple() -> None:
    model = build_model(ModelConfig(cell="cells:DecayCell", hidden_size=8), 9, 0)
    tokens = torch.randint(0, 9, (6, 4))
    batch = Batch(tokens[:-1], tokens[1:], torch.zeros(3), torch.zeros(0, 4, dtype=torch.int32))
    _, state = AllReduceGradients(LossModule(model, 20), assign_lanes(4))(batch, None)
    assert isinstance(state, tuple)
    assert state[1].shape == (1, 4, 8)
    assert not any(tensor.requires_grad for tensor in state)


def test_parameter_used_by_one_lane_group_gets_that_groups_gradient() -> None:
    model = build_model(ModelConfig(cell="cells:BranchingCell", hidden_size=8), 5, seed=1)
    tokens = torch.randint(1, 5, (6, 4), generator=torch.Generator().manual_seed(0))
    tokens[2, 0] = 0
    batch = Batch(tokens[:-1], tokens[1:], torch.zeros(3), torch.zeros(0, 4, dtype=torch.int32))
    state = torch.zeros(1, 4, 8)

    def gradients(
        gradients_class: type[AllReduceGradients | DeterministicGradients], num_groups: int
    ) -> dict[str, torch.Tensor | None]:
        gradients_class(LossModule(model, 20), assign_lanes(4, num_groups))(batch, state)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole = gradients(AllReduceGradients, 0)
    grouped = gradients(DeterministicGradients, 3)
    assert grouped["rnn.unused"] is not None
    assert grouped["rnn.first"] is None
    for name, gradient in whole.items():
        assert (gradient is None) == (grouped[name] is None), name
        assert gradient is None or torch.allclose(gradient, not_none(grouped[name]), atol=1e-7), name


def test_training_torch_gru_as_custom_cell_gives_weights_of_builtin_gru(prose: Path, tmp_path: Path) -> None:
    flags = ["train", "--corpus.source", prose, "--scale.workers", 0, "--train.epochs", 2, "--generate.prefix", "the"]
    flags += ["--train.precision", "fp64", "--run.storage", tmp_path, "--model.hidden_size", 24]
    flags += ["--corpus.max_tokens", 8000]
    builtin = job(*flags, "--run.name", "builtin", "--model.cell", "gru")
    custom = job(*flags, "--run.name", "custom", "--model.cell", "torch.nn:GRU")
    assert (builtin.status, custom.status) == (0, 0), builtin.err + custom.err
    assert result(tmp_path / "builtin")["weights_sha256"] == result(tmp_path / "custom")["weights_sha256"]
    assert torch.get_default_dtype() == torch.float32


def test_training_leaves_parameters_without_gradient_unchanged(prose: Path, tmp_path: Path) -> None:
    flags = ["train", "--corpus.source", prose, "--scale.workers", 0, "--train.epochs", 2, "--generate.prefix", "the"]
    flags += ["--train.precision", "fp64", "--run.storage", tmp_path, "--model.cell", "cells:UnusedWeightsCell"]
    flags += ["--corpus.max_tokens", 8000]
    flags += ["--optimizer.weight_decay", 0.1]

    def train(name: str, *more: Any) -> dict[str, torch.Tensor]:
        ended = job(*flags, "--run.name", name, *more)
        assert ended.status == 0, ended.err
        return load_file(max((tmp_path / name / "checkpoints").iterdir()) / "model.safetensors")

    whole, grouped = train("whole"), train("grouped", "--train.reproducible", "true")
    assert torch.equal(whole["rnn.unused"], torch.ones(3, dtype=torch.float64))
    assert not torch.equal(whole["rnn.first"], torch.ones(1, 1, 256, dtype=torch.float64))
    for name, weight in whole.items():
        torch.testing.assert_close(grouped[name], weight, rtol=1e-9, atol=1e-12)
