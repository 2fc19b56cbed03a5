"""Dropout whose masks are a function of the seed, step, layer and global lane number only.

Masks from a library's generator depend on the order of the draws, and so on which lanes share a worker. Here each
random number is a hash of its own coordinates (a counter-based generator; Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", 2011), so it is the same on every device and worker.

Axes: T steps of a window, B lanes, H hidden units, P pairs of hidden units.
"""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from job.kernels.ops import can_use_dropout_kernel, dropout_threshold, fused_dropout, write_dropout_keys


def drop(x_TBH: Tensor, probability: float, keys_B: Tensor, is_locked: bool = False) -> Tensor:
    """Returns ``x`` with elements zeroed at random and the others scaled by ``1 / (1 - probability)``.

    Args:
        x_TBH: any floating-point dtype
        probability: the probability that an element is zeroed, above 0, rounded to a multiple of 2^-16
        keys_B: the hash keys of the lanes, from ``dropout_keys``
        is_locked: all steps have the mask of the first one (variational dropout; Gal and Ghahramani, 2016)
    """
    if can_use_dropout_kernel(x_TBH):
        return fused_dropout(x_TBH, probability, keys_B, is_locked)
    is_zero = _mask(x_TBH[:1] if is_locked else x_TBH, probability, keys_B)
    return (x_TBH / (1 - probability)).masked_fill(is_zero, 0)


def _mask(x_TBH: Tensor, probability: float, keys_B: Tensor) -> Tensor:
    """True for elements to zero: (T, B, H) bool."""
    steps, _, units = x_TBH.shape
    pairs = (units + 1) // 2
    counters_T1P = torch.arange(steps * pairs, dtype=torch.int32, device=x_TBH.device).view(steps, 1, pairs)
    hashes_TBP = _mix(counters_T1P * _as_int32(0x9E3779B9) ^ keys_B[:, None])
    uniform_TBH = hashes_TBP.view(torch.int16)[..., :units]  # two 16-bit draws from each 32-bit hash
    return uniform_TBH < dropout_threshold(probability)


def dropout_keys(seed: int, step: int, layer: int, lanes: range) -> Tensor:
    """Returns the hash keys of the dropout masks of one step and layer.

    Args:
        seed: ``run.seed``
        step: number of the step
        layer: number of the layer, or of any other place that has masks of its own
        lanes: global lane numbers

    Returns:
        Keys (B), int32.
    """
    keys_B = torch.empty(len(lanes), dtype=torch.int32)
    if not write_dropout_keys(seed, step, layer, lanes.start, keys_B):
        texts = (b"%d %d %d %d" % (seed, step, layer, lane) for lane in lanes)
        digests = b"".join([blake2b(text, digest_size=4).digest() for text in texts])
        keys_B.copy_(torch.from_numpy(np.frombuffer(digests, "<i4").astype(np.int32)))
    return keys_B


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
