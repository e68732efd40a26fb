"""The part of an answer that is compared, and the spellings that count as equal."""

import pytest

from verl.rewards.library.extraction import extracted
from verl.rewards.library.normalization import loose, squad, unicode_plain, without_markup


@pytest.mark.parametrize(
    ("text", "extract", "part"),
    [
        (" a \n", "whole", "a"),
        ("x<answer> 1 </answer><answer>2</answer>", "answer_tag", "2"),
        ("<answer>2", "answer_tag", None),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "boxed", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2", "boxed", "1"),
        ("\\fbox{3}", "boxed", "3"),
        ("no box", "boxed", None),
        ("a\nb\n\n", "last_line", "b"),
        ("  ", "last_line", None),
        ("x #### 1 #### 2", {"after": "####"}, "2"),
        ("x", {"after": "####"}, None),
        ("<think>a</think> b", "after_think", "b"),
        ("a</think> b", "after_think", "b"),
        ("b <think>a", "after_think", "b"),
        ("b", "after_think", "b"),
        ("<think>\\boxed{1}</think>\\boxed{2}", ["after_think", "boxed"], "2"),
        ("<think>\\boxed{1}</think>2", ["after_think", "boxed"], None),
    ],
)
def test_the_part_that_is_compared(text, extract, part):
    assert extracted(text, extract) == part


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\uff14\uff12", "42"),
        ("1\u00a0000", "1 000"),
        ("\u22125 \u2013 3", "-5 - 3"),
        ("\u201cit\u2019s\u201d", '"it\'s"'),
        ("e\u0301", "\u00e9"),
        ("\u200b4\ufeff2", "42"),
        ("\U0001d401", "B"),
        ("\u0664\u0662", "42"),
        ("x\u00b2 \u00bd", "x\u00b2 \u00bd"),
        ("a\n\t b ", "a b"),
    ],
)
def test_one_spelling_of_characters(text, plain):
    assert unicode_plain(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("**Paris**.", "Paris"),
        ("$5$", "5"),
        ("\\( x \\)", "x"),
        ("\\boxed{\\text{Paris}}", "Paris"),
        ("`x`", "x"),
        ('"Paris."', "Paris"),
        ("*a* and *b*", "*a* and *b*"),
        ("5!", "5!"),
        ("{a}", "a"),
        ("f'", "f'"),
    ],
)
def test_markup_around_an_answer_is_left_out(text, plain):
    assert without_markup(text) == plain


def test_loose_and_squad_forms():
    assert loose("**PARIS**\uff0e ") == "paris"
    assert squad("The  Beatles' (band)") == "beatles band"
    assert squad("A") == "a"
