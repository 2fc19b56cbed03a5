"""Dropout masks: a function of seed, step, layer and lane."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from job.kernels.build import load_library, unavailable_reason
from job.kernels.ops import supports_dtype
from job.nn.dropout import drop, dropout_keys


def make_dropout(
    probability: float, seed: int, step: int, lanes: range, is_locked: bool = False
) -> Callable[[Tensor, int], Tensor]:
    return lambda x, layer: drop(x, probability, dropout_keys(seed, step, layer, lanes), is_locked)


def test_dropout_mask_of_a_lane_does_not_depend_on_other_lanes() -> None:
    x = torch.ones(6, 10, 33)
    whole = make_dropout(0.4, 3, 7, range(10))(x, 1)
    parts = [make_dropout(0.4, 3, 7, lanes)(x[:, lanes.start : lanes.stop], 1) for lanes in (range(3), range(3, 10))]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("is_locked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 1025), (5, 3, 33), (7, 40, 128), (3, 2, 300)])
@pytest.mark.parametrize("probability", [1e-5, 0.1, 0.3, 0.65, 0.99999])
def test_dropout_of_kernel_and_torch_have_equal_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_locked: bool, shape: tuple[int, ...], probability: float
) -> None:
    if not supports_dtype(dtype):
        pytest.skip(f"no kernel for {dtype}")
    generator = torch.Generator().manual_seed(0)
    x, grad_output = torch.randn(2, *shape, generator=generator).to(dtype)
    x.requires_grad_()
    dropout = make_dropout(probability, 3, 7, range(shape[1]), is_locked)
    results = []
    for _ in range(2):
        y = dropout(x, 1)
        assert y.dtype == dtype
        results.append([y.detach(), *torch.autograd.grad(y, x, grad_output)])
        monkeypatch.setattr("job.nn.dropout.can_use_dropout_kernel", lambda x: False)
    assert torch.equal(torch.stack(results[0]), torch.stack(results[1]))


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (3, 7), (2**63 - 1, 10**9), (12345678901, 99)])
@pytest.mark.parametrize("lanes", [range(1), range(3, 3), range(95, 112), range(10**6 - 5, 10**6 + 4), range(8)])
def test_dropout_keys_are_blake2b_hashes_with_and_without_kernel(
    monkeypatch: pytest.MonkeyPatch, has_kernel: bool, seed: int, step: int, lanes: range
) -> None:
    """As in every version, so that a resumed run has the same masks."""
    if not has_kernel:
        monkeypatch.setattr("job.kernels.ops.load_library", lambda: None)
    elif load_library() is None:
        pytest.skip(f"no kernel: {unavailable_reason()}")
    for layer in range(3):
        texts = [f"{seed} {step} {layer} {lane}".encode() for lane in lanes]
        digests = [hashlib.blake2b(text, digest_size=4).digest() for text in texts]
        computed = dropout_keys(seed, step, layer, lanes)
        assert computed.dtype == torch.int32
        assert computed.shape == (len(lanes),)
        assert computed.tolist() == [int.from_bytes(digest, "little", signed=True) for digest in digests]


def test_dropout_mask_differs_between_seeds_steps_lanes_and_layers() -> None:
    x = torch.ones(6, 10, 33)
    dropout = make_dropout(0.4, 3, 7, range(10))
    others = [(4, 7, range(10)), (3, 8, range(10)), (3, 7, range(1, 11))]
    assert not any(torch.equal(make_dropout(0.4, *other)(x, 1), dropout(x, 1)) for other in others)
    assert not torch.equal(dropout(x, 0), dropout(x, 1))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_mask_has_configured_probability_and_no_correlation(probability: float) -> None:
    x = torch.ones(100, 50, 40)
    kept = (make_dropout(probability, 0, 0, range(50))(x, 0) > 0).float()
    assert abs(kept.mean() - (1 - probability)) < 0.004  # five standard deviations
    for axis in range(3):  # adjacent elements
        a, b = (kept.narrow(axis, start, kept.shape[axis] - 1) for start in (0, 1))
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.015


def test_locked_dropout_has_the_mask_of_the_first_step_at_all_steps() -> None:
    x = torch.randn(6, 10, 33, generator=torch.Generator().manual_seed(0))
    locked, each_step = (make_dropout(0.4, 3, 7, range(10), is_locked)(x, 1) for is_locked in (True, False))
    scales_BH = make_dropout(0.4, 3, 7, range(10))(torch.ones(6, 10, 33), 1)[0]
    torch.testing.assert_close(locked, x * scales_BH)
    assert torch.equal(locked[0], each_step[0])
    assert not torch.equal(locked[1:], each_step[1:])
