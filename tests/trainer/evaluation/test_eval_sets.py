"""Names of sets, the parts of a set by a column, and what is refused."""

from __future__ import annotations

import pytest

from verl.config.data import DataSource
from verl.trainer.evaluation.eval_sets import set_names, values_by_prompt
from verl.utils.sampling_types import Prompt


def prompts_of(*values, column="level"):
    return [Prompt("?", index=i, columns={column: value}) for i, value in enumerate(values)]


def test_sets_of_one_name_are_numbered_and_this_is_said():
    notes = []
    sources = [DataSource(path=p) for p in ("a/math.jsonl", "b/math.jsonl", "c/math.jsonl")]
    assert set_names(sources, note=notes.append) == ["math", "math_2", "math_3"]
    assert len(notes) == 2 and "b/math.jsonl is called math_2" in notes[0]


def test_a_name_is_one_word_of_a_metric_and_no_other_part_of_it():
    sources = [DataSource(path="x.jsonl", name=name) for name in ("my set/hard", "greedy", "math")]
    assert set_names(sources, note=lambda _: None) == ["my_set_hard", "greedy_2", "math"]


def test_few_numbers_are_values_and_many_are_quarters():
    assert values_by_prompt(prompts_of(5.0, 1, None), "level") == ["5", "1", "none"]
    bins = values_by_prompt(prompts_of(*range(100)), "level")
    assert {name: bins.count(name) for name in bins} == dict.fromkeys(
        ["0..24", "25..49", "50..74", "75..99"], 25
    )
    assert bins[0] == "0..24" and bins[25] == "25..49"


def test_numbers_with_one_common_value_lie_in_bins_without_overlap():
    bins = values_by_prompt(prompts_of(*[0] * 90, *range(1, 11)), "level")
    assert set(bins) == {"0..10"} or sorted(set(bins))[0] == "0..0"


def test_texts_truths_fields_and_sources_have_parts():
    assert values_by_prompt(prompts_of("a b", True), "level") == ["a_b", "True"]
    nested = prompts_of({"level": 3}, {}, column="extra_info")
    assert values_by_prompt(nested, "extra_info.level") == ["3", "none"]
    assert values_by_prompt([Prompt("?", source="gsm8k/main")], "data_source") == ["gsm8k_main"]


@pytest.mark.parametrize(
    "prompts, problem",
    [
        (prompts_of("x", column="kind"), "which no prompt has; the data has data_source, kind"),
        (prompts_of(["x"]), "need texts or numbers .* got list"),
        (prompts_of(*map(str, range(30))), "at most 24 values .* got 30 in 'level'"),
    ],
)
def test_a_column_without_parts_is_refused(prompts, problem):
    with pytest.raises(ValueError, match=problem):
        values_by_prompt(prompts, "level")
