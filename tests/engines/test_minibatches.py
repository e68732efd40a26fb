"""Updates of a step: their number, rows that are skipped, and the weights of the likelihood."""

from __future__ import annotations

import pytest
import torch

from tests.engines.roles.workers import ONE_BY_ONE, WHOLE, policy
from tests.training import gradient, learn, local_engine, one_update, rows_to_learn, weights
from verl.config.fields import Choice
from verl.config.rollout import RolloutConfig
from verl.data.packing import BatchPlan, balance
from verl.engines.local import LocalEngine
from verl.monitoring.mismatch_limits import check_mismatch


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


@pytest.mark.parametrize(
    "choices",
    [
        *(
            {"aggregation": Choice(name=name)}
            for name in ("token_mean", "seq_mean_token_mean", "prompt_mean")
        ),
        {"policy_loss": Choice(name="kl_cov", share=0.2)},
    ],
    ids=lambda choices: next(iter(choices.values())).name,
)
def test_uneven_minibatches_are_updates_of_their_own_rows_alone(choices):
    batch = rows_to_learn()
    plan = balance(batch.num_tokens, num_ranks=1, micro_batch_tokens=9, num_minibatches=4)
    parts = [sorted(plan.rows_of_minibatch(i)) for i in range(4)]
    assert [len(rows) for rows in parts] == [2, 2, 1, 1]
    sgd = {"name": "sgd", "lr": 0.01}
    together, alone = (policy(local_engine(optimizer=sgd), **choices) for _ in range(2))
    learn(together, rows_to_learn(), plan)
    for rows in parts:
        learn(alone, batch.select(rows), one_update(list(range(len(rows)))))
    torch.testing.assert_close(weights(together.engine), weights(alone.engine), rtol=1e-5, atol=1e-7)


def test_metrics_of_the_rows_that_are_left_are_named_so():
    batch, rest = rows_to_learn(), [1, 3, 4]
    advantages = batch["advantages"]
    advantages[[0, 2, 5]] = 0
    batch.write("advantages", advantages)
    every = learn(policy(), batch, WHOLE)
    short = learn(policy(skip_zero_advantages=True), batch, WHOLE)
    of_rest = learn(policy(), batch.select(rest), one_update([0, 1, 2]))
    of_update = {"loss", "grad_norm", "lr", "skipped_updates"}
    means = {f"learned/{name}" for name in {*every} - of_update}
    assert {*short} == of_update | means | {"skipped_rows_share"}
    for name in ("entropy", "ratio", "clip_share", "sampler_gap_max"):
        assert short[f"learned/{name}"] == pytest.approx(of_rest[name], rel=1e-5)
    assert check_mismatch(short, RolloutConfig()) and check_mismatch(every, RolloutConfig())


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
