"""The policy over a real engine: its columns, its updates, masked tokens, losses over whole minibatches."""

from __future__ import annotations

import math

import pytest
import torch

from tests.engines.roles.workers import ONE_BY_ONE, WHOLE, policy
from tests.training import gradient, learn, local_engine, one_update, rows_to_learn, weights
from verl.config.fields import Choice
from verl.data.batch import ModelInput, Ragged
from verl.data.packing import BatchPlan


def test_every_update_moves_the_optimizer_once():
    worker = policy(epochs=3)
    learn(worker, rows_to_learn(), BatchPlan([[[[0, 1], [2]]], [[[3], [4, 5]]]]))
    assert {float(state["step"]) for state in worker.engine._optimizer.state.values()} == {6.0}


def test_metrics_are_means_over_sampled_tokens_whatever_the_split():
    whole, parts = learn(policy(), rows_to_learn(), WHOLE), learn(policy(), rows_to_learn(), ONE_BY_ONE)
    assert whole == pytest.approx(parts, rel=1e-5, abs=1e-7)
    batch = rows_to_learn()
    worker = policy()
    batch.update(worker.write(batch, WHOLE))
    ratio = (batch["trainer_logprobs"] - batch["old_logprobs"]).exp()
    assert whole["ratio"] == pytest.approx(float(ratio[batch["mask"]].mean()), rel=1e-5)
    assert 0 < whole["clip_share"] < 1
    assert 0 < whole["entropy"] <= math.log(99)


def test_the_sampler_is_compared_before_the_first_update_moves_the_policy():
    batch, plan = rows_to_learn(), BatchPlan([[[[0, 1, 2, 3, 4, 5]]]])
    worker = policy(local_engine(optimizer={"lr": 0.01}), epochs=3)
    batch.update(worker.write(batch, plan))
    batch.write("rollout_logprobs", batch["trainer_logprobs"])
    assert learn(worker, batch, plan)["kl_sampler"] == pytest.approx(0, abs=1e-9)


def test_what_stands_at_masked_tokens_changes_nothing():
    clean, dirty = rows_to_learn(), rows_to_learn()
    for name, value in (
        ("advantages", torch.nan),
        ("old_logprobs", -torch.inf),
        ("rollout_logprobs", torch.inf),
    ):
        column = dirty[name]
        column[~dirty["mask"]] = value
        dirty.write(name, column)
    workers = [policy(), policy()]
    metrics = [learn(worker, batch, WHOLE) for worker, batch in zip(workers, (clean, dirty), strict=True)]
    assert metrics[0] == metrics[1]
    assert torch.equal(gradient(workers[0].engine), gradient(workers[1].engine))


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_a_row_that_is_masked_as_a_whole_is_as_if_it_were_not_there(aggregation):
    with_it, without = (policy(aggregation=Choice(name=aggregation)) for _ in range(2))
    learn(with_it, rows_to_learn(), WHOLE)
    learn(without, rows_to_learn().select([0, 1, 2, 3, 5]), one_update([0, 1, 2, 3, 4]))
    torch.testing.assert_close(gradient(with_it.engine), gradient(without.engine), rtol=1e-4, atol=1e-7)


def test_rows_with_nothing_to_learn_leave_the_policy_and_no_nan():
    batch, worker = rows_to_learn(), policy()
    batch.write("mask", torch.zeros_like(batch["mask"]))
    before = weights(worker.engine)
    metrics = learn(worker, batch, ONE_BY_ONE)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == 0
    assert torch.equal(weights(worker.engine), before)


def test_an_answer_of_one_token_is_learned():
    worker, batch = policy(policy_loss=Choice(name="policy_gradient")), rows_to_learn().select([1])
    assert batch.response_lengths.tolist() == [1]
    batch.write("advantages", torch.ones(1, 1))
    first, second = (learn(worker, batch, one_update([0])) for _ in range(2))
    assert second["loss"] < first["loss"]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.0])
def test_logprobs_are_those_of_the_model_at_the_temperature_of_the_sampler(temperature):
    worker, batch = policy(temperature=temperature), rows_to_learn()
    batch.update(worker.write(batch, ONE_BY_ONE))
    prompt, response = batch.ragged("prompt_ids").row(3), batch.ragged("response_ids").row(3)
    with torch.no_grad():
        logits = worker.model.transformer(torch.cat([prompt, response])[None]).logits[0]
    own = torch.log_softmax(logits / (temperature or 1.0), -1)[len(prompt) - 1 : -1].gather(
        1, response[:, None]
    )[:, 0]
    torch.testing.assert_close(batch.ragged("trainer_logprobs").row(3), own, rtol=1e-5, atol=1e-5)


