"""The roles over real engines: what they write, how many updates they run, and that masked tokens do not
count.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import tiny_transformer
from tests.training import gradient, learn, local_engine, one_update, rows_to_learn, weights
from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.fields import Choice
from verl.config.roles import CriticConfig, OptimizerConfig
from verl.data.batch import ModelInput, Ragged
from verl.data.packing import BatchPlan
from verl.engines.hf.pretrained import value_model
from verl.engines.local import LocalEngine
from verl.engines.roles.critic import CriticWorker
from verl.engines.roles.policy import PolicyWorker
from verl.engines.roles.process_reward import ProcessRewardWorker
from verl.engines.roles.reference import ReferenceWorker
from verl.engines.roles.teacher import TeacherWorker

WHOLE = one_update([0, 1, 2, 3, 4, 5])
ONE_BY_ONE = one_update(*[[row] for row in range(6)])


def policy(engine=None, *, epochs=1, temperature=1.0, **config):
    return PolicyWorker(
        engine or local_engine(),
        Algorithm.bind(AlgorithmConfig(**config)),
        temperature=temperature,
        epochs=epochs,
        chunk=100,
    )


def critic(*, epochs=1, vf_coef=1.0, loss="value_mse"):
    config = CriticConfig(optimizer=OptimizerConfig(lr=1e-2))
    engine = LocalEngine(
        value_model(tiny_transformer(), "fp32"), config, device=torch.device("cpu"), total_updates=10
    )
    algorithm = Algorithm.bind(AlgorithmConfig(advantage=Choice(name="gae"), value_loss=Choice(name=loss)))
    return CriticWorker(engine, algorithm, vf_coef=vf_coef, epochs=epochs)


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


def test_the_reference_writes_what_the_policy_wrote_at_the_start():
    batch, worker = rows_to_learn(), policy()
    batch.update(ReferenceWorker(local_engine(), temperature=1.0, chunk=100).write(batch, ONE_BY_ONE))
    batch.update(worker.write(batch, WHOLE))
    torch.testing.assert_close(batch["ref_logprobs"], batch["trainer_logprobs"], rtol=1e-5, atol=1e-5)


def test_a_negative_entropy_weight_lowers_the_entropy():
    batch, worker = rows_to_learn(), policy(entropy_coef=-1.0, policy_loss=Choice(name="policy_gradient"))
    batch.write("advantages", torch.zeros(batch["mask"].shape))
    entropies = [learn(worker, batch, WHOLE)["entropy"] for _ in range(3)]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < entropies[0] - 0.01


def test_the_critic_begins_with_no_opinion_and_learns_the_returns():
    batch, worker = rows_to_learn(), critic(vf_coef=0.5)
    batch.update(worker.write(batch, ONE_BY_ONE))
    assert not batch["values"].any()
    first = learn(worker, batch, WHOLE)
    assert first["critic/loss"] == pytest.approx(
        0.25 * float(batch["returns"][batch["mask"]].square().mean()), rel=1e-5
    )
    losses = [learn(worker, batch, WHOLE)["critic/loss"] for _ in range(20)]
    assert losses[-1] < 0.7 * first["critic/loss"]


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


def test_the_teacher_writes_its_most_likely_tokens_and_what_it_thinks_of_the_sampled_ones():
    batch, model = rows_to_learn(), local_engine(seed=1)
    batch.update(TeacherWorker(model, temperature=1.0, chunk=3, top_k=4).write(batch, ONE_BY_ONE))
    prompt, response = batch.ragged("prompt_ids").row(3), batch.ragged("response_ids").row(3)
    with torch.no_grad():
        logits = model.model.transformer(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    top, ids = logits.log_softmax(-1).topk(4, -1)
    torch.testing.assert_close(batch.ragged("teacher_top_logprobs").row(3), top, rtol=1e-5, atol=1e-5)
    assert torch.equal(batch.ragged("teacher_top_ids").row(3), ids)
    own = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
    torch.testing.assert_close(batch.ragged("teacher_logprobs").row(3), own, rtol=1e-5, atol=1e-5)


def test_a_rank_without_rows_writes_columns_of_none():
    batch, nothing = rows_to_learn().select([]), one_update([])
    worker = policy(advantage=Choice(name="optimal_token_baseline"))
    for writer in (worker, TeacherWorker(local_engine(), temperature=1.0, chunk=100, top_k=3)):
        written = writer.write(batch, nothing)
        assert written.num_rows == 0 and len(written.names) in (2, 3)


def test_a_policy_that_is_its_own_teacher_has_nothing_to_learn_and_one_that_is_not_comes_nearer():
    loss = Choice(name="forward_kl_topk")
    for seed, expected in ((0, pytest.approx(0, abs=1e-6)), (1, pytest.approx(1, abs=1))):
        batch, worker = rows_to_learn(), policy(policy_loss=loss)
        batch.update(
            TeacherWorker(local_engine(seed=seed), temperature=1.0, chunk=100, top_k=99).write(batch, WHOLE)
        )
        losses = [learn(worker, batch, ONE_BY_ONE)["loss"] for _ in range(5)]
        assert losses[0] == expected and losses[-1] <= losses[0] + 1e-4
    assert losses[-1] < 0.9 * losses[0]


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


def test_the_process_reward_model_learns_which_answers_were_right():
    algorithm = Algorithm.bind(
        AlgorithmConfig(
            advantage=Choice(name="prime"), value_loss=Choice(name="outcome_cross_entropy", beta=1.0)
        )
    )
    worker, batch = (
        ProcessRewardWorker(local_engine(), algorithm, temperature=1.0, epochs=1, chunk=100),
        rows_to_learn(),
    )
    batch.write("rewards", torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
    batch.update(worker.write(batch, ONE_BY_ONE))
    batch.write("ref_logprobs", batch["prm_logprobs"])
    losses = [learn(worker, batch, ONE_BY_ONE)["critic/loss"] for _ in range(10)]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # like the reference, it knows nothing yet
    assert losses[-1] < 0.7 * losses[0]
