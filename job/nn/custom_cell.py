"""Imports a user's cell and checks that it follows the state protocol."""

import importlib
import inspect

import torch
from torch import Tensor, nn

from job.config.schema import ModelConfig
from job.errors import UserError


def build_custom_cell(model_config: ModelConfig, features: int) -> nn.Module:
    """A recurrent module of the user's own: ``Class(input_size, hidden_size, num_layers)``."""
    module_name, _, class_name = model_config.cell.partition(":")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # whatever the user's code does
        raise UserError(f"model.cell = {model_config.cell}: cannot be imported: {_in_short(error)}") from None
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise UserError(f"model.cell = {model_config.cell}: not a torch.nn.Module")
    try:
        return kind(features, model_config.hidden_size, model_config.num_layers)
    except Exception as error:
        raise UserError(
            f"model.cell = {model_config.cell}: is made as Class(input_size, hidden_size, num_layers), with "
            f"{features}, {model_config.hidden_size}, {model_config.num_layers}: {_in_short(error)}"
        ) from None


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_state_protocol(cell: nn.Module, model_config: ModelConfig, features: int) -> None:
    """UserError unless the cell takes and gives state as the loop needs it, tried on two lanes."""

    def refuse(what: str) -> UserError:
        return UserError(f"model.cell = {model_config.cell}: {what} (see README, A cell of your own)")

    inputs_TBE = torch.zeros(3, 2, features)
    was_training = cell.training
    cell.eval()
    try:
        with torch.no_grad():
            first = cell(inputs_TBE, None)
            hidden, state = first
            cell(inputs_TBE, state)
    except Exception as error:
        raise refuse(f"cell(inputs, state) must give outputs and state: {error}") from None
    cell.train(was_training)
    if not isinstance(hidden, Tensor) or hidden.shape != (3, 2, model_config.hidden_size):
        raise refuse(f"outputs must be a tensor (steps, lanes, {model_config.hidden_size})")
    parts = state if isinstance(state, tuple) else (state,)
    if not all(isinstance(part, Tensor) and part.dim() >= 2 and part.shape[1] == 2 for part in parts):
        raise refuse("the state must be a tensor or a tuple of tensors with the lane on axis 1")