def test_a_negative_entropy_weight_lowers_the_entropy():
    batch, worker = rows_to_learn(), policy(entropy_coef=-1.0, policy_loss=Choice(name="policy_gradient"))
    batch.write("advantages", torch.zeros(batch["mask"].shape))
    entropies = [learn(worker, batch, WHOLE)["entropy"] for _ in range(3)]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < entropies[0] - 0.01


def spread_loss(logprobs, advantages, minibatch_mask):
    """A loss that exists only over the whole minibatch: each token's distance from the mean logprob of all of
    them.
    """
    mean = (logprobs * minibatch_mask).sum() / minibatch_mask.sum()
    return advantages * (logprobs - mean).square(), {"distance": (logprobs - mean).detach().abs()}


SPREAD = Choice(name=f"{__name__}:spread_loss")


def test_a_loss_over_the_whole_minibatch_has_the_same_gradient_for_every_split():
    workers = [policy(policy_loss=SPREAD, entropy_coef=0.01) for _ in range(3)]
    splits = [WHOLE, ONE_BY_ONE, one_update([5, 0], [3], [2, 1, 4])]
    metrics = [learn(worker, rows_to_learn(), split) for worker, split in zip(workers, splits, strict=True)]
    whole = gradient(workers[0].engine)
    for worker, of_parts in zip(workers[1:], metrics[1:], strict=True):
        assert float((gradient(worker.engine) - whole).norm() / whole.norm()) < 2e-6
        assert of_parts == pytest.approx(metrics[0], rel=1e-5, abs=1e-7)


def test_its_gradient_is_that_of_the_loss_itself():
    worker, batch = policy(policy_loss=SPREAD), rows_to_learn()
    learn(worker, batch, ONE_BY_ONE)
    other = policy(policy_loss=SPREAD)
    inputs = ModelInput.from_batch(batch, packed=True, device=torch.device("cpu"))
    with other.model.forward_mode():
        logprobs = Ragged(
            other.model.token_logprobs(inputs, temperature=1.0, chunk=100)[0], inputs.response_lengths
        ).padded()
        loss, _ = spread_loss(logprobs, batch["advantages"], batch["mask"])
        (loss * batch["mask"]).sum().div(batch["mask"].sum()).backward()
    torch.testing.assert_close(gradient(worker.engine), gradient(other.engine), rtol=1e-4, atol=1e-7)


def test_the_statistics_are_those_of_each_minibatch_and_of_the_policy_as_it_is():
    worker, batch = (
        policy(local_engine(optimizer={"lr": 0.01}), policy_loss=SPREAD, epochs=2),
        rows_to_learn(),
    )
    learn(worker, batch, BatchPlan([[[[0, 1]]], [[[2, 3, 4], [5]]]]))
    one, two = (policy(local_engine(optimizer={"lr": 0.01}), policy_loss=SPREAD) for _ in range(2))
    for _ in range(2):
        for rows in ([0, 1], [2, 3, 4, 5]):
            learn(one, rows_to_learn().select(rows), one_update(list(range(len(rows)))))
    assert float((weights(worker.engine) - weights(one.engine)).norm()) < 1e-3 * float(
        (weights(one.engine) - weights(two.engine)).norm()
    )


def test_an_update_that_is_not_finite_says_nothing_about_the_whole_minibatch():
    batch, worker = rows_to_learn(), policy(policy_loss=SPREAD)
    advantages, mask = batch["advantages"], batch["mask"]
    batch.write("advantages", torch.full_like(advantages, torch.nan))
    assert learn(worker, batch, ONE_BY_ONE) == {"skipped_updates": 1.0}
    batch.write("advantages", torch.where(mask, advantages, 0))
    assert learn(worker, batch, ONE_BY_ONE)["distance"] > 0


def test_the_sum_of_squared_probabilities_is_that_of_the_whole_distribution():
    batch = rows_to_learn()
    worker = policy(advantage=Choice(name="optimal_token_baseline"))
    batch.update(worker.write(batch, ONE_BY_ONE))
    prompt, response = batch.ragged("prompt_ids").row(0), batch.ragged("response_ids").row(0)
    with torch.no_grad():
        logits = worker.model.transformer(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(
        batch.ragged("sum_squared_probs").row(0), logits.softmax(-1).square().sum(-1), rtol=1e-5, atol=1e-6
    )
