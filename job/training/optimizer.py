"""The update of the weights: optimizer, schedule and clip."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from job.config.schema import OptimizerConfig


def build_optimizer(optimizer_config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """torch's optimizer of that name over all weights."""
    weights = list(model.parameters())
    if optimizer_config.name == "sgd":
        return torch.optim.SGD(
            weights, optimizer_config.learning_rate, weight_decay=optimizer_config.weight_decay, fused=True
        )
    return torch.optim.AdamW(
        weights, optimizer_config.learning_rate, weight_decay=optimizer_config.weight_decay, fused=True
    )


def learning_rate_at(optimizer_config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of the update number ``step`` (from 0): a linear warm-up, then constant or cosine."""
    if step < optimizer_config.warmup_steps:
        return optimizer_config.learning_rate * (step + 1) / optimizer_config.warmup_steps
    if optimizer_config.schedule == "constant":
        return optimizer_config.learning_rate
    done = (step - optimizer_config.warmup_steps) / max(1, total_steps - optimizer_config.warmup_steps)
    return optimizer_config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@torch.no_grad()
def clip_gradient(weights: Iterable[Tensor], longest: float) -> None:
    """Scales the gradient to norm ``longest`` where it is longer: the d2l book's ``grad_clipping``.

    The norm is over all weights together and, unlike torch's ``clip_grad_norm_``, nothing is
    added to it in the quotient.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in gradients]))
    scale = (longest / norm).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's own tensors as ``key/weight``, such as ``exp_avg/rnn.weight_hh_l0``."""
    return {
        f"{key}/{name}": value
        for name, weight in model.named_parameters()
        for key, value in sorted(optimizer.state.get(weight, {}).items())
        if isinstance(value, Tensor)
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts back what ``state_tensors`` gave."""
    weights = dict(model.named_parameters())
    for place, tensor in tensors.items():
        key, _, name = place.partition("/")
        weight = weights[name]
        # torch keeps a fused optimizer's step counts on the weight's device, all in float32.
        optimizer.state[weight][key] = tensor.to(weight.device)
