"""Tests of the reward `gsm8k`: the number behind `####`, or the last one, by value."""

from __future__ import annotations

from decimal import Decimal

import pytest

from verl.config.data import RewardsConfig, WeightedChoice
from verl.rewards.functions import build_rewards
from verl.rewards.library.gsm8k import gsm8k, truth_number
from verl.utils.sampling_types import Prompt

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"


def values(response, truth, **options):
    found = gsm8k(response, truth, **options)
    return found["score"], found["extracted_answer"]


@pytest.mark.parametrize(
    "truth", ["72", 72, 72.0, Decimal("72"), "$72", "72.00", SOLUTION, ["72", "six dozen and 0"]]
)
def test_a_truth_is_a_number_or_a_whole_solution(truth):
    assert values(SOLUTION, truth) == (1.0, "72")
    assert values(SOLUTION.replace("#### 72", "#### 73"), truth) == (0.0, "73")


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("#### 72", "72"),
        ("####72", "72"),
        ("#### **72**", "72"),
        ("#### 72.", "72"),
        ("#### $1,234.50.", "1234.50"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \u22125", "-5"),
        ("#### 15%", "15"),
        ("#### 72 clips in all", "72"),
        ("#### .5", "0.5"),
        ("#### \\boxed{72}", "72"),
        ("#### `72`", "72"),
        ("#### Answer: 72", "72"),
        ("#### The final answer is **72**.", "72"),
        ("#### x = 72", "72"),
        ("#### 1{,}234", "1234"),
        ("#### 1 234", "1234"),
        ("#### 12 345 678.50 miles", "12345678.50"),
        ("#### 72\n3 more", "72"),
        ("#### 1\\,234,567", "1234567"),
        ("#### \uff17\uff12", "72"),
        ("#### 71\nNo:\n#### 72", "72"),
        ("#### 72\n\nQuestion: what is 3 + 4?", "72"),
    ],
)
def test_strict_takes_the_number_behind_the_last_mark(response, number):
    assert values(response, number) == (1.0, number)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "72",
        "#### 72 or 73",
        "#### 72-73",
        "The answer is 72.",
        "#### about 72",
        "#### 3/4",
        "#### 1,5",
        "#### 1 2",
        "#### 12 34",
        "#### 1 234 5",
        "#### 7e3",
        "### 72",
    ],
)
def test_strict_finds_no_number_elsewhere_and_no_part_of_another(response):
    found = gsm8k(response, "72")
    assert (found["score"], found["answer_found"], found["extracted_answer"]) == (0.0, 0.0, "")


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("It is 72.", "72"),
        ("48 + 24 = 72 clips (in 2 months: no, 72)", "72"),
        ("10-5 = 5", "5"),
        ("so it is 10-5", "5"),
        ("from 3 to -4", "-4"),
        ("$1,234,567.89 in all", "1234567.89"),
        ("72%.", "72"),
        (SOLUTION, "72"),
        ("<think>It may be 71.</think>72", "72"),
    ],
)
def test_flexible_takes_the_last_number(response, number):
    assert values(response, number, method="flexible") == (1.0, number)


def test_an_answer_with_a_wrong_number_in_its_place_has_the_score_of_the_format():
    assert values("#### 71", "72", format_score=0.1) == (0.1, "71")
    assert values("71", "72", format_score=0.1) == (0.0, "")


def test_numbers_in_thoughts_are_no_answer_unless_they_are_read():
    assert values("<think>#### 72</think>", "72") == (0.0, "")
    assert values("<think>#### 72</think>", "72", thoughts="read") == (1.0, "72")


@pytest.mark.parametrize("truth", ["", "many", "between 3 and 4", None, "1/2"])
def test_a_truth_without_a_number_is_an_error_before_the_first_step(truth):
    rewards = build_rewards(RewardsConfig(functions=(WeightedChoice(name="gsm8k"),)))
    with pytest.raises(ValueError, match="row 7"):
        rewards.check_data([Prompt("q", answer="5"), Prompt("q", answer=truth, index=7, source="set")])


@pytest.mark.parametrize(
    "text", ["1," * 300_000, "#" * 600_000, "1" * 4000, "#### " * 100_000, "-$" * 300_000]
)
@pytest.mark.parametrize("method", ["strict", "flexible"])
def test_long_answers_take_time_in_proportion_to_their_length(text, method):
    assert gsm8k(text, "72", method=method)["score"] == 0.0


def test_the_one_number_of_a_truth_is_found():
    assert truth_number("72 clips") == 72
    assert truth_number("a 3 and\n#### 1,000") == 1000
