"""The teacher writes its logprobs and top tokens; a policy learns from them."""

from __future__ import annotations

import pytest
import torch

from tests.engines.roles.workers import ONE_BY_ONE, WHOLE, policy
from tests.training import learn, local_engine, one_update, rows_to_learn
from verl.config.fields import Choice
from verl.engines.roles.teacher import TeacherWorker


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
