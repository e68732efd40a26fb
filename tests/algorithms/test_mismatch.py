"""Rows on which sampler and trainer can be compared."""

from __future__ import annotations

import torch

from verl.algorithms.mismatch import fresh_mask


def test_only_rows_of_the_trained_version_compare_sampler_and_trainer():
    mask = torch.tensor([[True, True, False], [True, True, True], [False, True, False]])
    staleness = torch.tensor([[0, 0, 3], [0, 1, 0], [2, 0, 0]])
    expected = torch.tensor([[True, True, False], [False, False, False], [False, True, False]])
    assert torch.equal(fresh_mask(mask, staleness), expected)
