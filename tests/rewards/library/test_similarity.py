import pytest

from verl.rewards.library.similarity import f1, repetition, similarity


def test_f1_counts_common_words_in_the_form_of_squad():
    assert f1("The cat sat.", "a cat") == pytest.approx(2 / 3)
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert (f1("dog", "cat"), f1("", "cat")) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("method", "value"),
    [("ratio", 0.5), ("token_sort", 1.0), ("token_set", 1.0), ("partial", 0.5), ("f1", 1.0)],
)
def test_methods(method, value):
    made = similarity("b a", "a b", method=method)["reward"]
    assert made == value or (method in ("ratio", "partial") and 0 < made < 1)


def test_the_most_alike_reference_counts_and_the_threshold_says_what_is_right():
    assert similarity("PARIS\u00a0", ["Rome", "Paris"]) == {"reward": 1.0, "accuracy": 1.0}
    made = similarity("abcd", "abcx", threshold=0.75)
    assert made == {"reward": 0.75, "accuracy": 1.0}
    assert similarity("abcd", "abcx")["accuracy"] == 0.0
    assert similarity("<think>or abcd</think>abcx", "abcx")["accuracy"] == 1.0
    assert similarity("x", "x", extract="boxed") == {"reward": 0.0, "accuracy": 0.0}


def test_repetition_is_the_share_of_ngrams_that_were_there_before():
    assert repetition("a b c a b c") == pytest.approx(-0.25)
    assert repetition("a a a a", ngram=1) == -0.75
    assert (repetition("a b"), repetition("")) == (0.0, 0.0)
    assert repetition("\u54c8\u54c8\u54c8\u54c8", ngram=2, unit="characters") == pytest.approx(-2 / 3)
