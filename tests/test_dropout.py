"""Dropout masks: a function of seed, step, layer and lane."""

import pytest
import torch

from job.nn.dropout import Dropout, dropout_keys


def make_dropout(probability, seed, step, lanes):
    return Dropout(probability, dropout_keys(seed, step, 2, lanes))


def test_dropout_mask_of_a_lane_does_not_depend_on_other_lanes():
    x = torch.ones(6, 10, 33)
    whole = make_dropout(0.4, 3, 7, range(10))(x, 1)
    parts = [make_dropout(0.4, 3, 7, lanes)(x[:, lanes.start : lanes.stop], 1) for lanes in (range(3), range(3, 10))]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_dropout_mask_differs_between_seeds_steps_lanes_and_layers():
    x = torch.ones(6, 10, 33)
    dropout = make_dropout(0.4, 3, 7, range(10))
    others = [(4, 7, range(10)), (3, 8, range(10)), (3, 7, range(1, 11))]
    assert not any(torch.equal(make_dropout(0.4, *other)(x, 1), dropout(x, 1)) for other in others)
    assert not torch.equal(dropout(x, 0), dropout(x, 1))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_mask_has_configured_probability_and_no_correlation(probability):
    x = torch.ones(100, 50, 40)
    kept = (make_dropout(probability, 0, 0, range(50))(x, 0) > 0).float()
    assert abs(kept.mean() - (1 - probability)) < 0.004  # five standard deviations
    for axis in range(3):  # adjacent elements
        a, b = (kept.narrow(axis, start, kept.shape[axis] - 1) for start in (0, 1))
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.015
