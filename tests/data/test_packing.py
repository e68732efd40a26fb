"""Tests of dealing rows to minibatches, ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.data.packing import BatchPlan, balance, compute_cost

lengths = st.lists(st.integers(1, 100), min_size=1, max_size=60)
ranks = st.integers(1, 9)
budgets = st.integers(1, 300)
row_limits = st.none() | st.integers(1, 5)


def rows_of(rank: list[list[int]]) -> list[int]:
    return [row for micro_batch in rank for row in micro_batch]


def loads_of(plan: BatchPlan, num_tokens: list[int]) -> list[int]:
    return [sum(num_tokens[row] for row in rows_of(rank)) for rank in plan.minibatches[0]]


def test_a_small_batch_is_dealt_as_by_hand():
    plan = balance(torch.tensor([2, 7, 3, 5, 4, 3]), num_ranks=2, micro_batch_tokens=8)
    # 7 to the first; 5 and 4 to the second; 3 to the 7; the other 3 to the 9; 2 to the 10. With 5, 3 fits
    # under 8, 4 does not.
    assert plan.minibatches == [[[[1], [2, 0]], [[3, 5], [4]]]]


@given(lengths, ranks, budgets, row_limits, st.integers(1, 4))
def test_every_row_is_planned_exactly_once(num_tokens, num_ranks, budget, limit, num_minibatches):
    num_minibatches = min(num_minibatches, len(num_tokens))
    plan = balance(
        torch.tensor(num_tokens),
        num_ranks=num_ranks,
        micro_batch_tokens=budget,
        micro_batch_rows=limit,
        num_minibatches=num_minibatches,
    )
    parts = [sorted(row for rank in minibatch for row in rows_of(rank)) for minibatch in plan.minibatches]
    # Sorted within each part and joined they count up: the parts are consecutive, too.
    assert [row for part in parts for row in part] == list(range(len(num_tokens)))
    assert len(parts) == num_minibatches and max(map(len, parts)) - min(map(len, parts)) <= 1


@given(lengths, ranks, budgets, row_limits)
def test_micro_batches_hold_their_budgets_unless_one_row_breaks_it_alone(
    num_tokens, num_ranks, budget, limit
):
    plan = balance(
        torch.tensor(num_tokens), num_ranks=num_ranks, micro_batch_tokens=budget, micro_batch_rows=limit
    )
    for micro_batch in (m for rank in plan.minibatches[0] for m in rank):
        assert len(micro_batch) <= (limit or len(num_tokens))
        assert len(micro_batch) <= 1 or sum(num_tokens[row] for row in micro_batch) <= budget


@given(lengths, ranks, budgets, row_limits)
def test_ranks_have_equally_many_micro_batches_and_empty_ones_only_for_want_of_rows(
    num_tokens, num_ranks, budget, limit
):
    plan = balance(
        torch.tensor(num_tokens), num_ranks=num_ranks, micro_batch_tokens=budget, micro_batch_rows=limit
    )
    (count,) = {len(rank) for rank in plan.minibatches[0]}
    for rank in plan.minibatches[0]:
        assert sum(map(bool, rank)) == min(count, len(rows_of(rank)))
        assert all(rank[: len(rows_of(rank))])


@given(lengths, ranks)
def test_ranks_differ_by_no_more_than_the_longest_row(num_tokens, num_ranks):
    plan = balance(torch.tensor(num_tokens), num_ranks=num_ranks, micro_batch_tokens=10_000)
    loads = loads_of(plan, num_tokens)
    assert max(loads) - min(loads) <= max(num_tokens)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 3))
@settings(max_examples=30)
def test_the_busiest_rank_has_at_most_four_thirds_of_the_least_possible(num_tokens, num_ranks):
    best = {(0,) * num_ranks}
    for n in num_tokens:  # every possible deal
        best = {
            tuple(sorted(load + n * (i == rank) for i, load in enumerate(loads)))
            for loads in best
            for rank in range(num_ranks)
        }
    plan = balance(torch.tensor(num_tokens), num_ranks=num_ranks, micro_batch_tokens=10_000)
    assert max(loads_of(plan, num_tokens)) <= 4 / 3 * min(max(loads) for loads in best)


@given(lengths, ranks, budgets)
def test_micro_batches_are_more_than_half_full(num_tokens, num_ranks, budget):
    plan = balance(torch.tensor(num_tokens), num_ranks=num_ranks, micro_batch_tokens=budget)
    # All but one of first-fit's on the rank that needs the most are.
    assert len(plan.minibatches[0][0]) < 2 * max(loads_of(plan, num_tokens)) / budget + 1


def test_rows_are_dealt_evenly_where_a_rank_would_lack_rows_for_its_micro_batches():
    plan = balance(torch.tensor([90, 30, 30, 30]), num_ranks=2, micro_batch_tokens=50)
    assert plan.minibatches == [[[[0], [3]], [[1], [2]]]]


def test_a_rank_that_needs_fewer_micro_batches_halves_its_own():
    costs = torch.tensor(
        [3.9, 3.8, 4.0, 3.0, 0.5, 0.1]
    )  # the first two rows to one rank, the others, 100 tokens, to the other
    plan = balance(torch.tensor([60, 50, 40, 30, 20, 10]), num_ranks=2, micro_batch_tokens=100, cost=costs)
    assert plan.minibatches == [[[[2, 4], [3, 5]], [[0], [1]]]]


def test_with_fewer_rows_than_ranks_some_ranks_have_empty_micro_batches():
    plan = balance(torch.tensor([5, 6]), num_ranks=3, micro_batch_tokens=10)
    assert plan.minibatches == [[[[1]], [[0]], [[]]]]


def test_a_long_tail_is_outweighed_by_many_short_rows():
    plan = balance(torch.tensor([80] + [10] * 8), num_ranks=2, micro_batch_tokens=100)
    assert plan.minibatches == [[[[0]], [list(range(1, 9))]]]


def test_ranks_are_balanced_by_cost_where_one_is_given():
    costs = torch.tensor([9.0, 1.0, 1.0, 9.0])
    plan = balance(torch.tensor([5, 5, 5, 5]), num_ranks=2, micro_batch_tokens=10, cost=costs)
    assert [float(costs[rows_of(rank)].sum()) for rank in plan.minibatches[0]] == [10.0, 10.0]


def test_attention_doubles_the_cost_at_twelve_times_the_width():
    torch.testing.assert_close(
        compute_cost(torch.tensor([0, 768, 12]), 64),
        torch.tensor([0.0, 1536.0, 12.1875], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("num_tokens", "changed", "message"),
    [
        ([[1, 2]], {}, "tokens of each row"),
        ([1.0], {}, "tokens of each row"),
        ([-1], {}, "tokens of each row"),
        ([1], {"num_ranks": 0}, "num_ranks=0"),
        ([1], {"micro_batch_rows": 0}, "micro_batch_rows=0"),
        ([1], {"num_minibatches": 2}, "1 rows for 2"),
        ([1], {"cost": torch.tensor([float("nan")])}, "finite cost"),
    ],
)
def test_what_cannot_be_planned_is_an_error_that_says_so(num_tokens, changed, message):
    with pytest.raises(ValueError, match=message):
        balance(torch.tensor(num_tokens), **{"num_ranks": 1, "micro_batch_tokens": 8, **changed})


def test_groups_that_belong_together_are_in_one_minibatch():
    group_ids = torch.tensor([0, 0, 0, 1, 2, 2, 5])
    plan = balance(
        torch.full((7,), 4), num_ranks=1, micro_batch_tokens=8, num_minibatches=2, group_ids=group_ids
    )
    assert [sorted(row for micro in minibatch[0] for row in micro) for minibatch in plan.minibatches] == [
        [0, 1, 2, 3],
        [4, 5, 6],
    ]
    with pytest.raises(ValueError, match="need a group for each minibatch, got 4 groups for 5"):
        balance(
            torch.full((7,), 4), num_ranks=1, micro_batch_tokens=8, num_minibatches=5, group_ids=group_ids
        )


def test_rows_of_a_prompt_share_a_micro_batch_in_which_its_tokens_count_once():
    num_tokens, prompts = torch.tensor([12, 13, 12, 14, 12]), torch.tensor([0, 1, 0, 1, 0])
    shared = (prompts, torch.full((5,), 10))
    plan = balance(num_tokens, num_ranks=1, micro_batch_tokens=17, prompts=shared)
    # 12 + 2 + 2 of prompt 0, then 14 + 3 of prompt 1; alone each row would need a micro-batch.
    assert plan.minibatches == [[[[0, 2, 4], [3, 1]]]]
    assert len(balance(num_tokens, num_ranks=1, micro_batch_tokens=17).minibatches[0][0]) == 5
    whole = [balance(num_tokens, num_ranks=1, micro_batch_tokens=99, prompts=p) for p in (shared, None)]
    assert whole[0] == whole[1]


@given(lengths, ranks, budgets, row_limits, st.integers(1, 9))
def test_shared_prompts_keep_budgets_and_equal_numbers_of_micro_batches(
    num_tokens, num_ranks, budget, limit, num_prompts
):
    ids = torch.arange(len(num_tokens)) % num_prompts
    sizes = torch.tensor([min(num_tokens[p::num_prompts]) // 2 for p in ids.tolist()])
    plan = balance(
        torch.tensor(num_tokens),
        num_ranks=num_ranks,
        micro_batch_tokens=budget,
        micro_batch_rows=limit,
        prompts=(ids, sizes),
    )
    assert sorted(plan.rows_of_minibatch(0)) == list(range(len(num_tokens)))
    assert len({len(rank) for rank in plan.minibatches[0]}) == 1
    for micro in (m for rank in plan.minibatches[0] for m in rank):
        computed = sum(num_tokens[row] - int(sizes[row]) for row in micro)
        computed += sum({int(ids[row]): int(sizes[row]) for row in micro}.values())
        assert len(micro) <= (limit or len(num_tokens)) and (len(micro) <= 1 or computed <= budget)
