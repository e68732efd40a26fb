"""The critic starts at values of 0 and learns the returns."""

from __future__ import annotations

import pytest
import torch

from tests.engines.roles.workers import ONE_BY_ONE, WHOLE
from tests.tiny import tiny_transformer
from tests.training import learn, rows_to_learn
from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.fields import Choice
from verl.config.roles import CriticConfig, OptimizerConfig
from verl.engines.hf.pretrained import value_model
from verl.engines.local import LocalEngine
from verl.engines.roles.critic import CriticWorker


def critic(*, epochs=1, vf_coef=1.0, loss="value_mse"):
    config = CriticConfig(optimizer=OptimizerConfig(lr=1e-2))
    engine = LocalEngine(
        value_model(tiny_transformer(), "fp32"), config, device=torch.device("cpu"), total_updates=10
    )
    algorithm = Algorithm.bind(AlgorithmConfig(advantage=Choice(name="gae"), value_loss=Choice(name=loss)))
    return CriticWorker(engine, algorithm, vf_coef=vf_coef, epochs=epochs)


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
