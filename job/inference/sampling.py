"""Random tokens: their probabilities by temperature, top-k and top-p, and a random generator for each sample.

Axes: B lanes, V tokens of the vocabulary.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from job.config.inference import GenerateConfig


def sample_generator(seed: int, number: int) -> torch.Generator:
    """Returns the random generator of a sample, a function of the seed and the sample's number alone."""
    if number:
        digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") >> 1
    return torch.Generator().manual_seed(seed)


def sample_tokens(logits_BV: Tensor, generate_config: GenerateConfig, generators: Sequence[torch.Generator]) -> Tensor:
    """Returns a random token of each lane by its generator, (B,)."""
    probabilities_BV = token_probabilities(logits_BV.cpu(), generate_config)  # as the generators
    return draw_tokens(probabilities_BV, generators).to(logits_BV.device)


def draw_tokens(probabilities_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Returns a random token of each lane by its generator, (B,), of probabilities up to a factor."""
    # The tokens that torch.multinomial draws from each row, without its checks, which take most of its time.
    draws_BV = torch.empty_like(probabilities_BV)
    for draws_V, generator in zip(draws_BV, generators, strict=True):
        draws_V.exponential_(generator=generator)
    return (probabilities_BV / draws_BV).argmax(1)


def token_probabilities(logits_BV: Tensor, generate_config: GenerateConfig) -> Tensor:
    """Returns probabilities, up to a factor, in float64.

    ``top_k`` keeps the k most likely tokens; ``top_p`` then keeps the fewest of the most likely ones whose
    probabilities sum to p or more (nucleus sampling, Holtzman et al. 2020). Of equal ones those of lower ids are kept.

    Args:
        logits_BV: logits
        generate_config: its temperature (above 0), ``top_k`` and ``top_p``
    """
    # Shifted to a maximum of 0 and in float64, so that no temperature is too low.
    shifted_BV = (logits_BV - logits_BV.amax(1, keepdim=True)).double()
    probabilities_BV = torch.softmax(shifted_BV / generate_config.temperature, 1)
    top_k, top_p = generate_config.top_k, generate_config.top_p
    if not top_k and top_p == 1:
        return probabilities_BV
    sorted_BV, order_BV = probabilities_BV.sort(dim=1, descending=True, stable=True)
    if top_k:
        sorted_BV[:, top_k:] = 0
    if top_p < 1:
        sorted_BV /= sorted_BV.sum(1, keepdim=True)
        before_BV = sorted_BV.cumsum(1) - sorted_BV  # of those that are more likely
        sorted_BV = sorted_BV.where(before_BV < top_p, 0)
    return torch.zeros_like(sorted_BV).scatter(1, order_BV, sorted_BV)
