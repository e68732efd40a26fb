"""Rewards of public data sets by the name in their column `data_source`, as verl chooses them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from verl.config.data import WeightedChoice

_GSM8K = (WeightedChoice(name="gsm8k"),)
_MATH = (WeightedChoice(name="math"),)
_CODE = (WeightedChoice(name="code"),)
_QUESTIONS = (
    WeightedChoice.model_validate({"name": "exact", "extract": "answer_tag", "normalize": "squad"}),
)
_GEOMETRY = (
    WeightedChoice(name="math", weight=0.9),
    WeightedChoice.model_validate(
        {"name": "format", "weight": 0.1, "pattern": r"<think>.*</think>.*\\boxed\{.*\}.*"}
    ),
)
# Name of a data set, or a pattern of names -> its functions. From verl, `default_compute_score` in
# verl/utils/reward_score, where each name has a scorer of its own.
DATA_SOURCES: dict[str, tuple[WeightedChoice, ...]] = {
    "openai/gsm8k": _GSM8K,
    "lighteval/MATH": _MATH,
    "DigitalLearningGmbH/MATH-lighteval": _MATH,
    "HuggingFaceH4/MATH-500": _MATH,
    "math": _MATH,
    "math_dapo*": _MATH,
    "aime*": _MATH,
    "numina_*": _MATH,
    "hiyouga/geometry3k": _GEOMETRY,
    "searchR1_*": _QUESTIONS,
    "codecontests": _CODE,
    "apps": _CODE,
    "codeforces": _CODE,
    "taco": _CODE,
}


def choices_of(source: str) -> tuple[WeightedChoice, ...] | None:
    """Reward functions of a data set by its name, also as OWNER/NAME:CONFIG; None for an unknown one."""
    name = source.partition(":")[0]
    return next((found for pattern, found in DATA_SOURCES.items() if fnmatchcase(name, pattern)), None)


def unknown_source(source: str) -> str:
    """Message on a data set that is not in the table."""
    return (
        f"need a public data set whose reward is known, got data_source {source!r}; known are "
        f"{', '.join(DATA_SOURCES)}; name the function in rewards.functions, in the reward of the source, or "
        "in a column (rewards.column)"
    )


def described_choices(sources: Sequence[str]) -> str:
    """Functions that data sets choose, in words: "openai/gsm8k: gsm8k"."""
    return "; ".join(f"{s}: {' + '.join(c.name for c in choices_of(s) or ())}" for s in sources)
