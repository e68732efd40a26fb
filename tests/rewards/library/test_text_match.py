import datetime
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from verl.config.data import RewardsConfig
from verl.data.trajectory import Trajectory
from verl.rewards.functions import build_rewards
from verl.rewards.library.spellings import check_normal_spellings as check_reference
from verl.rewards.library.spellings import spellings
from verl.rewards.library.text_match import exact, position_share, prefix_share
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


DAY = datetime.date(2024, 5, 1)
SPELLINGS = [
    (" 42\n", ("42",)),
    (42.0, ("42", "42.0")),
    (0.5, ("0.5",)),
    (float(np.float32(0.1)), ("0.10000000149011612", "0.1")),
    (float(np.float16(0.1)), ("0.0999755859375", "0.099975586", "0.1")),
    (1e-7, ("1e-07", "0.0000001")),
    (1e300, (str(int(1e300)), "1e+300")),
    (True, ("true", "True")),
    (np.int64(7), ("7",)),
    (np.bool_(False), ("false", "False")),
    (np.array(["a", "b"]), ("a", "b")),
    (Decimal("1.50"), ("1.50", "1.5")),
    (Decimal("1E+2"), ("100",)),
    (Fraction(3, 4), ("3/4",)),
    (Fraction(4, 1), ("4",)),
    (DAY, ("2024-05-01",)),
    (datetime.datetime(2024, 5, 1), ("2024-05-01", "2024-05-01T00:00:00", "2024-05-01 00:00:00")),
    (datetime.datetime(2024, 5, 1, 9, 30), ("2024-05-01T09:30:00", "2024-05-01 09:30:00")),
    (["42", "forty-two", 42.0], ("42", "forty-two", "42.0")),
    ({"target": ["42", "43"], "numbers": None}, ("42", "43")),
    ({"ground_truth": "42"}, ("42",)),
]


@pytest.mark.parametrize(("reference", "texts"), SPELLINGS, ids=lambda value: str(value)[:30])
def test_a_reference_that_is_no_text_has_its_plain_spellings(reference, texts):
    assert spellings(reference) == texts
    for text in texts:
        assert exact(answered(f"{text}\n", reference)) == {"reward": 1.0, "accuracy": 1.0}
    assert exact(answered("no", reference))["reward"] == 0.0


REFUSED = [
    None,
    float("nan"),
    float("inf"),
    Decimal("NaN"),
    [],
    np.array([]),
    {},
    [None],
    [["a"]],
    {"target": 98, "numbers": [1, 2]},
    {"text": ["a"]},
    b"42",
    "",
    " ",
    ["42", ""],
    object(),
    datetime.timedelta(1),
]


@pytest.mark.parametrize("reference", REFUSED, ids=lambda value: type(value).__name__)
def test_a_reference_without_a_plain_spelling_is_refused_before_the_first_step(reference):
    prompts = [Prompt("q", "1", "set", 0), Prompt("q", reference, "set", 1)]
    functions = build_rewards(RewardsConfig(functions=("exact",)))
    with pytest.raises(ValueError, match="'exact': row 1 of set, column 'answer' .*: need a reference"):
        functions.check_data(prompts)
    build_rewards(RewardsConfig(), lambda prompt, response: 1.0).check_data(prompts)


def test_a_refused_reference_is_named_by_its_column():
    prompt = Prompt("q", None, "set", 3, {"reward_model": {"ground_truth": None}})
    with pytest.raises(ValueError, match="row 3 of set, column 'reward_model.ground_truth': .*got none"):
        check_reference(prompt)
    dates = {"year": 2024}
    with pytest.raises(ValueError, match="row 0 of the data, column 'solution': .*got dict {'year': 2024}"):
        check_reference(Prompt("q", dates, columns={"solution": dates}))


def test_of_several_spellings_the_best_share_counts():
    assert position_share(answered("abcx", ["zzzz", "abcd"])) == {"reward": 0.75, "accuracy": 0.0}
    assert prefix_share(answered("xyz", ["abc", "xyz"])) == {"reward": 1.0, "accuracy": 1.0}
