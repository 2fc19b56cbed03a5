"""The optimizer equals a plain update of each weight."""

import dataclasses

import pytest
import torch
from conftest import not_none
from test_cuda_graph import new_train_state, small_config

from job.config.model import ModelConfig
from job.config.training import OptimizerConfig
from job.distributed.gradient_sync import ControlFlags
from job.training.loop import train_steps


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
