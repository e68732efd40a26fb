"""Split and join: the six protocols by hand against table 3 of the paper, uneven rows, restored order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import batch_of
from verl.controller.dispatch import (
    ALL_TO_ALL,
    DP_PROTO,
    ONE_TO_ALL,
    PLANNED,
    PLANNED_METRICS,
    SAME_ON_ALL,
    THREE_D_ALL_MICRO_DP,
    THREE_D_PP_ONLY,
    THREE_D_PROTO,
    DispatchLayout,
    DispatchRank,
    dispatch_mode,
    layout_of_ranks,
    layouts_3d,
    register,
)
from verl.data.batch import Batch
from verl.data.packing import balance

# Ranks (d, p, t) = 000 001 010 011 100 101 110 111.
GRID = layouts_3d(pipeline=2, tensor=2, data=2, micro_data=2)


def called(mode, *args):
    """What each rank is given, and the result if each answers with its number and arguments."""
    layout = GRID[mode.layout]
    parts = mode.split(args, layout.num_parts)
    given_to = [parts[rank.data_rank] for rank in layout.ranks]
    return given_to, layout.collectors


def test_one_to_all_tells_everyone_and_hears_from_everyone():
    assert called(ONE_TO_ALL, "x", 1) == ([("x", 1)] * 8, list(range(8)))
    assert ONE_TO_ALL.join(["a", "b"], ()) == ["a", "b"]


def test_three_d_splits_over_data_and_hears_from_the_first_tensor_rank_of_the_last_stage():
    given_to, heard = called(THREE_D_PROTO, [1, 2, 3], "x")
    assert given_to == [([1, 2], "x")] * 4 + [([3], "x")] * 4
    assert heard == [2, 6]
    assert THREE_D_PROTO.join([[1, 2], [3]], ()) == [1, 2, 3]


def test_micro_data_groups_are_consecutive_ranks_whose_first_is_heard():
    given_to, heard = called(THREE_D_ALL_MICRO_DP, [1, 2, 3, 4, 5])
    assert given_to == [([1, 2],), ([1, 2],), ([3],), ([3],), ([4],), ([4],), ([5],), ([5],)]
    assert heard == [0, 2, 4, 6]


def test_stages_are_heard_once_each():
    assert called(THREE_D_PP_ONLY, "x") == ([("x",)] * 8, [0, 2])


def test_data_parallel_ranks_each_take_a_part():
    given_to, heard = called(DP_PROTO, torch.arange(10))
    assert [part.tolist() for (part,) in given_to] == [[0, 1], [2, 3], [4], [5], [6], [7], [8], [9]]
    assert heard == list(range(8))
    assert torch.equal(DP_PROTO.join([part for (part,) in given_to], ()), torch.arange(10))


def test_all_to_all_takes_what_the_caller_has_for_each():
    assert called(ALL_TO_ALL, list("abcdefgh"))[0] == [(letter,) for letter in "abcdefgh"]
    with pytest.raises(ValueError, match="need 8 entries in each argument"):
        called(ALL_TO_ALL, [1, 2])


def test_with_fewer_entries_than_parts_the_last_parts_are_empty():
    assert [part for (part,) in DP_PROTO.split(([1],), 3)] == [[1], [], []]
    assert DP_PROTO.join([([1], ["a"]), ([], []), ([], [])], ()) == ([1], ["a"])


def rows(lengths):
    return batch_of([[7]] * len(lengths), [[10 * i + j for j in range(n)] for i, n in enumerate(lengths)])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 3))
def test_rows_come_back_in_the_order_in_which_they_went(lengths, num_ranks, num_minibatches):
    batch = rows(lengths)
    plan = balance(
        batch.num_tokens,
        num_ranks=num_ranks,
        micro_batch_tokens=12,
        num_minibatches=min(num_minibatches, len(lengths)),
    )
    results = []
    for part, own in PLANNED.split((batch, plan), num_ranks):
        assert sorted(row for minibatch in own.minibatches for row in sum(minibatch[0], [])) == list(
            range(part.num_rows)
        )
        results.append(part.keep(["response_ids"]))
    joined = PLANNED.join(results, (batch, plan))
    assert joined.ragged("response_ids").values.tolist() == batch.ragged("response_ids").values.tolist()
    assert joined.response_lengths.tolist() == lengths


def test_a_rank_knows_the_numbers_of_its_rows_and_its_own_part_of_the_plan():
    batch = rows([5, 1, 1, 5])
    plan = balance(batch.num_tokens, num_ranks=2, micro_batch_tokens=100, num_minibatches=2)
    assert plan.minibatches == [[[[0]], [[1]]], [[[3]], [[2]]]]
    (first, own), (second, _) = PLANNED.split((batch, plan), 2)
    assert first.row_ids.tolist() == [0, 3] and second.row_ids.tolist() == [1, 2]
    assert own.minibatches == [[[[0]]], [[[1]]]]
    assert batch.row_ids.tolist() == [0, 1, 2, 3]


def test_a_plan_for_other_ranks_or_none_is_refused():
    batch = rows([1, 2, 3])
    with pytest.raises(ValueError, match="need a plan for 2 ranks"):
        PLANNED.split((batch, balance(batch.num_tokens, num_ranks=3, micro_batch_tokens=9)), 2)
    with pytest.raises(ValueError, match="need one plan among the arguments, got 0"):
        PLANNED.split((batch,), 2)


def test_what_all_ranks_know_is_taken_from_the_first():
    assert (
        PLANNED_METRICS.join([{"loss": 1.0}, {"loss": 1.0}], ())
        == SAME_ON_ALL.join([{"loss": 1.0}], ())
        == {"loss": 1.0}
    )


def test_results_that_cannot_be_joined_are_named():
    with pytest.raises(TypeError, match="need batches, tensors or lists as results, got float"):
        DP_PROTO.join([1.0, 2.0], ())
    with pytest.raises(ValueError, match="need the same columns in every batch"):
        DP_PROTO.join([rows([1]), Batch({"x": torch.ones(1)})], ())


@pytest.mark.parametrize(
    "places", [[(0, True), (0, True)], [(1, True)], [(0, False)]], ids=["twice", "from 1", "none"]
)
def test_layouts_that_leave_a_part_out_or_count_it_twice_are_refused(places):
    with pytest.raises(ValueError, match="need parts numbered from 0"):
        layout_of_ranks(places)


def test_sizes_that_do_not_divide_a_replica_are_refused():
    with pytest.raises(ValueError, match="divisible by micro_data"):
        layouts_3d(pipeline=1, tensor=2, data=1, micro_data=3)
    assert DispatchLayout((DispatchRank(1, True), DispatchRank(0, True))).collectors == [1, 0]


def test_a_method_must_say_how_it_is_called():
    @register(DP_PROTO)
    def told():
        """Registered."""

    assert dispatch_mode(told) is DP_PROTO
    with pytest.raises(ValueError, match="decorate it with @register"):
        dispatch_mode(rows)
