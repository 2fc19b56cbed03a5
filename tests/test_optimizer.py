"""The optimizer equals a plain update of each weight."""

import dataclasses
from copy import deepcopy

import pytest
import torch
from conftest import not_none
from test_cuda_graph import new_train_state, small_config
from torch import nn

from job.config.model import ModelConfig
from job.config.training import OptimizerConfig
from job.distributed.gradient_sync import ControlFlags
from job.training.loop import train_steps
from job.training.optimizer import build_optimizer, clip_and_update, total_norm


@pytest.mark.parametrize("decay_scope", ["all", "matrices"])
def test_sgd_step_decays_weights_of_its_scope_and_clips_all_together(decay_scope: str) -> None:
    optimizer_config = OptimizerConfig(
        learning_rate=0.5, weight_decay=0.25, decay_scope=decay_scope, grad_clip_norm=0.125
    )
    model_config = ModelConfig(cell="gru", hidden_size=8, embedding_size=5)
    config = dataclasses.replace(small_config(epochs=1), model=model_config, optimizer=optimizer_config)
    train_state = new_train_state(config)
    before = {name: weight.detach().clone() for name, weight in train_state.model.named_parameters()}
    next(train_steps(train_state, config, ControlFlags))
    clipped = {name: not_none(weight.grad) for name, weight in train_state.model.named_parameters()}
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in clipped.values()]))
    assert abs(norm - 0.125) < 1e-6
    for name, weight in train_state.model.named_parameters():
        decay = 0.0 if decay_scope == "matrices" and "bias" in name else 0.25
        torch.testing.assert_close(weight, before[name] - 0.5 * (clipped[name] + decay * before[name]), msg=name)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_clip_and_update_given_the_norm_has_the_bits_of_torch(name: str, max_norm: float, threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    layers = [nn.Embedding(3001, 200), nn.Linear(24, 160)]
    models = [nn.ModuleList(layers), deepcopy(nn.ModuleList(layers))]
    optimizers = [build_optimizer(OptimizerConfig(name=name), model) for model in models]
    for _ in range(2):
        for weight, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            weight.grad = torch.randn_like(weight)
            weight.grad[5:-7] = 0  # as in the rows of tokens that are not in the window
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.25
        clip_and_update(optimizers[0], max_norm)
        gradients = [not_none(weight.grad) for weight in models[1].parameters()]
        norm = total_norm(gradients)
        for gradient in gradients:
            gradient.mul_((max_norm / norm).clamp(max=1) if max_norm else 1)
        optimizers[1].step()
        for weight, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(weight, other)
            assert torch.equal(not_none(weight.grad), not_none(other.grad))


def test_total_norm_agrees_with_float64_and_has_the_same_bits_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    shapes = ((3001, 200), 1e-3), ((511,), 1.0), ((1,), 100.0)
    gradients = [torch.randn(shape) * scale for shape, scale in shapes]
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norms.append(total_norm(gradients))
    assert abs(norms[0] / expected - 1) < 1e-7
    assert norms[1:] == norms[:1] * 2


def test_update_with_a_gradient_that_is_not_finite_changes_all_weights_as_torch_does() -> None:
    weight = nn.Parameter(torch.ones(70_000))
    weight.grad = torch.zeros(70_000)
    weight.grad[0] = float("nan")
    clip_and_update(torch.optim.SGD([weight], lr=0.1), max_norm=1.0)
    assert weight.isnan().all()
