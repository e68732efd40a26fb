"""Updates of a step: their number, rows that are skipped, and the weights of the likelihood."""

from __future__ import annotations

import pytest
import torch

from tests.engines.roles.workers import ONE_BY_ONE, WHOLE, policy
from tests.training import gradient, learn, local_engine, rows_to_learn, weights
from verl.data.packing import BatchPlan
from verl.engines.local import LocalEngine


class CountingEngine(LocalEngine):
    """Notes the rows of every update instead of making it."""

    def update(self, batch, micro_batches, objective):
        self.updates = [*getattr(self, "updates", []), micro_batches]
        return {"loss": 1.0, "skipped_updates": 0.0}


def test_epochs_times_minibatches_updates_are_made_each_epoch_over_all_rows():
    engine = local_engine()
    engine.__class__ = CountingEngine
    learn(policy(engine, epochs=2), rows_to_learn(), BatchPlan([[[[0, 1], [2]]], [[[3]]], [[[4], [5]]]]))
    assert engine.updates == 2 * [[[0, 1], [2]], [[3]], [[4], [5]]]


def test_skipped_rows_change_neither_gradient_nor_denominator():
    batch = rows_to_learn()
    advantages = batch["advantages"]
    advantages[[0, 2, 5]] = 0
    batch.write("advantages", advantages)
    full, short = policy(), policy(skip_zero_advantages=True)
    metrics = [learn(worker, batch, ONE_BY_ONE) for worker in (full, short)]
    torch.testing.assert_close(gradient(short.engine), gradient(full.engine), rtol=1e-5, atol=1e-8)
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"]) and metrics[1]["skipped_rows_share"] == 0.5


def test_a_minibatch_of_rows_to_skip_still_moves_the_optimizer_as_a_gradient_of_zero():
    batch = rows_to_learn()
    full, short = policy(), policy(skip_zero_advantages=True)
    for worker in (full, short):
        learn(worker, batch, WHOLE)
    batch.write("advantages", torch.zeros(batch["mask"].shape))
    for worker in (full, short):
        learn(worker, batch, WHOLE)
    torch.testing.assert_close(weights(short.engine), weights(full.engine), rtol=1e-6, atol=1e-8)


def test_likelihood_counts_the_good_answers_of_the_whole_minibatch_alone():
    batch = rows_to_learn()
    batch.write("rewards", torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0, 0.0]))
    batch.write("advantages", torch.zeros(batch["mask"].shape))
    whole, parts = (policy(likelihood_coef=0.1) for _ in range(2))
    metrics = learn(whole, batch, WHOLE)
    learn(parts, batch, ONE_BY_ONE)
    torch.testing.assert_close(gradient(parts.engine), gradient(whole.engine), rtol=1e-4, atol=1e-8)
    own = policy()
    batch.update(own.write(batch, WHOLE))
    good = batch["mask"] & (batch["rewards"] > 0)[:, None]
    assert metrics["loss"] == pytest.approx(-0.1 * float(batch["trainer_logprobs"][good].mean()), rel=1e-5)
