"""The optimizer, and gradient clipping."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from job.config.training import OptimizerConfig
from job.errors import UserError


def build_optimizer(optimizer_config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Returns torch's optimizer of the configured name over all parameters; each step sets its learning rate."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        (matrices if optimizer_config.decay_scope == "all" or parameter.dim() > 1 else others).append(parameter)
    decays = ((matrices, optimizer_config.weight_decay), (others, 0.0))
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in decays if parameters]
    if optimizer_config.name == "sgd":
        return torch.optim.SGD(groups, momentum=optimizer_config.momentum, fused=True)
    return torch.optim.AdamW(groups, fused=True)


@torch.no_grad()
def clip_gradient(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scales the gradient to the norm ``max_norm`` if it is larger, as the d2l book's ``grad_clipping`` does.

    The norm is over all parameters together. Unlike in torch's ``clip_grad_norm_``, no epsilon is added to it.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    scale = (max_norm / norm).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Returns the optimizer's state by ``key/parameter``, such as ``exp_avg/rnn.weight_hh_l0``."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restores the state that ``optimizer_tensors`` returned. Raises UserError if it is not one of this model."""
    parameters = dict(model.named_parameters())
    for path, tensor in tensors.items():
        key, _, name = path.partition("/")
        parameter = parameters.get(name)
        if parameter is None or tensor.shape not in ((), parameter.shape):
            raise UserError(f"optimizer.safetensors: {path} does not fit the model")
        # torch stores a fused optimizer's step counts on the parameter's device, all in float32.
        optimizer.state[parameter][key] = tensor.to(parameter.device)
