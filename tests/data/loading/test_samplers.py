"""Orders of prompts: easy to hard, by the measured pass rate, and samplers of the user."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from verl.config.fields import Choice
from verl.data.loading.pass_rate import PassRateWindow
from verl.data.loading.prompt_loader import PromptLoader
from verl.data.loading.prompt_sampler import EasyToHard, GroupFeedback
from verl.utils.sampling_types import Prompt

OWN = """
from verl.data.loading.prompt_sampler import PromptSampler

class Last(PromptSampler):
    def __init__(self, prompts, *, seed, shuffle, step=1):
        super().__init__(prompts, seed=seed, shuffle=shuffle)
        self.step, self.rates = step, {}

    def draw(self, n):
        return [(-1 - i * self.step) % self.num_prompts for i in range(n)]

    def observe(self, position, feedback):
        self.rates[position] = feedback.pass_rate

    def metrics(self):
        return {"curriculum/seen": float(len(self.rates))}

    def state_dict(self):
        return {"rates": dict(self.rates)}

    def load_state_dict(self, state):
        self.rates = dict(state["rates"])

class Sized(Last):
    def __init__(self, prompts, *, seed, shuffle, size): ...

def function(prompts): ...
"""


def prompts(count, **columns):
    return [
        Prompt("1" * (count - i), index=i, columns={k: v[i] for k, v in columns.items()})
        for i in range(count)
    ]


def positions(loader, n):
    return [prompt.index for prompt in loader.take(n)]


def test_easy_prompts_come_first_in_the_first_epochs_and_then_the_usual_order():
    rows = prompts(6, level=["3", 1, 2.0, 1, 3, 2])
    loader = PromptLoader(
        rows,
        seed=0,
        shuffle=True,
        curriculum=Choice.model_validate({"name": "easy_to_hard", "column": "level"}),
    )
    first = positions(loader, 6)
    assert [set(first[:2]), set(first[2:4]), set(first[4:])] == [{1, 3}, {2, 5}, {0, 4}]
    assert positions(loader, 6) == positions(PromptLoader(rows, seed=0, shuffle=True), 12)[6:]
    assert EasyToHard(rows, seed=0, shuffle=False).draw(6) == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("value", [None, "hard", float("nan")])
def test_a_row_without_a_number_is_named(value):
    with pytest.raises(ValueError, match="need a number in the column 'level' .* in row 1 of the data"):
        EasyToHard(prompts(2, level=[1, value]), seed=0, shuffle=True, column="level")


def test_the_pass_rate_is_the_mean_accuracy_or_a_reward_from_0_to_1():
    assert GroupFeedback([9.0, -3.0], [1.0, 0.0]).pass_rate == 0.5
    assert GroupFeedback([1.0, 0.5]).pass_rate == 0.75
    with pytest.raises(ValueError, match=r"need the accuracy .* got rewards \[2.0\]"):
        _ = GroupFeedback([2.0]).pass_rate


def answered(sampler, n, skill):
    """Draws n prompts, and reports the pass rates that `skill` gives them."""
    drawn = sampler.draw(n)
    for position in drawn:
        sampler.observe(position, GroupFeedback([skill(position)]))
    return drawn


def test_untried_prompts_come_first_then_those_of_the_window_and_a_few_others():
    sampler = PassRateWindow(prompts(100), seed=1, shuffle=True, low=0.2, high=0.8, retry=0.1)
    assert sorted(answered(sampler, 100, lambda i: i / 99)) == list(range(100))
    shares = sampler.metrics()
    assert shares["curriculum/untried_share"] == 0 and shares["curriculum/inside_share"] == 0.6
    assert (shares["curriculum/below_share"], shares["curriculum/above_share"]) == (0.2, 0.2)
    drawn = [i for _ in range(60) for i in answered(sampler, 10, lambda i: i / 99)]
    inside = sum(20 <= i < 80 for i in drawn)
    assert inside == 540  # 9 of 10, the rest are tried again
    counts = Counter(drawn)
    assert {counts[i] for i in range(20, 80)} <= {7, 8, 9, 10, 11}
    assert {counts[i] for i in [*range(20), *range(80, 100)]} <= {1, 2}


def test_the_window_moves_as_the_policy_learns():
    sampler, level = PassRateWindow(prompts(60), seed=0, shuffle=True, low=0.2, high=0.8), 0.0
    levels = []
    for _ in range(40):  # a prompt is answered if the policy has reached its level
        drawn = answered(sampler, 12, lambda i: min(1.0, max(0.0, (level - i) / 20 + 0.5)))  # noqa: B023
        levels.append(sum(drawn) / 12)
        level += 1.5
    assert levels[8] < levels[20] < levels[38] and levels[38] > 35


def test_prompts_in_flight_do_not_come_again_while_there_are_others():
    sampler = PassRateWindow(prompts(10), seed=0, shuffle=True)
    drawn = sampler.draw(10)
    for position in drawn[:6]:
        sampler.observe(position, GroupFeedback([0.5]))
    assert set(sampler.draw(6)) == set(drawn[:6])
    assert len(sampler.draw(25)) == 25


def test_part_of_the_draws_may_go_to_known_prompts_before_all_are_tried():
    sampler = PassRateWindow(prompts(100), seed=0, shuffle=True, untried=0.5)
    drawn = [i for _ in range(10) for i in answered(sampler, 8, lambda i: 0.5)]
    assert len(set(drawn)) == 8 + 9 * 4


def test_a_sampler_goes_on_from_its_state():
    def made():
        return PassRateWindow(prompts(30), seed=3, shuffle=True, retry=0.3, untried=0.7)

    one, other, skill = made(), made(), random.Random(0)
    for _ in range(9):
        answered(one, 5, lambda i: skill.random())
    other.load_state_dict(one.state_dict())
    for _ in range(20):
        assert answered(one, 5, lambda i: i / 30) == answered(other, 5, lambda i: i / 30)


def test_options_out_of_their_bounds_are_refused():
    for options in ({"low": 0.9, "high": 0.1}, {"retry": 2}, {"untried": 0}):
        with pytest.raises(ValueError, match="need 0 <= low <= high <= 1, 0 <= retry <= 1"):
            PassRateWindow(prompts(2), seed=0, shuffle=True, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pass_rate", {"lo": 0.1}, r"takes \(low, high, retry, untried\), got lo; the nearest is low"),
        ("pass_rate", {"low": "few"}, "data.curriculum pass_rate, option low: .*number.*; got 'few'"),
        ("easy_to_hard", {"epoch": 2}, r"takes \(column, epochs\), got epoch; the nearest is epochs"),
        ("off", {"low": 0.1}, r"data.curriculum off takes \(none\), got low$"),
    ],
)
def test_an_option_that_is_none_is_refused_with_those_that_there_are(name, options, message):
    choice = Choice.model_validate({"name": name, **options})
    with pytest.raises(ValueError, match=message):
        PromptLoader(prompts(2), seed=0, shuffle=True, curriculum=choice)


def own(folder, name, **options):
    (folder / "own.py").write_text(OWN)
    return Choice.model_validate({"name": f"{folder / 'own.py'}:{name}", **options})


def test_a_sampler_of_the_user_draws_observes_and_is_saved(tmp_path):
    rows, choice = prompts(5), own(tmp_path, "Last", step=2)
    loader, restored = (PromptLoader(rows, seed=0, shuffle=True, curriculum=choice) for _ in range(2))
    assert positions(loader, 3) == [4, 2, 0]
    loader.observe(rows[2], GroupFeedback([1.0]))
    assert loader.take_metrics() == {"curriculum/seen": 1.0} and loader.epochs == 3 / 5
    restored.load_state_dict(loader.state_dict())
    assert restored.sampler.rates == {2: 1.0} and restored.epochs == 3 / 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("function", {}, "need a subclass of .*PromptSampler for data.curriculum"),
        ("Last", {"speed": 1}, r"need options that data.curriculum .*:Last takes \(step\), got speed"),
        ("Sized", {}, "cannot be made of {}: .*'size'"),
        ("First", {}, "need a function 'First'"),
    ],
)
def test_a_sampler_that_is_none_is_refused(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        PromptLoader(prompts(2), seed=0, shuffle=True, curriculum=own(tmp_path, name, **options))


def test_unknown_curricula_and_the_state_of_another_one_are_refused():
    with pytest.raises(ValueError, match="one of off, pass_rate, easy_to_hard .* got 'pass'; the nearest is"):
        PromptLoader(prompts(2), seed=0, shuffle=True, curriculum=Choice(name="pass"))
    state = PromptLoader(prompts(2), seed=0, shuffle=True).state_dict()
    with pytest.raises(ValueError, match="curriculum was None and is {'name': 'pass_rate'}"):
        PromptLoader(prompts(2), seed=0, shuffle=True, curriculum=Choice(name="pass_rate")).load_state_dict(
            state
        )


@pytest.mark.parametrize("name", ["easy_to_hard", "pass_rate"])
def test_a_run_does_not_go_on_without_its_curriculum(name):
    before = PromptLoader(prompts(4), seed=0, shuffle=True, curriculum=Choice(name=name))
    before.take(2)
    with pytest.raises(ValueError, match="curriculum was .* and is None"):
        PromptLoader(prompts(4), seed=0, shuffle=True).load_state_dict(before.state_dict())


def test_columns_that_a_reward_may_read_are_part_of_the_state():
    state, other = (
        PromptLoader(prompts(2, level=level), seed=0, shuffle=True).state_dict() for level in ([1, 2], [1, 3])
    )
    loader = PromptLoader(prompts(2, level=[1, 2]), seed=0, shuffle=True)
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match="columns was .* start afresh"):
        loader.load_state_dict(other)
    del other["columns"]  # of an earlier version
    loader.load_state_dict(other)


def test_answers_of_any_keys_are_part_of_the_fingerprint():
    loaders = [
        PromptLoader([Prompt("a", {(1, 2): value})], seed=0, shuffle=True).state_dict() for value in (3, 3, 4)
    ]
    assert loaders[0] == loaders[1] != loaders[2]
