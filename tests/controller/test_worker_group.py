"""One device: calls run here and now, and leave their spans."""

from __future__ import annotations

import json

import pytest

from verl.controller.dispatch import DP_PROTO, ONE_TO_ALL, register
from verl.controller.worker_group import CompletedFuture, LocalPool, MergedMetrics, Worker, append_trace


class Doubler(Worker):
    """Doubles what it is given."""

    def __init__(self, factor=2):
        self.factor = factor

    @register(DP_PROTO)
    def double(self, values):
        return [self.factor * value for value in values]

    @register(ONE_TO_ALL)
    def fail(self):
        raise KeyError("as it was raised")


def test_a_call_runs_when_it_is_made_in_this_process():
    pool = LocalPool()
    group = pool.start("doubler", Doubler, 3)
    assert group.call(Doubler.double, [1, 2]).result() == [3, 6]
    group.worker.factor = 5
    assert group.call(Doubler.double, [1]).result() == [5]
    with pytest.raises(KeyError, match="as it was raised"):
        group.call(Doubler.fail)
    assert group.layouts["train"].num_parts == 1


def test_spans_say_what_ran_when_and_the_trace_is_one_that_viewers_read(tmp_path):
    pool = LocalPool("here")
    group = pool.start("doubler", Doubler)
    for _ in range(2):
        group.call(Doubler.double, [1])
        append_trace(tmp_path / "trace.json", pool.timeline.take())
    assert pool.timeline.take() == []
    events = json.loads((tmp_path / "trace.json").read_text().rstrip().removesuffix(",") + "]")
    assert [(event["name"], event["pid"], event["tid"], event["ph"]) for event in events] == [
        ("doubler.double", "here", 0, "X")
    ] * 2
    assert events[0]["ts"] + events[0]["dur"] <= events[1]["ts"]


def test_metrics_of_the_controller_join_those_of_a_call():
    assert MergedMetrics(CompletedFuture({"loss": 1.0}), {"skipped": 0.5}).result() == {
        "loss": 1.0,
        "skipped": 0.5,
    }
