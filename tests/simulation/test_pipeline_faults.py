"""Seeded runs with random faults: nothing hangs, no group is lost or doubled, no token is too old."""

from __future__ import annotations

import os

import pytest

from tests.simulation.runs import check, simulate

# Seeds of one test, tests that always run, and all tests.
BLOCK, ALWAYS, ALL = 100, 4, 100
# VERL_SIMULATOR_SEED replays one.
REPLAYED = os.environ.get("VERL_SIMULATOR_SEED")


def failures(seeds: range) -> list[str]:
    """Problems of the runs, one message per seed."""
    messages = []
    for seed in seeds:
        try:
            check(simulate(seed))
        except (AssertionError, RuntimeError) as error:
            messages.append(f"seed {seed}: {error}")
    return messages


def assert_no_failures(block: int) -> None:
    found = failures(range(block * BLOCK, (block + 1) * BLOCK))
    assert not found, "\n\n".join([f"{len(found)} of {BLOCK}; VERL_SIMULATOR_SEED=N replays one", *found])


@pytest.mark.parametrize("block", range(ALWAYS))
def test_whatever_happens_no_group_is_lost_doubled_or_too_old(block):
    assert_no_failures(block)


@pytest.mark.simulator
@pytest.mark.parametrize("block", range(ALWAYS, ALL))
def test_ten_thousand_runs_have_no_problem(block):
    assert_no_failures(block)


@pytest.mark.skipif(REPLAYED is None, reason="no seed is chosen by VERL_SIMULATOR_SEED")
def test_the_chosen_seed():
    check(simulate(int(REPLAYED or 0)))


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_replayed_exactly(seed):
    assert simulate(seed).digest() == simulate(seed).digest()
