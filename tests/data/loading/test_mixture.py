"""Several sources: shares by their weights, epochs of their own, metrics, and exact continuation."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.config.data import DataConfig, DataSource
from verl.data.loading.loader_factory import build_loader
from verl.data.loading.prompt_sampler import GroupFeedback
from verl.utils.sampling_types import Prompt

SIZES = (5, 40, 200)


def rows(sizes=SIZES):
    """Prompts of several sources, numbered through, and the end of each source."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [Prompt(str(i), index=i) for i in range(ends[-1])], ends


def loader(*weights, sizes=SIZES, seed=0, **data):
    made, ends = rows(sizes)
    sources = [DataSource(path=f"{'abcdefgh'[i]}.jsonl", weight=w) for i, w in enumerate(weights)]
    return build_loader(made, ends, sources, DataConfig(**data), seed=seed)


def source_of(prompt, sizes=SIZES):
    return next(i for i in range(len(sizes)) if prompt.index < sum(sizes[: i + 1]))


def test_shares_of_three_sources_follow_their_weights_whatever_their_sizes():
    mixed = loader(5, 3, 2)
    drawn = [source_of(prompt) for _ in range(125) for prompt in mixed.take(8)]
    assert Counter(drawn) == {0: 500, 1: 300, 2: 200}
    for k in range(10, 1000):  # at each moment within one prompt
        assert all(abs(drawn[:k].count(i) - k * w) < 1 for i, w in enumerate((0.5, 0.3, 0.2)))
    assert mixed.take_metrics()["source/a/share"] == 0.5


@given(
    st.lists(st.floats(0.01, 100), min_size=2, max_size=6),
    st.integers(0, 9),
    st.lists(st.integers(1, 9), max_size=9),
)
def test_shares_are_within_one_prompt_for_any_weights(weights, seed, sizes):
    mixed = loader(*weights, sizes=(3,) * len(weights), seed=seed)
    drawn = Counter(source_of(p, (3,) * len(weights)) for n in sizes for p in mixed.take(n))
    for i, weight in enumerate(weights):
        assert abs(drawn[i] - weight / sum(weights) * sum(sizes)) < 1


def test_sources_are_mixed_and_the_seed_decides_which_of_equal_ones_is_next():
    orders = [[source_of(p) for p in loader(1, 1, 1, seed=seed).take(30)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert all(sorted(order[i : i + 3]) == [0, 1, 2] for order in orders for i in range(0, 30, 3))


def test_each_source_has_its_own_epochs_and_order():
    mixed = loader(1, 1, 1)
    drawn = mixed.take(120)
    first = [p.index for p in drawn if source_of(p) == 0]
    assert all(sorted(first[i : i + 5]) == list(range(5)) for i in range(0, 40, 5))
    assert len({tuple(first[i : i + 5]) for i in range(0, 40, 5)}) > 1
    metrics = mixed.take_metrics()
    assert [metrics[f"source/{name}/epoch"] for name in "abc"] == [8, 1, 0.2]
    assert mixed.epochs == 120 / 245


@given(st.lists(st.integers(1, 20), max_size=12))
def test_a_mixture_goes_on_exactly_from_its_state(sizes):
    one, other = loader(5, 3, 2), loader(5, 3, 2)
    for size in sizes:
        one.take(size)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.take(60) == other.take(60) and one.take_metrics() == other.take_metrics()


def test_the_state_of_other_shares_is_refused():
    with pytest.raises(ValueError, match=r"shares was \[0.5, 0.3, 0.2\] and is"):
        loader(5, 2, 3).load_state_dict(loader(5, 3, 2).state_dict())


def test_without_weights_all_rows_are_in_one_order_and_each_source_is_measured():
    plain, one = loader(None, None, None), build_loader(rows()[0], (), [], DataConfig(), seed=0)
    assert plain.take(245) == one.take(245) and plain.epochs == 1
    plain.observe(Prompt("x", index=3), GroupFeedback([1.0, 0.0], [1.0, 0.0]))
    plain.observe(Prompt("x", index=50), GroupFeedback([3.0]))
    metrics = plain.take_metrics()
    assert metrics["source/a/share"] == 5 / 245 and metrics["source/a/accuracy"] == 0.5
    assert metrics["source/c/reward"] == 3.0 and "source/c/accuracy" not in metrics
    restored = loader(None, None, None)
    restored.load_state_dict(plain.state_dict())
    assert restored.take(7) == plain.take(7) and restored.take_metrics() == plain.take_metrics()


def test_a_curriculum_is_within_each_source_and_learns_from_its_groups():
    mixed = loader(1, 1, 1, curriculum={"name": "pass_rate"})
    for prompt in mixed.take(30):
        mixed.observe(prompt, GroupFeedback([float(source_of(prompt))] if source_of(prompt) < 2 else [0.5]))
    metrics = mixed.take_metrics()
    assert metrics["source/a/curriculum/below_share"] == metrics["source/b/curriculum/above_share"] * 4 == 1
    assert metrics["source/c/curriculum/inside_share"] == 10 / 200


@pytest.mark.parametrize(
    ("weights", "sizes", "message"),
    [
        ((1, None, 1), SIZES, "need a weight for each source of data.train or for none, b.jsonl has none"),
        ((1, 1), (3, 0), "need a usable row in each source with a weight, b.jsonl has none"),
    ],
)
def test_sources_that_make_no_mixture_are_refused(weights, sizes, message):
    with pytest.raises(ValueError, match=message):
        loader(*weights, sizes=sizes)


def test_prompts_of_all_sources_are_found_by_their_index():
    mixed = loader(1, 1, 1)
    assert [mixed.prompt(i).index for i in (0, 5, 244)] == [0, 5, 244]
    assert [prompt.index for prompt in mixed.prompts] == list(range(245)) and mixed.num_prompts == 245


@pytest.mark.parametrize("weights", [(1e-300, 1e300), (1e308, 1e308)])
def test_weights_that_no_number_can_compare_are_refused(weights):
    with pytest.raises(ValueError, match="need weights that a computer can compare, got 1e"):
        loader(*weights, sizes=(2, 2))


def test_a_source_with_a_tiny_weight_stays_behind_the_others():
    drawn = [source_of(prompt, (2, 2)) for prompt in loader(1e-9, 1e9, sizes=(2, 2)).take(50)]
    assert drawn == [1] * 50


def test_sources_have_metrics_of_their_own_whatever_their_names():
    made, ends = rows((2, 2, 2, 2))
    sources = [DataSource(path="x.jsonl", name=name) for name in ("a", "a", "a_2", "org/my set")]
    mixed = build_loader(made, ends, sources, DataConfig(), seed=0)
    mixed.take(8)
    shares = dict.fromkeys(("a", "a_2", "a_2_2", "org_my_set"), 0.25)
    assert mixed.take_metrics() == {f"source/{name}/share": share for name, share in shares.items()}
