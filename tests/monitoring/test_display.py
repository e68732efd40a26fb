"""Curves and tables of answers, in the terminal and as PNG."""

from __future__ import annotations

import math
import sys

from tests.monitoring.trackers import screen
from verl.monitoring.display import samples_table, save_curve, terminal_curve


def test_a_curve_rises_from_the_lower_left_to_the_upper_right():
    lines = terminal_curve([0.0, 1.0, 2.0, 3.0], width=30, height=4, title="reward").splitlines()
    assert lines[0] == "reward"
    assert [line.split(" ")[0] for line in lines[1:5]] == ["3.000", "", "1.000", "0.000"]
    starts = [len(line) - len(line.split("┤")[1].lstrip()) for line in lines[1:5]]
    assert starts == sorted(starts, reverse=True) and len(set(starts)) == 4
    assert max(map(len, lines)) == 30 and lines[-1].split() == ["1", "4"]


def test_a_straight_line_has_its_dots_on_one_level():
    middle = [
        line
        for line in terminal_curve([2.0] * 9, width=20, height=3).splitlines()
        if "⠤" in line or "⠒" in line
    ]
    assert len(middle) == 1 and set(middle[0].split("┤")[1]) <= {"⠤", "⠒"}


def test_many_values_are_averaged_and_those_that_are_not_finite_bridged():
    noisy = [index % 2 + math.sin(index / 1000) for index in range(10_000)]
    assert max(map(len, terminal_curve(noisy, width=40).splitlines())) == 40
    bridged = terminal_curve([0.0, math.nan, 2.0], width=20, height=3)
    assert bridged == terminal_curve([0.0, 1.0, 2.0], width=20, height=3)
    assert terminal_curve([math.nan], title="reward") == "reward: no finite values"


def test_several_curves_have_a_letter_each_and_a_legend():
    text = terminal_curve({"ppo": [1.0, 1.0], "grpo": [0.0, 0.0]}, width=20, height=3)
    top, _, bottom, *_, legend = text.splitlines()
    assert set(top.split("┤")[1]) == {"a"} and set(bottom.split("┤")[1]) == {"b"}
    assert legend == "a ppo   b grpo"


def test_a_saved_curve_is_a_picture_and_leaves_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    save_curve(
        tmp_path / "new" / "reward.png",
        [1, 2, 3],
        [0.1, 0.5, math.nan],
        title="reward",
        ylabel="reward per answer",
    )
    assert (tmp_path / "new" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_the_table_of_samples_shows_text_as_it_is_and_lets_nothing_steer_the_terminal():
    console = screen(width=100)
    rows = [
        {"prompt": "2 + 2 [red]?", "response": "\x1b[2Jfour", "reference": 4, "reward": 0.5},
        {"prompt": "x" * 5000},
    ]
    console.print(samples_table(rows))
    text = console.file.getvalue()
    assert all(
        part in text for part in ("prompt", "answer", "reference", "2 + 2 [red]?", "four", "0.500", "…")
    )
    assert "\x1b" not in text and text.count("x") < 700
