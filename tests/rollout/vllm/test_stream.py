"""Events of a vLLM server that are chunks of an answer, and those that cannot be."""

from __future__ import annotations

import pytest

from verl.rollout.inference_server import TokenChunk
from verl.rollout.vllm.stream import parse_event

PROMPT = [5, 6]


def parsed(**choice) -> TokenChunk:
    return parse_event({"choices": [choice]}, prompt_ids=PROMPT, vocab_size=10)


def test_an_event_is_a_chunk_with_ids_logprobs_and_the_reason_of_its_end():
    chunk = parsed(token_ids=[1, 9], logprobs={"token_logprobs": [-0.5, -1]}, prompt_token_ids=PROMPT)
    assert chunk == TokenChunk([1, 9], [-0.5, -1], None)
    assert parsed(token_ids=[], finish_reason="length") == TokenChunk([], [], "length")
    assert parse_event({"usage": {}}, prompt_ids=PROMPT, vocab_size=10) == TokenChunk()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"token_ids": [1], "logprobs": {"token_logprobs": [-1.0, -2.0]}}, "with 2 logprobs"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, "gave tokens None"),
        ({"token_ids": [10], "logprobs": {"token_logprobs": [-1.0]}}, "outside of the vocabulary of 10"),
        ({"token_ids": [1], "logprobs": {"token_logprobs": [None]}}, "not finite"),
        ({"token_ids": [], "finish_reason": "error"}, "ended an answer with 'error'"),
        ({"token_ids": [], "prompt_token_ids": [5]}, "read another prompt of 1 tokens, not that of 2"),
    ],
)
def test_an_event_that_cannot_be_is_an_error(choice, message):
    with pytest.raises(ValueError, match=message):
        parsed(**choice)
