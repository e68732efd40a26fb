"""The process reward model learns which answers were right."""

from __future__ import annotations

import math

import pytest
import torch

from tests.engines.roles.workers import ONE_BY_ONE
from tests.training import learn, local_engine, rows_to_learn
from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.fields import Choice
from verl.engines.roles.process_reward import ProcessRewardWorker


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
