"""Ten thousand seeded runs in which everything happens that may: no wedge, no group lost or doubled, no token
too old, a true ledger.
"""

from __future__ import annotations

import os

import pytest

from tests.simulation.runs import check, done

# Seeds of one test, and how many tests there are: some always, the others as a suite of their own.
BLOCK, ALWAYS, ALL = 100, 4, 100
# VERL_SIMULATOR_SEED replays one.
REPLAYED = os.environ.get("VERL_SIMULATOR_SEED")


def failures(seeds: range) -> list[str]:
    """What went wrong, seed by seed."""
    told = []
    for seed in seeds:
        try:
            check(done(seed))
        except (AssertionError, RuntimeError) as error:
            told.append(f"seed {seed}: {error}")
    return told


def assert_well(block: int) -> None:
    told = failures(range(block * BLOCK, (block + 1) * BLOCK))
    assert not told, "\n\n".join([f"{len(told)} of {BLOCK}; VERL_SIMULATOR_SEED=N replays one", *told])


@pytest.mark.parametrize("block", range(ALWAYS))
def test_whatever_happens_no_group_is_lost_doubled_or_too_old(block):
    assert_well(block)


@pytest.mark.simulator
@pytest.mark.parametrize("block", range(ALWAYS, ALL))
def test_so_it_is_in_ten_thousand_runs(block):
    assert_well(block)


@pytest.mark.skipif(REPLAYED is None, reason="no seed is chosen by VERL_SIMULATOR_SEED")
def test_the_chosen_seed():
    check(done(int(REPLAYED or 0)))


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_replayed_exactly(seed):
    assert done(seed).digest() == done(seed).digest()
