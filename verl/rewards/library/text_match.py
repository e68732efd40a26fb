"""Built-in rewards that compare an answer with its reference, character by character."""

from __future__ import annotations

from collections.abc import Callable

from verl.data.trajectory import Trajectory
from verl.rewards.library.extraction import Extract, extracted
from verl.rewards.library.normalization import NORMALIZATIONS, Normalize
from verl.rewards.library.spellings import REMEDY, spellings


def exact(
    trajectory: Trajectory, *, extract: Extract = "whole", normalize: Normalize = "none"
) -> dict[str, float]:
    """1 if the answer is the reference, both stripped of surrounding white space, else 0.

    A reference that is no text is compared by its plain spellings, see `spellings`.

    Args:
        trajectory: the answer.
        extract: part of the answer that is compared; without it, the answer is wrong.
        normalize: brings both to one spelling before: "unicode", "loose" or "squad".

    Returns:
        `reward` and `accuracy`, both that number.

    Raises:
        ValueError: the prompt has no reference answer, or one without a plain spelling.
    """
    plain, part = NORMALIZATIONS[normalize], extracted(trajectory.text, extract)
    references = map(plain, _references(trajectory))
    right = float(part is not None and plain(part) in references)
    return {"reward": right, "accuracy": right}


def position_share(trajectory: Trajectory, *, extract: Extract = "whole") -> dict[str, float]:
    """Share of the positions of the longer of answer and reference that hold the same character in both.

    So an answer that is longer than the reference loses. Of several spellings of the reference the one with
    the largest share counts.

    Both are stripped of surrounding white space.

    Args:
        trajectory: the answer.
        extract: part of the answer that is compared; without it, the answer is wrong.

    Returns:
        `reward`, that share in [0, 1], and `accuracy`, 1 if the answer is the reference, else 0.

    Raises:
        ValueError: the prompt has no reference answer, or one without a plain spelling.
    """
    return _best_share(trajectory, _equal_positions, extract)


def prefix_share(trajectory: Trajectory, *, extract: Extract = "whole") -> dict[str, float]:
    """Share of the reference's characters that the answer holds before its first error.

    A dense reward: each further right character earns more. Text behind a complete reference costs nothing;
    where answers must also stop, add `exact` with a weight. Of several spellings of the reference the one
    with the largest share counts.

    Both are stripped of surrounding white space.

    Args:
        trajectory: the answer.
        extract: part of the answer that is compared; without it, the answer is wrong.

    Returns:
        `reward`, that share in [0, 1], and `accuracy`, 1 if the answer is the reference, else 0.

    Raises:
        ValueError: the prompt has no reference answer, or one without a plain spelling.
    """
    return _best_share(trajectory, _equal_prefix, extract)


def _references(trajectory: Trajectory) -> tuple[str, ...]:
    prompt = trajectory.prompt
    if isinstance(prompt.answer, str):
        return (prompt.answer.strip(),)
    try:
        return spellings(prompt.answer)
    except ValueError as error:
        raise ValueError(
            f"prompt {prompt.index}: {error}; name the column that holds it in data.answer_key, or {REMEDY}"
        ) from error


def _best_share(
    trajectory: Trajectory, share: Callable[[str, str], float], extract: Extract
) -> dict[str, float]:
    text, references = extracted(trajectory.text, extract), _references(trajectory)
    if text is None:
        return {"reward": 0.0, "accuracy": 0.0}
    best = max(share(text, reference) for reference in references)
    return {"reward": best, "accuracy": float(text in references)}


def _equal_positions(text: str, reference: str) -> float:
    num_right = sum(a == b for a, b in zip(text, reference, strict=False))
    return _share(num_right, max(len(text), len(reference)))


def _equal_prefix(text: str, reference: str) -> float:
    pairs = enumerate(zip(text, reference, strict=False))
    num_right = next((i for i, (a, b) in pairs if a != b), min(len(text), len(reference)))
    return _share(num_right, len(reference))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
