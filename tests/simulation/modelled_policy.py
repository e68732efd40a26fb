"""A modelled policy whose samples are hashes of prefix, seed and version, so that answers can be verified."""

from __future__ import annotations

from collections.abc import Sequence

from verl.utils.sampling_types import Completion, SamplingParams

VOCABULARY, END = 1000, 1
# Other tokens are from here on.
_FIRST_TOKEN = 10
_MASK = 2**64 - 1
# Shift of the sample index for the rest of an answer, on engines whose random numbers restart.
_INDEX_STRIDE = 2**20


def state_of(row: Sequence[int]) -> int:
    """Hash of a row of tokens."""
    state = 0
    for token in row:
        state = next_state(state, token)
    return state


def next_state(state: int, token: int) -> int:
    """Hash of a row with one more token."""
    return (state * 1_000_003 + token + 1) & _MASK


def sample_token(
    state: int, seed: int, sample_index: int, *, version: int, mean_tokens: int
) -> tuple[int, float]:
    """The token that a version of the policy samples after a row, and its logprob.

    Args:
        state: hash of the row.
        seed: of the request.
        sample_index: of the request.
        version: of the policy.
        mean_tokens: mean length of an answer.
    """
    mixed = (
        state
        ^ (seed * 0x9E3779B97F4A7C15)
        ^ (sample_index * 0xC2B2AE3D27D4EB4F)
        ^ ((version + 7) * 0x165667B19E3779F9)
    ) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    mixed ^= mixed >> 31
    token = END if mixed % mean_tokens == 0 else _FIRST_TOKEN + (mixed >> 16) % (VOCABULARY - _FIRST_TOKEN)
    return token, -((mixed >> 40) % 5000 + 1) / 1000


def problem_of(
    answer: Completion,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    versions: tuple[int, int],
    mean_tokens: int,
    position_seeded: bool,
) -> str:
    """What is wrong with an answer, through whatever engines and versions it went, or "".

    Args:
        answer: to verify.
        prompt: of the request.
        params: of the request.
        versions: the oldest and the newest that may have sampled it.
        mean_tokens: mean length of an answer.
        position_seeded: as of `InferenceServer`.
    """
    ids, logprobs = list(answer.token_ids), list(answer.logprobs or ())
    by_token = list(answer.versions or ())
    if not ids or not len(ids) == len(logprobs) == len(by_token) or len(ids) > params.max_tokens:
        counts = f"{len(ids)} tokens, {len(logprobs)} logprobs, {len(by_token)} versions"
        return f"{counts}, at most {params.max_tokens}"
    is_sorted = by_token == sorted(by_token) and answer.version == by_token[0]
    if not is_sorted or by_token[0] < versions[0] or by_token[-1] > versions[1]:
        return f"versions {by_token} of an answer of version {answer.version}, allowed are {versions}"
    state, index = state_of(prompt), params.sample_index
    for i, (token, logprob, version) in enumerate(zip(ids, logprobs, by_token, strict=True)):
        options = {"version": version, "mean_tokens": mean_tokens}
        fits = sample_token(state, params.seed, index, **options) == (token, logprob)
        if not fits and not position_seeded:
            index = params.sample_index + _INDEX_STRIDE * i  # another engine continues from here
            fits = sample_token(state, params.seed, index, **options) == (token, logprob)
        if not fits:
            return f"token {i} is {token} with {logprob}, not what version {version} samples after {ids[:i]}"
        state = next_state(state, token)
    if END in ids[:-1]:
        return f"goes on after its end: {ids}"
    expected = "stop" if ids[-1] == END else "length" if len(ids) == params.max_tokens else "no end yet"
    if answer.finish_reason == expected:
        return ""
    return f"ended by {answer.finish_reason} after {len(ids)} tokens: {expected}"
