import pytest

from verl.data.batch import Trajectory
from verl.rewards.text_match import exact, position_share, prefix_share
from verl.utils.sampling_types import Prompt


def answered(text, answer):
    return Trajectory(Prompt("q", answer=answer), [1], [2], [True], None, [0], 0, text=text)


@pytest.mark.parametrize(
    ("text", "answer", "right"), [(" 42\n", "42", 1.0), ("42", 42, 1.0), ("4 2", "42", 0.0), ("", "42", 0.0)]
)
def test_exact_compares_stripped_texts(text, answer, right):
    assert exact(answered(text, answer)) == {"reward": right, "accuracy": right}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("abcd", 1.0),
        ("abxd", 0.75),
        ("ab", 0.5),
        ("xxabcd", 0.0),
        ("abcdabcd", 0.5),
        ("", 0.0),
        ("dcba", 0.0),
    ],
)
def test_position_share_counts_right_positions_and_longer_answers_lose(text, share):
    assert position_share(answered(text, "abcd")) == {"reward": share, "accuracy": float(text == "abcd")}


@pytest.mark.parametrize(
    ("text", "share"), [("abcd", 1.0), ("abxd", 0.5), ("xbcd", 0.0), ("abc", 0.75), ("abcdx", 1.0), ("", 0.0)]
)
def test_prefix_share_stops_at_the_first_error(text, share):
    assert prefix_share(answered(text, "abcd")) == {"reward": share, "accuracy": float(text == "abcd")}


@pytest.mark.parametrize("function", [exact, position_share, prefix_share])
def test_an_empty_reference_is_met_by_an_empty_answer_and_a_missing_one_is_an_error(function):
    assert function(answered("", ""))["reward"] == 1.0
    with pytest.raises(ValueError, match="data.answer_key"):
        function(answered("42", None))
