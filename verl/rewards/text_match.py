"""Built-in rewards that compare an answer with its reference, character by character."""

from __future__ import annotations

from verl.data.batch import Trajectory


def exact(trajectory: Trajectory) -> dict[str, float]:
    """1 if the answer is the reference, both stripped of surrounding white space, else 0.

    Returns:
        `reward` and `accuracy`, both that number.

    Raises:
        ValueError: the prompt has no reference answer.
    """
    right = float(trajectory.text.strip() == _reference(trajectory))
    return {"reward": right, "accuracy": right}


def position_share(trajectory: Trajectory) -> dict[str, float]:
    """Share of the positions of the longer of answer and reference that hold the same character in both.

    So an answer that is longer than the reference loses.

    Both are stripped of surrounding white space.

    Returns:
        `reward`, that share in [0, 1], and `accuracy`, 1 if the answer is the reference, else 0.

    Raises:
        ValueError: the prompt has no reference answer.
    """
    text, reference = trajectory.text.strip(), _reference(trajectory)
    num_right = sum(a == b for a, b in zip(text, reference, strict=False))
    return {"reward": _share(num_right, max(len(text), len(reference))), "accuracy": float(text == reference)}


def prefix_share(trajectory: Trajectory) -> dict[str, float]:
    """Share of the reference's characters that the answer holds before its first error.

    A dense reward: each further right character earns more. Text behind a complete reference costs nothing;
    where answers must also stop, add `exact` with a weight.

    Both are stripped of surrounding white space.

    Returns:
        `reward`, that share in [0, 1], and `accuracy`, 1 if the answer is the reference, else 0.

    Raises:
        ValueError: the prompt has no reference answer.
    """
    text, reference = trajectory.text.strip(), _reference(trajectory)
    pairs = enumerate(zip(text, reference, strict=False))
    num_right = next((i for i, (a, b) in pairs if a != b), min(len(text), len(reference)))
    return {"reward": _share(num_right, len(reference)), "accuracy": float(text == reference)}


def _reference(trajectory: Trajectory) -> str:
    prompt = trajectory.prompt
    if prompt.answer is None:
        raise ValueError(
            f"need a reference answer, prompt {prompt.index} has none; name the column that holds it in "
            "data.answer_key"
        )
    return str(prompt.answer).strip()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
