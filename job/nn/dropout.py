"""Dropout whose masks are a function of the seed, step, layer and global lane number only.

Masks from a library's generator depend on the order of the draws, and so on which lanes share a worker. Here each
random number is a hash of its own coordinates (a counter-based generator; Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", 2011), so it is the same on every device and worker.

Axes: T steps of a window, B lanes, H hidden units, P pairs of hidden units, L layers.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from job.kernels.ops import write_dropout_keys


@dataclass(frozen=True)
class Dropout:
    """Dropout in one step, for the lanes of ``keys_LB``.

    Args:
        probability: the probability that an element is zeroed, rounded to a multiple of 2^-16
        keys_LB: the hash keys of each layer and lane, from ``dropout_keys``
    """

    probability: float
    keys_LB: Tensor

    def __call__(self, x_TBH: Tensor, layer: int) -> Tensor:
        """Returns ``x`` with elements zeroed at random and the others scaled by ``1 / (1 - probability)``."""
        if not self.probability:
            return x_TBH
        return (x_TBH / (1 - self.probability)).masked_fill(self._mask(x_TBH, layer), 0)

    def _mask(self, x_TBH: Tensor, layer: int) -> Tensor:
        """True for elements to zero: (T, B, H) bool."""
        steps, _, units = x_TBH.shape
        pairs = (units + 1) // 2
        counters_T1P = torch.arange(steps * pairs, dtype=torch.int32, device=x_TBH.device).view(steps, 1, pairs)
        hashes_TBP = _mix(counters_T1P * _as_int32(0x9E3779B9) ^ self.keys_LB[layer, :, None])
        uniform_TBH = hashes_TBP.view(torch.int16)[..., :units]  # two 16-bit draws from each 32-bit hash
        return uniform_TBH < round(self.probability * 65536) - 32768


def dropout_keys(seed: int, step: int, num_layers: int, lanes: range) -> Tensor:
    """Returns the hash keys of one step's dropout masks.

    Args:
        seed: ``run.seed``
        step: number of the step
        num_layers: number of layers with dropout
        lanes: global lane numbers

    Returns:
        Keys (L, B), int32.
    """
    keys_LB = torch.empty(num_layers, len(lanes), dtype=torch.int32)
    for layer, keys_B in enumerate(keys_LB):
        if not write_dropout_keys(seed, step, layer, lanes.start, keys_B):
            texts = (b"%d %d %d %d" % (seed, step, layer, lane) for lane in lanes)
            digests = b"".join([blake2b(text, digest_size=4).digest() for text in texts])
            keys_B.copy_(torch.from_numpy(np.frombuffer(digests, "<i4").astype(np.int32)))
    return keys_LB


def _mix(x: Tensor) -> Tensor:
    """The 32-bit hash function "lowbias32" (Chris Wellons, 2018), in wrapping int32 arithmetic."""
    x = (x ^ _shift_right(x, 16)).mul_(_as_int32(0x7FEB352D))
    x = x.bitwise_xor_(_shift_right(x, 15)).mul_(_as_int32(0x846CA68B))
    return x.bitwise_xor_(_shift_right(x, 16))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; int32's own shift is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _as_int32(value: int) -> int:
    """Reinterprets an unsigned 32-bit integer as signed."""
    return value - (1 << 32) if value >= 1 << 31 else value
