import pytest

from verl.rewards.library.containment import contains, has_text, prepare_contains


@pytest.mark.parametrize(
    ("text", "wanted", "has"),
    [
        ("it is 5.", "5", True),
        ("15", "5", False),
        ("5.3", "5", False),
        ("3.5", "5", False),
        ("-5", "5", False),
        ("3-5", "5", True),
        ("x=-5", "-5", True),
        ("3-5", "-5", False),
        ("1,500", "500", False),
        ("4, 5", "5", True),
        ("concatenate", "cat", False),
        ("the cat, sat", "cat", True),
        ("\u7b54\u6848\u662f\u5317\u4eac\u5e02", "\u5317\u4eac", True),
        ("5 5.3", "5", True),
        ("so _cat_ it is", "cat", True),
        ("my_cat_food", "cat", False),
    ],
)
def test_a_text_counts_as_a_whole_word_or_number(text, wanted, has):
    assert has_text(text, wanted, words=True) == has
    assert has_text(text, wanted, words=False)


def test_any_or_all_of_the_references_and_none_of_the_forbidden():
    right = {"reward": 1.0, "accuracy": 1.0}
    assert contains("It is Paris, I think", ["Rome", "paris"]) == right
    assert contains("It is Paris, I think", ["Rome", "paris"], mode="all")["reward"] == 0.0
    assert contains("Rome and Paris", ["Rome", "paris"], mode="all", not_contains=["I"]) == right
    assert contains("Paris, I think", "paris", not_contains=["i think"])["reward"] == 0.0
    assert contains("paris", "Paris", ignore_case=False)["reward"] == 0.0
    assert contains("it costs 42", 42.0) == right
    assert contains("it costs 1,042.5", 1042.5) == contains("1042", "1,042") == right
    assert contains("one of 1,042,7", "1042")["reward"] == 0.0


def test_texts_of_the_options_are_looked_for_in_place_of_the_reference():
    assert contains("yes", None, texts=["yes", "no"]) == {"reward": 1.0}
    assert contains("<think>no</think>", None, texts=["yes", "no"], extract="whole") == {"reward": 1.0}
    with pytest.raises(ValueError, match="got an empty one"):
        prepare_contains(not_contains=[" "])
    with pytest.raises(ValueError, match="at least one text in texts"):
        prepare_contains(texts=[])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>Rome? Paris?</think>It is Rome.", 0.0),
        ("<think>Rome? Paris?", 0.0),
        ("Rome? Paris?</think>It is Paris.", 1.0),  # the chat template has opened the thoughts
        ("Paris", 1.0),
    ],
)
def test_thoughts_are_no_answer(text, reward):
    assert contains(text, "Paris")["reward"] == reward
