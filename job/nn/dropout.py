"""Dropout whose masks belong to lanes: a function of seed, step, layer and global lane alone.

A library's generator hands out numbers in the order in which they are asked for, so its masks
depend on which lanes share a worker. Here each number is a hash of its own address (a
counter-based generator, Salmon et al. 2011), the same on every device and worker.

Axes: T steps of a window, B lanes, H hidden units, L layers.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """The masks of one step for the lanes at hand, from the ``keys`` of their layers: (L, B)."""

    probability: float
    dropout_keys_LB: Tensor

    def __call__(self, x_TBH: Tensor, layer: int) -> Tensor:
        """``x`` with elements zeroed and the rest scaled to keep the mean; (T, B, H) as ``x``."""
        if not self.probability:
            return x_TBH
        return (x_TBH / (1 - self.probability)).masked_fill(self.mask(x_TBH, layer), 0)

    def mask(self, like_TBH: Tensor, layer: int) -> Tensor:
        """True where an element is dropped: (T, B, H) bool. The odds are exact to 2^-16."""
        steps, _, units = like_TBH.shape
        pairs = (units + 1) // 2
        counters_T1P = torch.arange(steps * pairs, dtype=torch.int32, device=like_TBH.device).view(steps, 1, pairs)
        # Two 16-bit draws from each 32-bit hash.
        bits = _mixed(counters_T1P * _signed(0x9E3779B9) ^ self.dropout_keys_LB[layer, :, None]).view(torch.int16)
        threshold = round(self.probability * 65536) - 32768
        return bits[..., :units] < threshold


def dropout_keys(seed: int, step: int, layers: int, lanes: range) -> Tensor:
    """What tells a step's masks apart: (L, B) int32."""
    found = [[_key(seed, step, layer, lane) for lane in lanes] for layer in range(layers)]
    return torch.tensor(found, dtype=torch.int32).view(layers, len(lanes))


def _key(seed: int, step: int, layer: int, lane: int) -> int:
    digest = hashlib.blake2b(b"%d %d %d %d" % (seed, step, layer, lane), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mixed(x: Tensor) -> Tensor:
    """The 32-bit finalizer "lowbias32" (C. Wellons, 2018), on wrapping int32."""
    x = (x ^ _shifted(x, 16)).mul_(_signed(0x7FEB352D))
    x = x.bitwise_xor_(_shifted(x, 15)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right, which int32 lacks."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
