"""Two evaluations are compared over the prompts that both have."""

from __future__ import annotations

import json

import pytest

from verl.trainer.evaluation.comparison import compare, read_results


def results(accuracies, *, name="math", first=0, **more):
    rows = [
        {"index": i, "id": f"p{i}", "accuracy": value, "reward": value * 2}
        for i, value in enumerate(accuracies, first)
    ]
    return {"format": 1, "sets": [{"name": name, "per_prompt": rows}], **more}


def test_prompts_are_matched_by_their_content():
    compared = compare(results([1.0, 0.0, 0.0]), results([1.0, 1.0, 1.0], first=1, name="other"))
    one = compared["math"]
    first, second, difference = one["differences"]["accuracy"]
    assert (first, second, difference.value, difference.prompts) == (0.0, 1.0, 1.0, 2)
    assert (one["only_first"], one["only_second"]) == (1, 1)
    assert one["differences"]["reward"][2].value == 2.0


def test_a_prompt_that_occurs_twice_is_matched_with_its_own_twin():
    twice = results([1.0, 0.0])
    for row in twice["sets"][0]["per_prompt"]:
        row["id"] = "same"
    assert compare(twice, twice)["math"]["differences"]["accuracy"][2].prompts == 2


def test_evaluations_of_other_prompts_and_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="share none"):
        compare(results([1.0]), results([1.0], first=9))
    with pytest.raises(ValueError, match=r"cannot read .*results\.json"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"accuracy": 1}))
    with pytest.raises(ValueError, match="as verl eval writes it"):
        read_results(tmp_path)
