"""The roles over real engines: what they write, how many updates they run, and that masked tokens do not count."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import tiny_transformer
from tests.training import gradient, local_engine, one_update, rows_to_learn, weights
from verl.algorithms.compose import Algorithm
from verl.data.packing import Plan
from verl.engines.local import LocalEngine
from verl.engines.models import value_model
from verl.engines.workers import CriticWorker, PolicyWorker, ReferenceWorker
from verl.settings import AlgorithmConfig, Choice, CriticConfig, OptimizerConfig

WHOLE = one_update([0, 1, 2, 3, 4, 5])
ONE_BY_ONE = one_update(*[[row] for row in range(6)])


def policy(engine=None, *, epochs=1, temperature=1.0, **config):
    return PolicyWorker(
        engine or local_engine(), Algorithm.bind(AlgorithmConfig(**config)), temperature=temperature, epochs=epochs, chunk=100
    )


def critic(*, epochs=1, vf_coef=1.0, loss="value_mse"):
    config = CriticConfig(optimizer=OptimizerConfig(lr=1e-2))
    engine = LocalEngine(value_model(tiny_transformer(), "fp32"), config, device=torch.device("cpu"), total_updates=10)
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
    policy(engine, epochs=2).update(rows_to_learn(), Plan([[[[0, 1], [2]]], [[[3]]], [[[4], [5]]]]))
    assert engine.updates == 2 * [[[0, 1], [2]], [[3]], [[4], [5]]]


def test_every_update_moves_the_optimizer_once():
    worker = policy(epochs=3)
    worker.update(rows_to_learn(), Plan([[[[0, 1], [2]]], [[[3], [4, 5]]]]))
    assert {float(state["step"]) for state in worker.engine._optimizer.state.values()} == {6.0}


def test_metrics_are_means_over_sampled_tokens_whatever_the_split():
    whole, parts = policy().update(rows_to_learn(), WHOLE), policy().update(rows_to_learn(), ONE_BY_ONE)
    assert whole == pytest.approx(parts, rel=1e-5, abs=1e-7)
    batch = rows_to_learn()
    worker = policy()
    worker.write(batch, WHOLE)
    ratio = (batch["trainer_logprobs"] - batch["old_logprobs"]).exp()
    assert whole["ratio"] == pytest.approx(float(ratio[batch["mask"]].mean()), rel=1e-5)
    assert 0 < whole["clip_share"] < 1
    assert 0 < whole["entropy"] <= math.log(99)


def test_the_sampler_is_compared_before_the_first_update_moves_the_policy():
    batch, plan = rows_to_learn(), Plan([[[[0, 1, 2, 3, 4, 5]]]])
    worker = policy(local_engine(optimizer={"lr": 0.01}), epochs=3)
    worker.write(batch, plan)
    batch.write("rollout_logprobs", batch["trainer_logprobs"])
    assert worker.update(batch, plan)["kl_sampler"] == pytest.approx(0, abs=1e-9)


def test_what_stands_at_masked_tokens_changes_nothing():
    clean, dirty = rows_to_learn(), rows_to_learn()
    for name, value in (("advantages", torch.nan), ("old_logprobs", -torch.inf), ("rollout_logprobs", torch.inf)):
        column = dirty[name]
        column[~dirty["mask"]] = value
        dirty.write(name, column)
    workers = [policy(), policy()]
    metrics = [worker.update(batch, WHOLE) for worker, batch in zip(workers, (clean, dirty), strict=True)]
    assert metrics[0] == metrics[1]
    assert torch.equal(gradient(workers[0].engine), gradient(workers[1].engine))


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_a_row_that_is_masked_as_a_whole_is_as_if_it_were_not_there(aggregation):
    with_it, without = (policy(aggregation=Choice(name=aggregation)) for _ in range(2))
    with_it.update(rows_to_learn(), WHOLE)
    without.update(rows_to_learn().select([0, 1, 2, 3, 5]), one_update([0, 1, 2, 3, 4]))
    torch.testing.assert_close(gradient(with_it.engine), gradient(without.engine), rtol=1e-4, atol=1e-7)


def test_rows_with_nothing_to_learn_leave_the_policy_and_no_nan():
    batch, worker = rows_to_learn(), policy()
    batch.write("mask", torch.zeros_like(batch["mask"]))
    before = weights(worker.engine)
    metrics = worker.update(batch, ONE_BY_ONE)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == 0
    assert torch.equal(weights(worker.engine), before)


def test_an_answer_of_one_token_is_learned():
    worker, batch = policy(policy_loss=Choice(name="policy_gradient")), rows_to_learn().select([1])
    assert batch.response_lengths.tolist() == [1]
    batch.write("advantages", torch.ones(1, 1))
    first, second = (worker.update(batch, one_update([0])) for _ in range(2))
    assert second["loss"] < first["loss"]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.0])
def test_logprobs_are_those_of_the_model_at_the_temperature_of_the_sampler(temperature):
    worker, batch = policy(temperature=temperature), rows_to_learn()
    worker.write(batch, ONE_BY_ONE)
    prompt, response = batch.ragged("prompt_ids").row(3), batch.ragged("response_ids").row(3)
    with torch.no_grad():
        logits = worker.model.transformer(torch.cat([prompt, response])[None]).logits[0]
    own = torch.log_softmax(logits / (temperature or 1.0), -1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
    torch.testing.assert_close(batch.ragged("trainer_logprobs").row(3), own, rtol=1e-5, atol=1e-5)


def test_the_reference_writes_what_the_policy_wrote_at_the_start():
    batch, worker = rows_to_learn(), policy()
    ReferenceWorker(local_engine(), temperature=1.0, chunk=100).write(batch, ONE_BY_ONE)
    worker.write(batch, WHOLE)
    torch.testing.assert_close(batch["ref_logprobs"], batch["trainer_logprobs"], rtol=1e-5, atol=1e-5)


def test_a_negative_entropy_weight_lowers_the_entropy():
    batch, worker = rows_to_learn(), policy(entropy_coef=-1.0, policy_loss=Choice(name="policy_gradient"))
    batch.write("advantages", torch.zeros(batch["mask"].shape))
    entropies = [worker.update(batch, WHOLE)["entropy"] for _ in range(3)]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < entropies[0] - 0.01


def test_the_critic_begins_with_no_opinion_and_learns_the_returns():
    batch, worker = rows_to_learn(), critic(vf_coef=0.5)
    worker.write(batch, ONE_BY_ONE)
    assert not batch["values"].any()
    first = worker.update(batch, WHOLE)
    assert first["critic/loss"] == pytest.approx(0.25 * float(batch["returns"][batch["mask"]].square().mean()), rel=1e-5)
    losses = [worker.update(batch, WHOLE)["critic/loss"] for _ in range(20)]
    assert losses[-1] < 0.7 * first["critic/loss"]
