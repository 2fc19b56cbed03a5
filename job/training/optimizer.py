"""The optimizer, and gradient clipping."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from job.config.training import OptimizerConfig
from job.errors import UserError
from job.kernels.ops import can_update, gradient_norm, scale_gradients


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
def clip_and_update(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clips the gradient and updates the weights, all parameters of the optimizer together.

    The gradient is scaled to the norm ``max_norm`` if it is larger, as the d2l book's ``grad_clipping`` does. Unlike in
    torch's ``clip_grad_norm_``, no epsilon is added to the norm.

    Args:
        optimizer: from ``build_optimizer``, with its learning rate set
        max_norm: 0: the gradient is not clipped
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    gradients = [weight.grad for weight in weights]
    scale = (max_norm / total_norm(gradients)).clamp(max=1.0) if max_norm else None
    if not can_update([*weights, *gradients]):
        for gradient in gradients if scale is not None else ():
            gradient.mul_(scale)
        optimizer.step()
        return
    factor = 1.0 if scale is None else float(scale)
    if _is_plain_sgd(optimizer):
        scale_gradients(gradients, factor, weights, optimizer.param_groups[0]["lr"])
        return
    if scale is not None:
        scale_gradients(gradients, factor)
    optimizer.step()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all gradients together, by the kernel if it can read them."""
    if can_update(gradients):
        return gradient_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))


def _is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    groups = optimizer.param_groups
    return isinstance(optimizer, torch.optim.SGD) and not any(x["momentum"] or x["weight_decay"] for x in groups)


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
