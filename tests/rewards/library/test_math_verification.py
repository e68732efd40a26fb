"""Tests of the reward `math`: agreement with math-verify, places of answers, truths, answers that hang it."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import math_verify
import pytest

from tests.rewards.answers import rewards_of, rows
from tests.rewards.library.hard_to_end import hard_to_end
from tests.rewards.library.math_pairs import KNOWN_FAULTS, MENDED, pairs
from verl.config.data import RewardsConfig, WeightedChoice
from verl.rewards.functions import build_rewards
from verl.rewards.library.math_verification import (
    check_truth,
    math_reward,
    parsed_truth,
    score_of_failure,
)
from verl.rewards.reward_function import RewardFunction
from verl.utils.sampling_types import Prompt

RIGHT = r"\boxed{\frac{10}{2}}"
# Answers that a policy may find, none of them 5. Each has a reward of 0, whatever it does to the checker.
HANGING = {
    "tower of powers": r"\boxed{9^{9^{9^{9}}}}",
    "tower without LaTeX": "9^9^9^9^9",
    "factorial": r"\boxed{(10^{10})!}",
    "binomial": r"\boxed{\binom{10^{9}}{5\cdot10^{8}}}",
    "power of ten": r"\boxed{10^{1000000000}}",
    "logarithm": r"\boxed{\log_{2}(2^{10^{15}})}",
    "sum": r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n}}",
    "integral": r"\boxed{\int_0^1 \sin(\cos(\tan(x^x)))^{x^x} dx}",
    "expansion": r"\boxed{(x+y+z+w)^{200}-1}",
    "nested fractions": r"\boxed{" + r"\frac{1}{1+" * 300 + "1" + "}" * 300 + "}",
    "nested parentheses": r"\boxed{" + "(" * 1900 + "1" + ")" * 1900 + "}",
}
LONG = {
    "integer of 100k digits": r"\boxed{" + "7" * 100_000 + "}",
    "integer of 3900 digits": r"\boxed{" + "7" * 3900 + "}",
    "matrix of 90k entries": r"\boxed{\begin{pmatrix}" + r"1&1&1\\" * 30_000 + r"\end{pmatrix}}",
    "power of a matrix": r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}^{10^{9}}}",
    "open boxes": r"\boxed{" * 150_000,
    "many boxes": r"\boxed{1}," * 100_000,
    "nested boxes": r"\boxed{" * 100_000 + "1" + "}" * 100_000,
    "open braces": "{" * 1_000_000,
    "very long text": "word " * 200_000,
    "dollar signs": "$" * 200_000,
    "opened LaTeX": r"\[" * 100_000,
    "the word answer": "answer " * 30_000,
    "an answer of stars": "answer: " + "*" * 500_000,
    "hashes": "####" * 200_000,
    "hashes and spaces": "#### " + " " * 500_000 + "1.",
    "angles": r"\boxed{" + r"\langle" * 100_000 + "}",
    "thoughts": "<think>" * 100_000 + "</think>" * 100_000,
    "digits with spaces": "1 " * 200_000,
    "equality signs": r"\boxed{" + "=" * 2000 + "}",
}


def score(response, truth, **options):
    return math_reward(response, truth, **options)["score"]


def by_math_verify(truth, answer):
    gold, found = (math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (truth, answer))
    return math_verify.verify(gold, found, timeout_seconds=None)


def math_rewards(**options):
    return build_rewards(RewardsConfig(functions=(WeightedChoice(name="math", **options),), timeout_s=60.0))


def test_rewards_of_hundreds_of_pairs_agree_with_math_verify_and_are_right():
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found = pairs()
    assert len(found) >= 500
    for truth, answer, is_right in found:
        values = math_reward(f"Thus \\boxed{{{answer}}}.", truth)
        assert (values["score"], values["checker_stopped"]) == (float(is_right), 0.0), (truth, answer)
        assert by_math_verify(truth, answer) == is_right, (truth, answer)


@pytest.mark.parametrize(("truth", "answer", "is_right"), MENDED)
def test_spellings_that_math_verify_misreads_are_read_as_meant(truth, answer, is_right):
    assert score(f"\\boxed{{{answer}}}", truth) == is_right != by_math_verify(truth, answer)


@pytest.mark.parametrize(("truth", "answer", "is_right"), KNOWN_FAULTS)
def test_known_faults_of_math_verify_are_ours_too(truth, answer, is_right):
    assert score(f"\\boxed{{{answer}}}", truth) == by_math_verify(truth, answer) != is_right


def test_answers_that_hang_the_checker_have_a_reward_of_0_and_harm_no_other():
    rewards = math_rewards(timeout_s=0.4)
    texts = [text for hanging in HANGING.values() for text in (hanging, r"\boxed{5}")]
    answers = rows(*texts, answer="5")
    rewards.attempt(answers)
    after = rows(RIGHT, r"\boxed{6}", answer="5")
    rewards.attempt(after)
    rewards.close()
    assert [row.outcome for row in [*answers, *after]] == ["ok"] * len(texts + after)
    assert [row.reward for row in answers] == [0.0, 1.0] * len(HANGING)
    assert [row.scores["checker_stopped"] for row in answers] == [1.0, 0.0] * len(HANGING)
    assert [row.reward for row in after] == [1.0, 0.0]


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_answers_are_read_in_time(text):
    assert math_reward(text, "5")["score"] == 0.0


def test_an_answer_that_ends_the_process_is_wrong_and_one_that_lacks_memory_has_no_reward():
    function = RewardFunction(
        hard_to_end, imported_from=(hard_to_end.__module__, "hard_to_end"), score_of_failure=score_of_failure
    )
    rewards = rewards_of(function, timeout_s=60.0)
    answers = rows("deaf", "killed", "large", "plain")
    rewards.attempt(answers)
    rewards.close()
    assert [row.reward for row in answers] == [0.0, None, 0.25, 1.0]
    assert answers[0].scores["checker_stopped"] == 1.0
    assert answers[1].outcome == "reward_crash"


@pytest.mark.parametrize(
    ("response", "truth", "options"),
    [
        (r"First \boxed{4}, no: \boxed{5}. This holds since 5 > 4.", "5", {}),
        (r"$x=\boxed{1}$ or $x=\boxed{2}$", "1, 2", {}),
        (r"\boxed{1} or \boxed{2}", "2", {}),
        (r"\boxed{x=\boxed{5}}", "5", {}),
        (r"\boxed 5.", "5", {}),
        (r"\fbox{5}", "5", {"extract": "boxed"}),
        (r"\boxed{5} and again \boxed{5}", "5", {"boxes": "single"}),
        (r"\boxed{\left\{1,2\right\}}", r"\{2,1\}", {}),
        (r"\boxed{5}, so we write \boxed{4", "5", {}),
        (r"\boxed{4" + "\nThe answer is 5.", "5", {}),
        (r"<think>\boxed{4}</think>It is \boxed{5}.", "5", {"extract": "boxed"}),
        (r"thought first \boxed{4}</think> 5", "5", {}),
        (r"<think>\boxed{5}", "5", {"thoughts": "read"}),
        ("<think>I guess.</think><answer> 5 </answer>", "5", {"extract": "marked"}),
        ("6 * 12 = 72\n#### 72", "72", {"extract": "marked"}),
        ("#### 72 dollars", "$72", {}),
        ("#### Step 2\nso it is 9", "9", {}),
        ("#### 1. The area\nThe area is 9.", "9", {}),
        ("The answer is Evelyn.", r"\text{Evelyn}", {"extract": "marked"}),
        ("The answer is 7 since 7 > 5", "7", {"extract": "marked"}),
        ("The answer is clear.\nx = 42", "42", {}),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "0.5", {"extract": "marked"}),
        ("I get 7", "7", {}),
        ("x^2+1", "x^2+1", {}),
        ("Evelyn", "Evelyn", {}),
    ],
)
def test_the_final_answer_is_found(response, truth, options):
    assert score(response, truth, **options) == 1.0


@pytest.mark.parametrize(
    ("response", "truth", "options"),
    [
        ("", "5", {}),
        (r"\boxed{}", "5", {}),
        (r"\boxed{4", "4", {}),
        (r"<think>\boxed{5}</think>", "5", {}),
        (r"<think>It may be \boxed{5}", "5", {}),
        (r"\boxed{4} or is it \boxed{5}", "5", {"boxes": "single"}),
        ("The answer is 5.", "5", {"extract": "boxed"}),
        ("I get 5.", "5", {"extract": "marked"}),
        ("Evelyn", "Evelyn", {"extract": "marked"}),
    ],
)
def test_a_text_without_a_final_answer_has_no_reward_and_says_so(response, truth, options):
    values = math_reward(response, truth, **options)
    assert (values["score"], values["answer_found"], values["extracted_answer"]) == (0.0, 0.0, "")


@pytest.mark.parametrize(
    "truth",
    [72, 72.0, "72", "$72$", r"\$72", "72 dollars", [1, 72], {"target": ["72"]}, "6*12=72\n#### 72"]
    + [r"So it is $\boxed{72}$, as $\boxed{72}>0$.", "The answer is 72."],
)
def test_a_truth_may_be_a_number_a_text_a_list_or_a_solution(truth):
    assert score(r"\boxed{72}", truth) == 1.0
    assert score(r"\boxed{73}", truth) == 0.0


@pytest.mark.parametrize(
    ("truth", "cause"),
    [
        ("", "empty"),
        (r"\frac{1}{", "cannot read the truth"),
        ("\frac{1}{2}", "write two backslashes"),
        ("1+" * 3000 + "1", "1 to 4000 characters"),
    ],
)
def test_a_truth_that_cannot_be_read_is_an_error_before_the_first_step(truth, cause):
    rewards = math_rewards()
    prompts = [
        Prompt("q", answer="5"),
        Prompt("q", answer=truth, index=7, source="set", columns={"final": truth}),
    ]
    with pytest.raises(ValueError, match=rf"'math': row 7 of set, column .*{cause}"):
        rewards.check_data(prompts)


def test_a_truth_that_cannot_be_read_is_compared_as_a_text_where_the_options_say_so():
    truth = r"\{x \mid x \text{ is even}\} \frac{"
    check_truth(Prompt("q", answer=truth), unreadable_truths="text")
    assert score(f"<answer>{truth}</answer>", truth, unreadable_truths="text") == 1.0
    assert score(r"\boxed{2}", truth, unreadable_truths="text") == 0.0


def test_truths_are_checked_on_any_thread():
    with ThreadPoolExecutor() as pool:
        pool.submit(check_truth, Prompt("q", answer=r"\frac{17}{19}")).result()
        with pytest.raises(ValueError, match="cannot read the truth"):
            pool.submit(check_truth, Prompt("q", answer=r"\frac{17}{")).result()


def test_truths_of_one_form_are_read_once():
    before = parsed_truth.cache_info().misses
    for n in range(50):
        check_truth(Prompt("q", answer=rf"\frac{{{n + 1}}}{{{n + 7}}}-x"))
    assert parsed_truth.cache_info().misses <= before + 1
    with pytest.raises(ValueError, match="cannot read the truth"):
        check_truth(Prompt("q", answer=r"\frac{18}{"))


def test_small_numbers_are_compared_to_their_third_digit():
    assert score(r"\boxed{0.0000001}", "0.0000001") == 1.0
    assert score(r"\boxed{0.0000002}", "0.0000001") == 0.0
    assert score(r"\boxed{0}", r"2.5 \times 10^{-8}") == 0.0


def test_options_are_checked_before_the_first_step():
    with pytest.raises(ValueError, match="extract"):
        math_rewards(extract="all")
    with pytest.raises(ValueError, match="below rewards.timeout_s"):
        math_rewards(timeout_s=60.0)
    with pytest.raises(ValueError, match="timeout_s above 0"):
        math_rewards(timeout_s=0.0)


def test_it_runs_in_a_worker_process_also_where_functions_run_on_threads():
    choice = WeightedChoice(name="math")
    rewards = build_rewards(RewardsConfig(functions=(choice,), isolation="thread"))
    answers = rows(RIGHT, answer="5")
    rewards.attempt(answers)
    rewards.close()
    assert answers[0].scores == {"math": 1.0, "accuracy": 1.0, "answer_found": 1.0, "checker_stopped": 0.0}
    assert answers[0].extras == {"extracted_answer": r"\frac{10}{2}"}


def test_the_package_is_loaded_by_its_first_call_only_and_its_absence_is_one_message():
    program = (
        "import sys; import verl.rewards.library.math_verification as m\n"
        "assert not {'math_verify', 'sympy', 'torch', 'pydantic'} & set(sys.modules)\n"
        "sys.modules['math_verify'] = None\n"
        "m.importlib.util.find_spec = lambda name: None\n"
        "m.prepare()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.endswith(
        "need the package math-verify, which is not installed; pip install math-verify\n"
    )


@pytest.mark.parametrize(
    "response",
    [
        "\u7b54\u6848\u662f42\u3002",
        "\u7b54\u6848\uff1a42",
        "\u7b54\u3048\u306f42\u3067\u3059\u3002",
        "\u041e\u0442\u0432\u0435\u0442: 42",
        "It costs \\$42.",
    ],
)
def test_an_expression_is_found_among_words_of_any_script_and_behind_money(response):
    assert score(response, "42") == 1.0
    assert score(response, "41") == 0.0


def test_boxes_that_are_listed_are_not_the_thousands_of_a_number():
    listed = r"\boxed{1}, \boxed{234}"
    assert score(listed, "1234") == score(r"\boxed{1234}", listed) == 0.0
    assert score(listed, "1, 234") == score(listed, listed) == 1.0
