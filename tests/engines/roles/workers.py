"""A policy worker over a tiny model, and plans of six rows as one update."""

from __future__ import annotations

from tests.training import local_engine, one_update
from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.engines.roles.policy import PolicyWorker

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
