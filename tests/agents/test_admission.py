"""How many groups may be in work, which make a batch, and which are too late: by hand, and on random
histories.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from verl.agents.admission import Admission


@dataclass
class Group:
    """A group that somebody answers."""

    number: int
    oldest: int
    arrival: int | None = None


def test_without_staleness_as_many_are_admitted_as_a_batch_needs_and_none_while_it_is_learned_from():
    rules = Admission(8)
    assert rules.room(3, batches=3, outstanding=0) == 8
    assert rules.room(3, batches=3, outstanding=5) == 3
    assert rules.room(3, batches=4, outstanding=0) == 0


@pytest.mark.parametrize(("staleness", "before", "during"), [(1, 16, 8), (4, 40, 32)])
def test_each_step_of_staleness_is_one_more_batch_in_work(staleness, before, during):
    rules = Admission(8, staleness)
    assert (rules.room(5, batches=5, outstanding=0), rules.room(5, batches=6, outstanding=0)) == (
        before,
        during,
    )


def test_oversampling_admits_more_but_none_that_no_batch_may_have():
    assert Admission(8, oversample=3).room(0, batches=0, outstanding=0) == 11
    assert Admission(8, oversample=3).room(0, batches=1, outstanding=0) == 0
    assert Admission(8, 1, oversample=3).room(0, batches=1, outstanding=0) == 11


def test_a_group_that_is_due_keeps_its_place_while_it_is_in_flight():
    rules, groups = Admission(3, 1), [Group(0, 4), Group(1, 5, 1), Group(2, 5, 0), Group(3, 5, 2)]
    assert rules.chosen(groups, 5, left=3) == [2, 1]
    groups[0].arrival = 3
    assert rules.chosen(groups, 5, left=3) == [2, 1, 0]
    assert rules.chosen(groups[1:], 5, left=3) == [2, 1, 3]


def test_no_more_groups_are_overtaken_than_the_batch_after_can_hold():
    rules = Admission(1, 2)
    slow = [Group(0, 4), Group(1, 4), Group(2, 6, 0)]
    # both must be in the batches of versions 5 and 6: the fast one waits
    assert rules.chosen(slow, 5, left=1) == []
    assert rules.chosen(slow[1:], 5, left=1) == [2]
    slow[1].arrival = 1
    assert rules.chosen(slow, 5, left=1) == [1]


def test_groups_that_no_batch_can_hold_any_more_keep_none_waiting():
    rules, groups = Admission(1, 1), [Group(0, 0, 0), Group(1, 0, 1), Group(2, 0, 2)]
    assert rules.chosen(groups, 5, left=1) == [0]
    assert rules.too_late(groups[1:], 5) == [1, 2]


def test_with_oversampling_the_slowest_do_not_hold_the_step():
    rules, groups = Admission(2, oversample=1), [Group(0, 0), Group(1, 0, 1), Group(2, 0, 0)]
    assert rules.chosen(groups, 0, left=2) == [2, 1]
    assert rules.too_late([groups[0]], 0) == [0]
    # but no more of them are left behind than were asked for beyond the batch
    assert rules.chosen([Group(0, 0), Group(1, 0), Group(2, 0, 0)], 0, left=2) == [2]
    assert Admission(1, 1, oversample=1).chosen([Group(0, 0), Group(1, 0), Group(2, 1, 0)], 1, left=1) == []


def test_in_order_nothing_overtakes():
    rules, groups = Admission(2, in_order=True), [Group(4, 0, 2), Group(5, 0), Group(6, 0, 0)]
    assert rules.chosen(groups, 0, left=2) == [4]
    groups[1].arrival = 3
    assert rules.chosen(groups, 0, left=2) == [4, 5]


def test_a_version_that_makes_a_group_too_stale_may_not_be_published():
    Admission(2, 1).check([Group(7, 3)], 4)
    with pytest.raises(RuntimeError, match="at most 1 steps before version 5, got 7 of version 3"):
        Admission(2, 1).check([Group(7, 3)], 5)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_arrives_when_no_batch_is_short_late_or_too_stale(seed):
    draw = random.Random(seed)
    size, staleness, oversample = draw.randint(1, 4), draw.randint(0, 3), draw.choice([0, 0, 1, 2])
    rules, groups, numbers, arrivals = (
        Admission(size, staleness, oversample),
        [],
        iter(range(10_000)),
        iter(range(10_000)),
    )
    for version in range(12):
        left = size
        while left:
            room = rules.room(version, batches=version, outstanding=len(groups) + size - left)
            groups += [Group(next(numbers), version) for _ in range(room)]
            late = [group for group in groups if group.arrival is None]
            if late and draw.random() < 0.7:
                draw.choice(late).arrival = next(arrivals)
            taken = rules.chosen(groups, version, left=left)
            assert all(version - group.oldest <= staleness for group in groups if group.number in taken)
            groups, left = [group for group in groups if group.number not in taken], left - len(taken)
        aborted = rules.too_late(groups, version)
        assert len(aborted) <= oversample
        groups = [group for group in groups if group.number not in aborted]
        rules.check(groups, version + 1)
