"""The schedule of the learning rate at its points, by hand."""

from __future__ import annotations

import math

import pytest

from verl.config.roles import OptimizerConfig
from verl.engines.optimizer import lr_factor


def test_the_schedules_go_through_their_points():
    def rates(schedule, updates, **settings):
        config = OptimizerConfig(schedule=schedule, **settings)
        return [lr_factor(update, config, 10) for update in updates]

    assert rates("constant", [0, 1, 2, 3, 99], warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("linear", [0, 5, 10, 20]) == [1.0, 0.5, 0.0, 0.0]
    assert rates("linear", [0, 1, 2, 6, 10], warmup_steps=2, min_lr_ratio=0.5) == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 0.75, 0.5]
    )
    assert rates("cosine", [0, 5, 10], min_lr_ratio=0.1) == pytest.approx([1.0, 0.55, 0.1])
    assert rates("cosine", [2.5]) == pytest.approx([(1 + math.sqrt(0.5)) / 2])
