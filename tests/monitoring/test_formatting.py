"""Numbers and durations in few characters, and text that cannot steer the terminal."""

from __future__ import annotations

import math

import pytest

from verl.monitoring.formatting import format_countdown, format_duration, format_number, printable


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7140, "119 min"),
        (7500, "2 h 05 min"),
        (4e5, "4 d 15 h"),
    ],
)
def test_durations_have_few_digits(seconds, words):
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "text"), [(245, "4:05"), (3723, "1:02:03"), (273_600, "3d 04h"), (math.nan, "-")]
)
def test_countdowns_fit_into_a_narrow_column(seconds, text):
    assert format_countdown(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (12.345, "12.35"), (-999.99, "-1000.0"), (12345.0, "12.3k"), (4e-4, "4.0e-04")],
)
def test_numbers_have_about_four_digits_in_at_most_seven_characters(value, text):
    assert format_number(value) == text and len(text) <= 7


def test_control_characters_become_spaces():
    assert printable("a\x1b[2Jb\nc") == "a [2Jb c"
    assert printable("a\nb\x07", keep_newlines=True) == "a\nb "
