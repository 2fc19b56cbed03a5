"""Imports a user's cell and checks that it implements the state protocol.

Axes: T steps, B lanes, E input features, H hidden units.
"""

import contextlib
import importlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from job.config.model import ModelConfig
from job.errors import UserError

REMEDY = "see 'Custom cells' in the README"


def build_custom_cell(model_config: ModelConfig, input_size: int) -> nn.Module:
    """Instantiates ``cell_class``, or imports the class that ``model.cell = module:Class`` names.

    Args:
        model_config: the class is called with ``input_size`` and the config's hidden_size and num_layers
        input_size: number of input features E

    Raises:
        UserError: the class cannot be imported or instantiated, or is no ``torch.nn.Module``
    """
    module_name, _, class_name = model_config.cell.partition(":")
    cell_class = model_config.cell_class
    if cell_class is None:
        with _user_code(model_config, "cannot be imported"):
            cell_class = getattr(importlib.import_module(module_name), class_name)  # the name is known only at run time
    if not (inspect.isclass(cell_class) and issubclass(cell_class, nn.Module)):
        raise UserError(f"model.cell = {model_config.cell}: not a torch.nn.Module", REMEDY)
    arguments = (input_size, model_config.hidden_size, model_config.num_layers)
    with _user_code(model_config, f"{class_name}(input_size, hidden_size, num_layers) failed with {arguments}"):
        return cell_class(*arguments)


@contextlib.contextmanager
def _user_code(model_config: ModelConfig, problem: str) -> Iterator[None]:
    """Reports any exception of the user's code in the block as a UserError."""
    try:
        yield
    except Exception as error:
        summary = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"model.cell = {model_config.cell}: {problem}: {summary}", REMEDY) from None


def check_state_protocol(cell: nn.Module, model_config: ModelConfig, input_size: int) -> None:
    """Calls the cell twice, on two lanes of zeros, and checks its outputs and state.

    Args:
        cell: called as ``outputs_TBH, state = cell(inputs_TBE, state)``, first with state None
        model_config: gives H and the name for messages
        input_size: number of input features E

    Raises:
        UserError: a call fails, the outputs have the wrong shape, or the lane is not on axis 1 of the state
    """
    inputs_TBE = torch.zeros(3, 2, input_size)
    was_training = cell.training
    cell.eval()
    with _user_code(model_config, "does not implement outputs, state = cell(inputs, state)"), torch.no_grad():
        outputs, state = cell(inputs_TBE, None)
        cell(inputs_TBE, state)
        if not isinstance(outputs, Tensor) or outputs.shape != (3, 2, model_config.hidden_size):
            raise ValueError(f"outputs must be a tensor (steps, lanes, {model_config.hidden_size})")
        tensors = state if isinstance(state, tuple) else (state,)
        if not all(isinstance(tensor, Tensor) and tensor.dim() >= 2 and tensor.shape[1] == 2 for tensor in tensors):
            raise ValueError("state must be a tensor or a tuple of tensors with the lane on axis 1")
    cell.train(was_training)
