"""Events of SGLang's streams: deltas or all tokens so far, versions of tokens, and invalid events."""

from __future__ import annotations

from typing import Any

import pytest

from verl.rollout.sglang.stream import SGLangStream


def event_of(ids: list[int], logprobs: list[float], total: int, **meta: Any) -> dict[str, Any]:
    entries = [[value, token, None] for value, token in zip(logprobs, ids, strict=True)]
    return {
        "output_ids": ids,
        "meta_info": {
            "completion_tokens": total,
            "output_token_logprobs": entries,
            "finish_reason": None,
            **meta,
        },
    }


@pytest.mark.parametrize("deltas", [True, False])
def test_deltas_and_everything_so_far_are_read_alike(deltas):
    steps, answer, chunks = [[7], [8, 9], [], [5]], SGLangStream(truncates=False), []
    so_far: list[int] = []
    for number, new in enumerate(steps):
        so_far += new
        ids = new if deltas else list(so_far)
        end = {"finish_reason": {"type": "length"}} if number == 3 else {}
        chunks += answer.parse(
            event_of(ids, [-float(token) for token in ids], len(so_far), weight_version="default", **end)
        )
    assert [(chunk.token_ids, chunk.logprobs) for chunk in chunks] == [
        ((7,), (-7.0,)),
        ((8, 9), (-8.0, -9.0)),
        ((5,), (-5.0,)),
    ]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"] and answer.is_finished
    assert {chunk.version for chunk in chunks} == {None}


def test_the_last_tokens_are_told_apart_by_their_versions():
    answer = SGLangStream(truncates=False)
    assert [chunk.version for chunk in answer.parse(event_of([4], [-1.0], 1, weight_version="2"))] == [2]
    spans = [{"version": "2", "start": 0, "end": 2}, {"version": "3", "start": 2, "end": 4}]
    end = {"weight_version": "3", "weight_versions": spans, "finish_reason": {"type": "stop", "matched": 5}}
    chunks = answer.parse(event_of([6, 7, 5], [-1.0, -2.0, -3.0], 4, **end))
    assert [(chunk.token_ids, chunk.version, chunk.finish_reason) for chunk in chunks] == [
        ((6,), 2, None),
        ((7, 5), 3, "stop"),
    ]


@pytest.mark.parametrize(
    "event",
    [
        event_of([4], [-1.0], 2),
        event_of([4], [-1.0], 1, output_token_logprobs=[[-1.0, 5, None]]),
        event_of([4], [-1.0], 1, finish_reason={"type": "stop", "matched": "NaN happened"}),
    ],
    ids=["lost", "other ids", "NaN"],
)
def test_events_that_cannot_be_are_errors(event):
    with pytest.raises(ValueError):
        SGLangStream(truncates=False).parse(event)
