import pytest

from tests.rewards.answers import rows
from verl.config.data import RewardsConfig
from verl.rewards.functions import build_rewards
from verl.rewards.library.patterns import format_tags, prepare_format, prepare_regex, regex

GOOD = "<think>a\nb</think>\n<answer>c</answer>\n"


@pytest.mark.parametrize(
    ("text", "options", "value"),
    [
        (GOOD, {}, 1.0),
        ("x" + GOOD, {}, 0.0),
        ("x" + GOOD, {"text_outside": True}, 1.0),
        ("x" + GOOD, {"partial": True}, 2 / 3),
        ("<answer>c</answer><think>a</think>", {}, 0.0),
        ("<answer>c</answer><think>a</think>", {"partial": True, "text_outside": True}, 0.5),
        (GOOD + GOOD, {}, 0.0),
        ("<think>a<answer>c</answer></think>", {}, 0.0),
        ("<think>a</think>", {"partial": True}, 2 / 3),
        ("", {"partial": True, "text_outside": True}, 0.0),
        ("<think>a</think> c", {"tags": ["think"], "text_outside": True}, 1.0),
        ("<think>a</think> \\boxed{1}", {"pattern": r"<think>.*</think>.*\\boxed\{.*\}"}, 1.0),
        ("a</think> \\boxed{1}", {"pattern": r"<think>.*</think>.*\\boxed\{.*\}"}, 0.0),
    ],
)
def test_tags_come_once_and_in_their_order(text, options, value):
    assert format_tags(text, **options) == pytest.approx(value)


def test_a_prompt_that_opens_the_first_tag_opens_it_for_the_answer():
    opened = "<|assistant|>\n<think>\n"
    assert format_tags("a</think><answer>c</answer>", opened) == 1.0
    assert format_tags(GOOD, opened) == 1.0
    assert format_tags("a</think><answer>c</answer>", "<|assistant|>\n") == 0.0
    assert format_tags("a</think> c", opened, pattern="<think>.*</think>.*") == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tags": []}, "need names of tags"),
        ({"tags": ["<think>"]}, "need names of tags"),
        ({"tags": ["a", "a"]}, "each once"),
        ({"tags": ["a"], "pattern": "a"}, "either tags or a pattern"),
        ({"pattern": "("}, "need a regular expression, got '\\('"),
    ],
)
def test_options_of_the_form_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        prepare_format(**options)


def test_a_match_or_the_text_of_its_group_gives_the_reward():
    assert regex("I am sure: yes", pattern=r"\byes\b") == {"score": 1.0}
    assert regex("I am sure: yes", pattern="yes", mode="full") == {"score": 0.0}
    assert regex("YES", pattern="yes", mode="full", flags=["ignorecase"]) == {"score": 1.0}
    made = regex("#### 1\n#### \uff14\uff12", 42.0, pattern=r"#### (?P<n>\S+)", group="n")
    assert made == {"score": 1.0, "acc": 1.0, "matched": "\uff14\uff12"}
    assert regex("#### 1 #### 42", 42, pattern=r"#### (\S+)", group=1, occurrence="first")["score"] == 0.0
    assert regex("none", 42, pattern=r"#### (\S+)", group=1) == {"score": 0.0, "acc": 0.0, "matched": ""}
    assert regex("I say 42", 42, pattern=r"(\d*)", group=1)["matched"] == "42"
    with pytest.raises(ValueError, match="got an empty one"):
        prepare_regex(pattern="")
    with pytest.raises(ValueError, match=r"need a group of the pattern .* \(0, 1, n\), got 2"):
        prepare_regex(pattern="(?P<n>a)", group=2)


def test_a_pattern_without_end_costs_its_own_answer_alone():
    choice = {"name": "regex", "pattern": r"(a+)+b", "mode": "full"}
    functions = build_rewards(RewardsConfig(functions=(choice,), timeout_s=0.5))
    bad, good = trajectories = rows("a" * 40, "aab")
    functions.attempt(trajectories)
    functions.close()
    assert (bad.reward, bad.outcome, good.reward) == (None, "reward_timeout", 1.0)
