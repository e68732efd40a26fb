import pytest

from verl.rewards.library.choice import check_choice, choice, chosen_label, options_of, right_label
from verl.utils.sampling_types import Prompt

CITIES = ["London", "Paris", "Rome", "Berlin"]


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b.",
        "(B)",
        "[B]",
        "**B**",
        "\uff22",
        "B: Paris",
        "B. Paris",
        "Answer: B",
        "**Answer:** (B) Paris",
        "Answer: **B) Paris**",
        "the answer is (B)",
        "The answer is B.",
        "The correct answer to this question is option B.",
        "\\boxed{B}",
        "It is A? No: $\\boxed{\\text{B}}$",
        "<think>maybe A</think><answer>B</answer>",
        "The answer is A. Wait, the answer is B.",
        "Option A is wrong. Option B is correct.",
        "(C) is wrong, so I choose (B).",
        "Reasons about A.\n\n**B. Paris**",
        "paris.",
        "The answer is Paris.",
        "Among A, B, C and D the best choice would be B.",
        "\u7b54\u6848\u662fB",
        "My answer is:\nB",
        'The answer is "B".',
        "The answer is 'B'",
        "Ans: B",
        "# B",
        "> - **B**",
        '```json\n{"answer": "B"}\n```',
        "B<|im_end|>",
        "Answer choice B",
        "\u7b54\u6848\u9009B\u3002",
        "\u6545\u9009\uff1aB\u3002",
        "\u6b63\u89e3\u306fB\u3067\u3059",
        "La respuesta correcta es B.",
        "Die Antwort ist B.",
        "La r\u00e9ponse est (B).",
        "\u041e\u0442\u0432\u0435\u0442: B",
        "The capital of France is Paris.",
        "Paris is the answer.",
    ],
)
def test_an_option_is_named_by_its_letter_or_its_text(text):
    assert chosen_label(text, options_of(CITIES)) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "E",
        "A, B",
        "(A) and (B)",
        "Answer: A/B",
        "The answer is A or B",
        "<answer>A or B</answer>",
        "Both A and B are correct",
        "A. London is in England\nB. Paris is in France",
        "A dog is an animal",
        "I think about it a lot.",
        "The answer is a city",
        "The answer is not A",
        "A is incorrect",
        "A is not correct",
        "(A) isn't right",
        "The answer cannot be A",
        "It is not London.",
        "London and Paris are capitals.",
        "Not A.",
    ],
)
def test_an_answer_that_names_two_options_or_none_is_not_guessed(text):
    assert chosen_label(text, options_of(CITIES)) is None
    assert choice(text, "A", choices=CITIES) == {"score": 0.0, "acc": 0.0, "chosen": ""}


@pytest.mark.parametrize(
    ("truth", "given"),
    [
        ("B", CITIES),
        ("(b).", None),
        (1, CITIES),
        (1.0, None),
        ("1", {"endings": CITIES}),
        ("Paris", CITIES),
        ("paris", {"text": CITIES, "label": ["A", "B", "C", "D"]}),
        ("B", {"text": CITIES, "label": ["A", "B", "C", "D"]}),
        ("B", {"A": "London", "B": "Paris", "C": None}),
        ("B", [f"{letter}. {city}" for letter, city in zip("ABCD", CITIES, strict=True)]),
    ],
)
def test_the_truth_is_a_letter_a_number_from_zero_or_a_text(truth, given):
    columns = given if isinstance(given, dict) and "endings" in given else {"choices": given}
    assert choice("Answer: B", truth, **columns)["score"] == 1.0
    check_choice(Prompt("q", answer=truth, columns=columns))


def test_labels_that_are_numbers_are_labels():
    options = options_of({"text": ["x", "y", "z"], "label": ["1", "2", "3"]})
    assert (right_label("2", options), chosen_label("The answer is 2.", options)) == ("2", "2")
    assert chosen_label("2.5", options) is None
    assert choice("The answer is (C)", 3, first_index=1)["score"] == 1.0


@pytest.mark.parametrize(
    ("truth", "columns", "message"),
    [
        ("Madrid", {"choices": CITIES}, r"row 0 of the data, column 'answer'.*a letter \(A, B, C, D\)"),
        (None, {}, "got None"),
        (7, {"choices": CITIES}, "got 7"),
        (True, {"choices": CITIES}, "got True"),
        ("Paris", {}, "A to Z, since the row has no column of options"),
        (3, {"options": ["2", "3", "4", "5"]}, "the index of D and the text of B; say which"),
        ("A", {"choices": "A, B"}, "need options as a list of texts"),
    ],
)
def test_a_truth_that_names_no_option_is_refused_before_the_first_step(truth, columns, message):
    with pytest.raises(ValueError, match=message):
        check_choice(Prompt("q", answer=truth, columns=columns))


def test_the_form_of_the_truth_decides_where_two_fit():
    prompt = Prompt("q", answer=3, columns={"answers": ["2", "3", "4", "5"]})
    check_choice(prompt, truth="text", options_key="answers")
    assert choice("B", 3, truth="text", options_key="answers", **prompt.columns)["score"] == 1.0
    assert choice("D", 3, truth="index", options_key="answers", **prompt.columns)["score"] == 1.0
    with pytest.raises(ValueError, match="options of the question in the column 'other', got none"):
        check_choice(prompt, options_key="other")


def test_thoughts_are_no_choice():
    assert choice("<think>The answer is A.</think>B", "B")["acc"] == 1.0
    assert choice("<think>The answer is B", "B")["acc"] == 0.0


def test_an_option_within_another_is_not_named_by_the_longer_one():
    assert chosen_label("He eats a hot dog.", options_of(["a dog", "hot dog", "dog"])) == "B"
